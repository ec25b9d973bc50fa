"""Every image mode decodes to the pixels a viewer would show; every broken file is named."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import decode


def encode(image: Image.Image, kind: str = 'PNG', **options) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def corners(image: np.ndarray) -> list[tuple[int, ...]]:
  """Colours at top left, top right, bottom left and bottom right."""
  return [tuple(int(v) for v in image[y, x]) for y in (0, -1) for x in (0, -1)]


RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)


def test_rgb_of_the_right_size_is_returned_bit_for_bit():
  pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
  decoded = decode.decode(encode(Image.fromarray(pixels)), 'x', 16)
  assert decoded.dtype == np.uint8
  np.testing.assert_array_equal(decoded, pixels)
  assert decoded.flags.writeable and decoded.flags.owndata


@pytest.mark.parametrize(
  ('image', 'colour'),
  [
    (Image.new('L', (8, 8), 77), (77, 77, 77)),
    (Image.new('1', (8, 8), 1), WHITE),
    (Image.new('1', (8, 8), 0), BLACK),
    (Image.new('P', (8, 8), 3), (9, 10, 11)),
    (Image.new('RGBA', (8, 8), (255, 0, 0, 255)), RED),
    (Image.new('RGBA', (8, 8), (255, 0, 0, 0)), WHITE),
    (Image.new('RGBA', (8, 8), (0, 0, 0, 51)), (204, 204, 204)),
    (Image.new('LA', (8, 8), (0, 51)), (204, 204, 204)),
    (Image.fromarray(np.full((8, 8), 0x1234, np.uint16)), (0x12, 0x12, 0x12)),
    (Image.fromarray(np.full((8, 8), 0xFFFF, np.uint16)), WHITE),
  ],
  ids=lambda value: f'{value.mode}' if isinstance(value, Image.Image) else str(value),
)
def test_modes(image, colour):
  if image.mode == 'P':
    image.putpalette([i % 256 for i in range(256 * 3)])
  decoded = decode.decode(encode(image), 'x', 8)
  assert decoded.shape == (8, 8, 3)
  assert corners(decoded) == [colour] * 4


def test_palette_transparency_is_white():
  image = Image.new('P', (8, 8), 0)
  image.putpalette([0, 0, 255] + [0] * 765)
  assert corners(decode.decode(encode(image, transparency=0), 'x', 8)) == [WHITE] * 4
  assert corners(decode.decode(encode(image), 'x', 8)) == [(0, 0, 255)] * 4


def test_sixteen_bit_rgb_keeps_the_high_byte():
  # Pillow cannot write this kind of PNG: built by hand, 2 x 2 pixels of (0x12AA, 0x34AA, 0x56AA).
  row = b'\x00' + struct.pack('>6H', *(0x12AA, 0x34AA, 0x56AA) * 2)

  def chunk(kind, body):
    return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))

  encoded = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 2, 2, 16, 2, 0, 0, 0))
  encoded += chunk(b'IDAT', zlib.compress(row * 2)) + chunk(b'IEND', b'')
  assert corners(decode.decode(encoded, 'x', 2)) == [(0x12, 0x34, 0x56)] * 4


def test_cmyk_jpeg_and_lossless_webp():
  cmyk = decode.decode(encode(Image.new('CMYK', (8, 8), (0, 255, 255, 0)), 'JPEG'), 'x', 8)
  np.testing.assert_allclose(cmyk[4, 4], RED, atol=4)
  webp = encode(Image.new('RGB', (8, 8), (10, 20, 30)), 'WEBP', lossless=True)
  assert corners(decode.decode(webp, 'x', 8)) == [(10, 20, 30)] * 4


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP'])
def test_exif_orientation_is_applied(kind):
  left_white = np.zeros((32, 32, 3), np.uint8)
  left_white[:, :16] = 255
  exif = Image.Exif()
  exif[0x0112] = 6  # Shown after a quarter turn clockwise: the left side comes to the top.
  turned = decode.decode(encode(Image.fromarray(left_white), kind, exif=exif), 'x', 32)
  assert turned[4].min() > 240 and turned[-4].max() < 15


def test_exif_orientation_of_an_image_that_is_not_square():
  exif = Image.Exif()
  exif[0x0112] = 6
  image = np.zeros((10, 40, 3), np.uint8)
  image[:, :20] = 255
  turned = decode.decode(encode(Image.fromarray(image), exif=exif), 'x', 40)
  assert turned[:15].min() > 240 and turned[25:].max() < 15


def test_shrinking_averages_and_squashes_the_whole_image():
  stripes = np.zeros((64, 128, 3), np.uint8)
  stripes[:, ::2] = 255
  small = decode.decode(encode(Image.fromarray(stripes)), 'x', 16)
  assert small.shape == (16, 16, 3)
  np.testing.assert_allclose(small, 127.5, atol=5)  # Without antialiasing: 0 or 255.


def test_enlarging_keeps_flat_areas_and_order():
  halves = np.zeros((4, 4, 3), np.uint8)
  halves[:, 2:] = 200
  large = decode.resize(halves, 32)
  assert set(large[:, :4].ravel()) == {0} and set(large[:, -4:].ravel()) == {200}


def test_broken_files_are_errors_that_name_the_file():
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
  for kind in decode.FORMATS:
    whole = encode(Image.fromarray(noise), kind)
    for size in (1, 10, 30, len(whole) // 2, len(whole) - 60):
      with pytest.raises(errors.UserError, match=r'cats/7\.jpg'):
        decode.decode(whole[:size], 'cats/7.jpg', 32)
  gif = encode(Image.new('L', (4, 4)), 'GIF')
  for encoded in (b'', b'<html>404</html>', b'\0' * 100, gif):
    with pytest.raises(errors.UserError, match=r'^cats/7\.jpg: '):
      decode.decode(encoded, 'cats/7.jpg', 32)


@pytest.mark.filterwarnings('ignore::UserWarning')  # Pillow warns of corrupt EXIF data.
def test_damaged_bytes_never_raise_anything_but_the_user_error():
  rng = np.random.default_rng(0)
  noise = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
  exif = Image.Exif()
  exif[0x0112] = 6
  for kind in decode.FORMATS:
    whole = np.frombuffer(encode(Image.fromarray(noise), kind, exif=exif), np.uint8)
    for _ in range(60):
      damaged = whole.copy()
      places = rng.integers(0, min(len(whole), 300), 4)
      damaged[places] = rng.integers(0, 256, 4)
      try:
        assert decode.decode(damaged.tobytes(), 'x', 8).shape == (8, 8, 3)
      except errors.UserError as error:
        assert str(error).startswith('x: ')


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('side', [9_000, 10_000, 60_000])
def test_decompression_bombs_are_refused(side, tmp_path):
  body = struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)
  header = struct.pack('>I', 13) + b'IHDR' + body + struct.pack('>I', zlib.crc32(b'IHDR' + body))
  encoded = b'\x89PNG\r\n\x1a\n' + header + b'\0\0\0\0IDAT' + b'\0' * 4
  with pytest.raises(errors.UserError, match=r'^bomb\.png: too large'):
    decode.decode(encoded, 'bomb.png', 32)
  (tmp_path / 'bomb.png').write_bytes(encoded)
  with pytest.raises(errors.UserError, match=r'bomb\.png: too large'):
    decode.check_header(tmp_path / 'bomb.png')
