"""JPEG, which goes through OpenCV: to the bit what Pillow shows, upright, and reduced on demand."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps
from reference import images

from losa_scenic.dataset_lib import decode

KINDS = {
  '4:4:4': {'subsampling': 0},
  '4:2:2': {'subsampling': 1},
  '4:2:0': {'subsampling': 2},
  '4:1:1': {'subsampling': '4:1:1'},
  'progressive': {'progressive': True},
  'progressive 4:4:4': {'progressive': True, 'subsampling': 0},
  'poor': {'quality': 10},
  'fine': {'quality': 100},
  'restarts': {'restart_marker_blocks': 1},
  'stored as RGB': {'keep_rgb': True},
}


def pillow(encoded: bytes) -> np.ndarray:
  with Image.open(io.BytesIO(encoded)) as image:
    return np.array(ImageOps.exif_transpose(image).convert('RGB'))


@pytest.mark.parametrize('options', KINDS.values(), ids=KINDS.keys())
def test_pixels_are_pillows_to_the_bit(options):
  for height, width in ((1, 1), (7, 1), (8, 8), (9, 17), (33, 31), (64, 48)):
    for pixels in (images.smooth(height, width), images.noise(height, width)):
      encoded = images.encode(pixels, 'JPEG', **options)
      decoded = decode.decode(encoded, 'x')
      assert decoded.dtype == np.uint8 and decoded.flags.writeable
      np.testing.assert_array_equal(decoded, pillow(encoded))


@pytest.mark.parametrize('options', [{}, {'progressive': True}])
def test_grey(options):
  encoded = images.encode(images.smooth(13, 21)[..., 0], 'JPEG', **options)
  decoded = decode.decode(encoded, 'x')
  assert decoded.shape == (13, 21, 3) and (decoded == decoded[..., :1]).all()
  np.testing.assert_array_equal(decoded, pillow(encoded))
  assert decode.read_header(encoded, 'x') == ('JPEG', 'L', 21, 13, 1)


def test_red_comes_first():
  encoded = images.encode(Image.new('RGB', (8, 8), (250, 120, 10)), 'JPEG', quality=100)
  for reduction in (1, 2, 4, 8):
    decoded = decode.decode(encoded, 'x', reduction=reduction)
    np.testing.assert_allclose(decoded[0, 0], (250, 120, 10), atol=2)


@pytest.mark.parametrize('height,width', [(13, 27), (16, 9)])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_orientation(orientation, height, width):
  pixels = images.smooth(height, width)
  encoded = images.encode(pixels, 'JPEG', exif=images.exif(orientation))
  expected = pillow(encoded)
  assert expected.shape[:2] == ((height, width) if orientation < 5 else (width, height))
  decoded = decode.decode(encoded, 'x')
  np.testing.assert_array_equal(decoded, expected)
  assert decoded.flags.c_contiguous
  header = decode.read_header(encoded, 'x')
  assert header == ('JPEG', 'RGB', expected.shape[1], expected.shape[0], orientation)
  np.testing.assert_array_equal(decode.decode(encoded, 'x', header), expected)


@pytest.mark.filterwarnings('ignore::UserWarning')  # Pillow warns of corrupt EXIF data.
@pytest.mark.parametrize('damage', ['no orientation', 'orientation 9', 'cut', 'garbage'])
def test_exif_data_that_says_nothing(damage):
  pixels = images.smooth(12, 20)
  block = {
    'no orientation': Image.Exif().tobytes(),
    'orientation 9': images.exif(9).tobytes(),
    'cut': images.exif(6).tobytes()[:12],
    'garbage': b'Exif\0\0' + b'\xff' * 40,
  }[damage]
  decoded = decode.decode(images.encode(pixels, 'JPEG', exif=block), 'x')
  np.testing.assert_array_equal(decoded, pillow(images.encode(pixels, 'JPEG')))


def box_mean(pixels: np.ndarray, side: int) -> np.ndarray:
  """Means over squares; those at the lower and right edge may be cut."""
  height, width = (-(-length // side) for length in pixels.shape[:2])
  result = np.empty((height, width, 3))
  for y in range(height):
    for x in range(width):
      square = pixels[y * side : (y + 1) * side, x * side : (x + 1) * side]
      result[y, x] = square.mean((0, 1))
  return result


def psnr(one: np.ndarray, other: np.ndarray) -> float:
  return 10 * np.log10(255**2 / np.mean((one - other) ** 2))


@pytest.mark.parametrize('reduction', decode.REDUCTIONS)
@pytest.mark.parametrize('orientation', [1, 2, 3, 5, 6, 8])
def test_reduced(orientation, reduction):
  pixels = images.smooth(61, 75)
  for options, least in (
    ({'subsampling': 0}, 45),
    ({'progressive': True, 'subsampling': 0}, 45),
    ({}, 30),
  ):
    stored = images.encode(pixels, 'JPEG', quality=95, **options)
    encoded = images.encode(pixels, 'JPEG', quality=95, exif=images.exif(orientation), **options)
    header = decode.read_header(encoded, 'x')
    reduced = decode.decode(encoded, 'x', header, reduction)
    assert reduced.dtype == np.uint8 and reduced.flags.c_contiguous and reduced.flags.writeable
    assert reduced.shape == (-(-header.height // reduction), -(-header.width // reduction), 3)
    # The squares are those of the stored image, before it is turned.
    mean = Image.fromarray(np.rint(box_mean(pillow(stored), reduction)).astype(np.uint8))
    mean.getexif()[images.ORIENTATION] = orientation
    assert psnr(reduced, np.array(ImageOps.exif_transpose(mean)).astype(float)) > least


def test_reduced_grey_and_smallest():
  grey = images.encode(images.smooth(32, 24)[..., 0], 'JPEG', quality=100)
  reduced = decode.decode(grey, 'x', reduction=4)
  assert (reduced == reduced[..., :1]).all()
  assert psnr(reduced, box_mean(pillow(grey), 4)) > 45
  tiny = images.encode(Image.new('RGB', (1, 3), (10, 200, 90)), 'JPEG', quality=100)
  assert decode.decode(tiny, 'x', reduction=8).shape == (1, 1, 3)


def cmyk_jpeg(image: Image.Image, *, transform: int | None) -> bytes:
  """What Pillow writes, with another colour transform (2: YCCK) or no marker of Adobe's at all."""
  encoded = images.encode(image, 'JPEG', quality=100)
  place = encoded.index(b'Adobe')
  if transform is None:
    return encoded[: place - 4] + encoded[place + 12 :]
  return encoded[: place + 11] + bytes([transform]) + encoded[place + 12 :]


