"""Every format and mode decodes to the pixels that a viewer would show."""

import struct

import numpy as np
import pytest
from PIL import Image, ImageOps
from reference import images

from losa_scenic.dataset_lib import decode
from losa_scenic.dataset_lib.sources import BadImage

RED, GREEN, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (255, 255, 255), (0, 0, 0)


def colours(encoded: bytes) -> set[tuple[int, ...]]:
  """All colours of the decoded image."""
  decoded = decode.decode(encoded, 'x')
  assert decoded.dtype == np.uint8 and decoded.ndim == 3 and decoded.shape[2] == 3
  assert decoded.flags.writeable and decoded.flags.c_contiguous
  return set(map(tuple, decoded.reshape(-1, 3).tolist()))


def painted(mode: str, colour, palette: list[int] | None = None) -> Image.Image:
  image = Image.new(mode, (7, 5), colour)
  if palette is not None:
    image.putpalette(palette + [0] * (768 - len(palette)))
  return image


@pytest.mark.parametrize('kind', ['PNG', 'BMP', 'TIFF', 'WEBP', 'GIF'])
def test_rgb_bit_for_bit(kind):
  pixels = images.noise(9, 16)
  if kind == 'GIF':  # At most 256 colours.
    pixels = pixels // 86 * 86
  encoded = images.encode(pixels, kind, **({'lossless': True} if kind == 'WEBP' else {}))
  np.testing.assert_array_equal(decode.decode(encoded, 'x'), pixels)
  header = decode.read_header(encoded, 'x')
  assert header[:1] + header[2:] == (kind, 16, 9, 1) and not header.reducible


MODES = {
  'grey': (painted('L', 77), (77, 77, 77)),
  '1-bit white': (painted('1', 1), WHITE),
  '1-bit black': (painted('1', 0), BLACK),
  'palette': (painted('P', 1, [0, 0, 0, 9, 10, 11]), (9, 10, 11)),
  'opaque': (painted('RGBA', (255, 0, 0, 255)), RED),
  'transparent': (painted('RGBA', (255, 0, 0, 0)), WHITE),
  'a fifth of black': (painted('RGBA', (0, 0, 0, 51)), (204, 204, 204)),
  'a fifth of red': (painted('RGBA', (255, 0, 0, 51)), (255, 204, 204)),
  'grey and alpha': (painted('LA', (0, 51)), (204, 204, 204)),
  'CMYK': (painted('CMYK', (0, 255, 255, 0)), RED),
  '16 bits': (Image.fromarray(np.full((5, 7), 0x1234, np.uint16)), (0x12, 0x12, 0x12)),
  '16 bits white': (Image.fromarray(np.full((5, 7), 0xFFFF, np.uint16)), WHITE),
}
# What neither PNG nor TIFF can hold is left out below.
WRITES = [
  (kind, name) for kind in ('PNG', 'TIFF') for name in MODES if (kind, name) != ('PNG', 'CMYK')
]


@pytest.mark.parametrize(('kind', 'name'), WRITES)
def test_modes(kind, name):
  image, colour = MODES[name]
  encoded = images.encode(image, kind)
  assert colours(encoded) == {colour}
  header = decode.read_header(encoded, 'x')
  assert (header.mode, header.width, header.height) == (image.mode, 7, 5)


def test_transparency_without_an_alpha_channel():
  palette = painted('P', 0, [0, 0, 255])
  assert colours(images.encode(palette)) == {(0, 0, 255)}
  assert colours(images.encode(palette, transparency=0)) == {WHITE}
  # A palette with one entry half transparent.
  assert colours(images.encode(painted('P', 0, [0, 0, 0]), transparency=b'\x33')) == {(204,) * 3}
  # One colour of a grey or RGB image stands for 'nothing here'.
  for colour_type, pixels, nothing in (
    (0, [7, 9], struct.pack('>H', 7)),
    (2, [7, 7, 7, 9, 9, 9], struct.pack('>3H', 7, 7, 7)),
  ):
    extra = images.chunk(b'tRNS', nothing)
    encoded = images.png(2, 1, 8, colour_type, b'\0' + bytes(pixels), extra)
    assert colours(encoded) == {WHITE, (9, 9, 9)}


