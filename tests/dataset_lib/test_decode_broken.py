"""Broken images end in a `BadImage` that names the image and the reason, and in nothing else."""

import pickle
import struct
import time

import numpy as np
import pytest
from PIL import Image
from reference import images

from losa_scenic.dataset_lib import decode
from losa_scenic.dataset_lib.sources import BadImage

NAME = 'cats/7.jpg'
CORRUPT = 'the image is truncated or corrupt'
UNKNOWN = 'not a JPEG, PNG, WebP, GIF, BMP or TIFF image'


def problem(encoded: bytes, **options) -> BadImage:
  with pytest.raises(BadImage) as caught:
    decode.decode(encoded, NAME, **options)
  assert caught.value.id == NAME
  assert str(caught.value) == f'{NAME}: {caught.value.reason}.'
  return caught.value


def whole(kind: str, **options) -> bytes:
  pixels = images.noise(64, 64)
  if kind == 'GIF':
    return images.encode(Image.fromarray(pixels).quantize(256), kind, **options)
  return images.encode(pixels, kind, **options)


@pytest.mark.filterwarnings('ignore')  # Pillow warns of damaged EXIF data.
@pytest.mark.parametrize('kind', decode.FORMATS)
def test_truncated(kind):
  encoded = whole(kind)
  for size in (1, 10, 30, len(encoded) // 2, len(encoded) - 300):
    problem(encoded[:size])


@pytest.mark.parametrize('options', [{}, {'progressive': True}, {'subsampling': 0}])
def test_a_jpeg_without_its_last_bytes(options):
  encoded = whole('JPEG', **options)
  for missing in (1, 2, 3, 60, len(encoded) // 2):
    assert problem(encoded[:-missing]).reason == CORRUPT
    for reduction in decode.REDUCTIONS:
      assert problem(encoded[:-missing], reduction=reduction).reason == CORRUPT


def test_a_header_that_is_right_says_nothing_of_the_rest():
  encoded = whole('JPEG')[:1000]
  header = decode.read_header(encoded, NAME)
  assert header == ('JPEG', 'RGB', 64, 64, 1)
  assert problem(encoded, header=header).reason == CORRUPT


@pytest.mark.parametrize(
  ('encoded', 'reason'),
  [
    (b'', 'the file is empty'),
    (b'<!DOCTYPE html><html><body>404 Not Found</body></html>', UNKNOWN),
    (b'\0' * 100, UNKNOWN),
    (b'\xff\xd8\xff', UNKNOWN),
    (b'RIFF\x10\0\0\0WAVEfmt ' + bytes(20), UNKNOWN),
    (b'%PDF-1.7\n' + bytes(100), UNKNOWN),
  ],
)
def test_what_is_no_image(encoded, reason):
  assert problem(encoded).reason == reason
  with pytest.raises(BadImage) as caught:
    decode.read_header(encoded, NAME)
  assert caught.value.reason == reason


def test_the_name_does_not_matter():
  pixels = images.noise(8, 8)
  for name in ('x.jpg', 'x', 'x.gif'):
    np.testing.assert_array_equal(decode.decode(images.encode(pixels), name), pixels)


def test_the_reason_survives_pickling():
  error = problem(whole('PNG')[:200])
  copy = pickle.loads(pickle.dumps(error))
  assert (type(copy), copy.id, copy.reason) == (BadImage, NAME, error.reason)
  assert copy.reason.startswith('the image cannot be read (')


def png_header(width: int, height: int) -> bytes:
  """A PNG file that ends where its pixels would begin."""
  body = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  return b'\x89PNG\r\n\x1a\n' + images.chunk(b'IHDR', body) + b'\0\0\0\0IDAT' + b'\0' * 4


def jpeg_of(width: int, height: int) -> bytes:
  """A JPEG file of 8 x 8 pixels whose header claims another size."""
  encoded = bytearray(images.encode(images.noise(8, 8), 'JPEG'))
  place = encoded.index(b'\xff\xc0') + 5
  encoded[place : place + 4] = struct.pack('>HH', height, width)
  return bytes(encoded)


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize(
  'encoded',
  [
    png_header(9_000, 9_000),
    png_header(10_000, 10_000),
    png_header(60_000, 60_000),
    png_header(decode.MAX_PIXELS + 1, 1),
    jpeg_of(65_500, 65_500),
    jpeg_of(8_945, 8_945),
  ],
)
def test_a_small_file_that_claims_a_huge_image_is_refused_before_decoding(encoded):
  start = time.monotonic()
  assert problem(encoded).reason.startswith('too large an image (')
  assert time.monotonic() - start < 0.5
  with pytest.raises(BadImage, match='too large'):
    decode.read_header(encoded, NAME)


def test_the_largest_image_that_is_read():
  header = decode.read_header(jpeg_of(10_000, decode.MAX_PIXELS // 10_000), NAME)
  assert header.width * header.height == decode.MAX_PIXELS


@pytest.mark.filterwarnings('ignore')  # Pillow warns of damaged EXIF data.
@pytest.mark.parametrize('kind', decode.FORMATS)
def test_damaged_bytes_raise_nothing_else(kind):
  rng = np.random.default_rng(0)
  exif = {} if kind in ('GIF', 'BMP') else {'exif': images.exif(6)}
  encoded = np.frombuffer(images.encode(images.noise(24, 24), kind, **exif), np.uint8)
  outcomes = {'read': 0, 'bad': 0}
  for _ in range(80):
    damaged = encoded.copy()
    damaged[rng.integers(0, min(len(encoded), 300), 4)] = rng.integers(0, 256, 4)
    try:
      header = decode.read_header(damaged.tobytes(), 'x')
      decoded = decode.decode(damaged.tobytes(), 'x', header)
      assert decoded.shape == (header.height, header.width, 3) and decoded.dtype == np.uint8
      outcomes['read'] += 1
    except BadImage as error:
      assert error.id == 'x'
      outcomes['bad'] += 1
  assert outcomes['bad'] > 0


@pytest.mark.parametrize(
  ('pixels', 'reason'),
  [
    (np.full((4, 5), 0.5, np.float32), 'floating-point'),
    (np.full((4, 5), 70_000, np.int32), '32 bits'),
    (np.full((4, 5), 7, np.int32), '32 bits'),
  ],
)
def test_samples_of_unknown_range_are_refused(pixels, reason):
  with pytest.raises(BadImage, match=reason):
    decode.decode(images.encode(Image.fromarray(pixels), 'TIFF'), 'x.tif')