@pytest.mark.parametrize(
  ('inks', 'colour'),
  [
    ((0, 255, 255, 0), (255, 0, 0)),
    ((0, 0, 0, 0), (255, 255, 255)),
    ((255, 0, 0, 102), (0, 153, 153)),
  ],
)
def test_cmyk(inks, colour):
  image = Image.new('CMYK', (9, 5), inks)
  # As Adobe's programs do, full ink is stored as 0; others' files are taken to be the same.
  for transform in (0, None):
    encoded = cmyk_jpeg(image, transform=transform)
    decoded = decode.decode(encoded, 'x')
    assert decoded.shape == (5, 9, 3)
    np.testing.assert_allclose(decoded, np.broadcast_to(colour, decoded.shape), atol=3)
    header = decode.read_header(encoded, 'x')
    assert header == ('JPEG', 'CMYK', 9, 5, 1) and not header.reducible


def test_ycck():
  # Stored are Y, Cb, Cr of the inverted inks and the inverted black: here of red, without black.
  inverted = np.array(Image.new('RGB', (1, 1), (0, 255, 255)).convert('YCbCr'))[0, 0]
  image = Image.new('CMYK', (9, 5), (*(255 - inverted).tolist(), 0))
  decoded = decode.decode(cmyk_jpeg(image, transform=2), 'x')
  np.testing.assert_allclose(decoded, np.broadcast_to((255, 0, 0), decoded.shape), atol=3)


def test_cmyk_stands_upright_too():
  inks = np.zeros((6, 10, 4), np.uint8)
  inks[:, :5, 3] = 255  # The left half is black.
  image = Image.fromarray(inks, 'CMYK')
  encoded = images.encode(image, 'JPEG', quality=100, exif=images.exif(6))
  decoded = decode.decode(encoded, 'x')
  assert decoded.shape == (10, 6, 3)
  assert decoded[:3].max() < 40 and decoded[-3:].min() > 215


def test_what_cannot_be_reduced_is_a_mistake_of_the_caller():
  for encoded in (
    images.encode(images.noise(8, 8)),
    images.encode(Image.new('CMYK', (8, 8)), 'JPEG'),
  ):
    assert not decode.read_header(encoded, 'x').reducible
    with pytest.raises(ValueError, match='x: only everyday JPEG'):
      decode.decode(encoded, 'x', reduction=2)


def test_phone_pictures_of_several_parts_are_everyday_jpeg():
  first = images.smooth(21, 30)
  encoded = images.encode(
    first,
    'MPO',
    save_all=True,
    append_images=[Image.fromarray(images.noise(21, 30))],
    exif=images.exif(8),
  )
  header = decode.read_header(encoded, 'x')
  assert header == ('MPO', 'RGB', 21, 30, 8) and header.reducible
  np.testing.assert_array_equal(decode.decode(encoded, 'x'), pillow(encoded))
  assert decode.decode(encoded, 'x', header, 4).shape == (8, 6, 3)