def test_sixteen_bit_colours_keep_the_high_byte():
  values = (0x12AA, 0x34AA, 0x56AA)
  rows = (b'\0' + struct.pack('>6H', *values * 2)) * 2
  assert colours(images.png(2, 2, 16, 2, rows)) == {(0x12, 0x34, 0x56)}
  half_clear = (b'\0' + struct.pack('>8H', *values, 0xFFFF, *values, 0)) * 2
  assert colours(images.png(2, 2, 16, 6, half_clear)) == {(0x12, 0x34, 0x56), WHITE}
  for order in '<>':
    grey = images.tiff(2, 2, 16, 1, struct.pack(f'{order}4H', *[0x12AA] * 4), order)
    assert colours(grey) == {(0x12, 0x12, 0x12)}
    rgb = images.tiff(2, 2, 16, 3, struct.pack(f'{order}12H', *values * 4), order)
    assert colours(rgb) == {(0x12, 0x34, 0x56)}


def test_few_bits_of_grey_are_stretched():
  encoded = images.png(4, 1, 2, 0, b'\0' + bytes([0b00011011]))
  np.testing.assert_array_equal(decode.decode(encoded, 'x')[0, :, 0], [0, 85, 170, 255])


@pytest.mark.parametrize(
  'compression', ['tiff_lzw', 'tiff_deflate', 'packbits', 'tiff_adobe_deflate']
)
def test_compressed_tiff(compression):
  pixels = images.noise(6, 5)
  encoded = images.encode(pixels, 'TIFF', compression=compression)
  np.testing.assert_array_equal(decode.decode(encoded, 'x'), pixels)


@pytest.mark.parametrize(
  ('kind', 'options'),
  [('GIF', {}), ('WEBP', {'lossless': True}), ('PNG', {}), ('TIFF', {}), ('MPO', {'quality': 100})],
)
def test_the_first_of_several_pictures(kind, options):
  first, *others = (painted('RGB', colour) for colour in (RED, GREEN, BLACK))
  encoded = images.encode(first, kind, save_all=True, append_images=others, **options)
  decoded = decode.decode(encoded, 'x')
  assert decoded.shape == (5, 7, 3)
  np.testing.assert_allclose(decoded, np.broadcast_to(RED, (5, 7, 3)), atol=1)
  header = decode.read_header(encoded, 'x')
  assert (header.format, header.reducible) == (kind, kind == 'MPO')


def test_transparent_gif_and_webp_lie_on_white():
  gif = images.encode(painted('P', 0, [255, 0, 0]), 'GIF', transparency=0)
  webp = images.encode(painted('RGBA', (255, 0, 0, 51)), 'WEBP', lossless=True)
  assert colours(gif) == {WHITE} and colours(webp) == {(255, 204, 204)}


@pytest.mark.parametrize('kind', ['PNG', 'WEBP', 'TIFF'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_orientation_outside_of_jpeg(kind, orientation):
  pixels = images.noise(5, 9)
  options = {'lossless': True} if kind == 'WEBP' else {}
  encoded = images.encode(pixels, kind, exif=images.exif(orientation), **options)
  stored = Image.fromarray(pixels)
  stored.getexif()[images.ORIENTATION] = orientation
  upright = np.array(ImageOps.exif_transpose(stored))
  np.testing.assert_array_equal(decode.decode(encoded, 'x'), upright)
  header = decode.read_header(encoded, 'x')
  assert (header.height, header.width) == upright.shape[:2]
  assert header.orientation == orientation


def test_what_a_quarter_turn_is():
  stored = np.zeros((10, 40, 3), np.uint8)
  stored[:, :20] = 255  # Clockwise, the left side comes to the top.
  turned = decode.decode(images.encode(stored, exif=images.exif(6)), 'x')
  assert turned.shape == (40, 10, 3) and turned[:20].min() == 255 and turned[20:].max() == 0


def test_a_colour_profile_is_not_applied():
  pixels = images.noise(4, 4)
  encoded = images.encode(pixels, icc_profile=b'no profile at all')
  np.testing.assert_array_equal(decode.decode(encoded, 'x'), pixels)


def test_extensions_are_of_formats_that_are_read():
  registered = Image.registered_extensions()
  assert {registered[extension] for extension in decode.EXTENSIONS} == set(decode.FORMATS)


@pytest.mark.parametrize('kind', ['PPM', 'ICO', 'TGA'])
def test_other_formats_are_refused(kind):
  with pytest.raises(BadImage) as caught:
    decode.decode(images.encode(images.noise(16, 16), kind), 'a.png')
  assert str(caught.value) == 'a.png: not a JPEG, PNG, WebP, GIF, BMP or TIFF image.'
