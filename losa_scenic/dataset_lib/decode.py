"""Encoded image bytes to uint8 RGB arrays of the image's own size: one rule for every data set.

JPEG, PNG, WebP, GIF, BMP and TIFF are read; of an animation the first frame. In this order:
  1. grey, 1-bit, palette and CMYK images become RGB; 16-bit samples keep their high byte, wider
     ones and floating-point numbers are refused; transparent pixels are laid over white; embedded
     colour profiles are not applied;
  2. the EXIF orientation is applied, so that a photo stands as its viewer shows it.

Everyday JPEG goes through OpenCV, which is 1.6 times as fast as Pillow and gives the same pixels to
the bit (both are libjpeg-turbo); everything else through Pillow.
"""

import contextlib
import io
from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from losa_scenic.dataset_lib.sources import BadImage

Image.init()  # Else the first threads that meet a rare format would do it at the same time.
# Pillow's names; a JPEG of several pictures, as phones write them, calls itself 'MPO'.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF')
EXTENSIONS = ('.jpg', '.jpeg', '.png', '.webp', '.gif', '.bmp', '.tif', '.tiff')
# A small file may claim a huge image: above this number of pixels it is refused before decoding.
MAX_PIXELS = 80_000_000
# JPEG can be decoded at these fractions of its size for less work: the rest is never computed.
REDUCTIONS = (8, 4, 2)
_CV2_FLAGS = {
  1: cv2.IMREAD_COLOR_RGB,
  2: cv2.IMREAD_REDUCED_COLOR_2,
  4: cv2.IMREAD_REDUCED_COLOR_4,
  8: cv2.IMREAD_REDUCED_COLOR_8,
}
_ORIENTATION_TAG = 0x0112
_SIDEWAYS = (5, 6, 7, 8)


class Header(NamedTuple):
  """What the first bytes of an image say.

  Attributes:
    format: one of `FORMATS`, or 'MPO'.
    mode: Pillow's name of the pixel format.
    width: in pixels, upright.
    height: in pixels, upright.
    orientation: EXIF's, 1..8; 1 is upright.
  """

  format: str
  mode: str
  width: int
  height: int
  orientation: int

  @property
  def reducible(self) -> bool:
    """Whether `decode` can reduce it while decoding."""
    return self.format in ('JPEG', 'MPO') and self.mode in ('RGB', 'L')


def read_header(encoded: bytes, name: str) -> Header:
  """Reads the header of an image file.

  Args:
    encoded: a file of one of `FORMATS`.
    name: what to call the image in an error.

  Returns:
    The header.

  Raises:
    BadImage: for empty or too large images and for other formats.
  """
  if not encoded:
    raise BadImage(name, 'the file is empty')
  with _errors_name(name), Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
    width, height = image.size
    if width * height > MAX_PIXELS:
      raise Image.DecompressionBombError(f'{width} x {height} pixels; at most {MAX_PIXELS:,}')
    orientation = _orientation(image)
    if orientation in _SIDEWAYS and image.format != 'TIFF':  # Of TIFF, Pillow's size is upright.
      width, height = height, width
    return Header(image.format or '', image.mode, width, height, orientation)


def decode(
  encoded: bytes, name: str, header: Header | None = None, reduction: int = 1
) -> np.ndarray:
  """Decodes one image by the rule of this module.

  Args:
    encoded: a file of one of `FORMATS`.
    name: what to call the image in an error.
    header: what `read_header` said, if it was asked already.
    reduction: 1, or one of `REDUCTIONS` where the header is `reducible`: each pixel of the result
      is then a mean over a square of that side (taken on the cosine coefficients).

  Returns:
    uint8 [height, width, 3] in 0..255, red first; divided by `reduction`, rounded up.

  Raises:
    BadImage: for empty, truncated, corrupt or too large images and for other formats.
  """
  header = header or read_header(encoded, name)
  if header.reducible:
    flags = _CV2_FLAGS[reduction] | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    if pixels is None:
      raise BadImage(name, 'the image is truncated or corrupt')
    if reduction > 1:  # OpenCV has no flag for reduced and red first.
      pixels = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    return _upright(pixels, header.orientation)
  if reduction != 1:
    raise ValueError(f'{name}: only everyday JPEG can be reduced, not {header}.')
  with _errors_name(name), Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
    if header.mode == 'I' and header.format != 'PNG':  # Old Pillow's name of 16-bit PNG.
      raise ValueError('its samples have 32 bits, whose range nothing says')
    if header.format == 'TIFF':  # Turned by Pillow itself as it is decoded.
      return np.array(_to_rgb(image))
    return _upright(np.array(_to_rgb(image)), header.orientation)


@contextlib.contextmanager
def _errors_name(name: str) -> Iterator[None]:
  """Turns whatever Pillow raises into a `BadImage`."""
  try:
    yield
  except Image.UnidentifiedImageError as error:
    raise BadImage(name, 'not a JPEG, PNG, WebP, GIF, BMP or TIFF image') from error
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
    raise BadImage(name, f'too large an image ({error})') from error
  except MemoryError:
    raise  # Not the image's fault.
  # Broken files make Pillow raise nearly anything: OSError, SyntaxError, struct.error, IndexError.
  except Exception as error:
    raise BadImage(name, f'the image cannot be read ({error})') from error


def _orientation(image: Image.Image) -> int:
  """The EXIF orientation, 1 if there is none; a damaged EXIF block says nothing about pixels."""
  try:
    value = image.getexif().get(_ORIENTATION_TAG, 1)
  except Exception:
    return 1
  return value if value in range(1, 9) else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
  """Undoes an EXIF orientation."""
  if orientation in _SIDEWAYS:
    pixels = pixels.transpose(1, 0, 2)
  if orientation in (3, 4, 7, 8):
    pixels = pixels[::-1]
  if orientation in (2, 3, 6, 7):
    pixels = pixels[:, ::-1]
  return np.ascontiguousarray(pixels)


def _to_rgb(image: Image.Image) -> Image.Image:
  if image.mode == 'F':
    raise ValueError('its samples are floating-point numbers, whose range nothing says')
  if image.mode.startswith('I'):  # 16-bit grey; Pillow's own conversion would clip at 255.
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert('RGB')
  if image.has_transparency_data:
    white = Image.new('RGBA', image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert('RGBA')).convert('RGB')
  return image.convert('RGB')
