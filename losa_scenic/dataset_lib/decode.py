"""Encoded image bytes to square uint8 RGB arrays: one rule for every image data set.

JPEG, PNG and WebP are read with Pillow; of an animation the first frame. The steps, in this order:
  1. the EXIF orientation is applied, so that a photo stands as its viewer shows it;
  2. 1-bit, grey, palette and CMYK images become RGB; 16-bit samples keep their high byte;
     transparent pixels are laid over white; embedded colour profiles are not applied;
  3. the whole image (no crop, aspect ratio not kept) is resized with a filter of Pillow's, which is
     antialiased when it shrinks. Bicubic unless the backbone was pretrained with another: the
     published VTAB-1k numbers of most adapter papers were made with it.
"""

import contextlib
import io
import os
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps

from losa_scenic.common_lib import errors
from losa_scenic.model_lib.spec import CHOICES

FORMATS = ('JPEG', 'PNG', 'WEBP')
# A small file may claim a huge image: above this number of pixels it is refused before decoding.
MAX_PIXELS = 80_000_000
INTERPOLATIONS = {name: Image.Resampling[name.upper()] for name in CHOICES['interpolation']}


def decode(
  encoded: bytes, name: str, image_size: int, interpolation: str = 'bicubic'
) -> np.ndarray:
  """Decodes one image by the rule of this module.

  Args:
    encoded: a JPEG, PNG or WebP file.
    name: what to call the image in an error: its path, or pack and position.
    image_size: side of the result in pixels.
    interpolation: a key of `INTERPOLATIONS`.

  Returns:
    uint8 [image_size, image_size, 3] in 0..255, red first.

  Raises:
    errors.UserError: for an unknown interpolation, for empty, truncated, corrupt or too large
      images and for other formats; of an image the message starts with `name`.
  """
  if not encoded:
    raise errors.UserError(f'{name}: the file is empty.')
  with _errors_name(name), Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
    _check_pixels(image)
    ImageOps.exif_transpose(image, in_place=True)
    return _resize(_to_rgb(image), image_size, interpolation)


def check_header(path: str | os.PathLike[str]) -> None:
  """Checks cheaply, from its first bytes, that a file is an image that `decode` may read.

  Args:
    path: the file.

  Raises:
    errors.UserError: if it is not, naming the file.
  """
  with _errors_name(str(path)):
    if not os.path.getsize(path):
      raise errors.UserError(f'{path}: the file is empty.')
    with Image.open(path, formats=FORMATS) as image:
      _check_pixels(image)


def resize(image: np.ndarray, image_size: int, interpolation: str = 'bicubic') -> np.ndarray:
  """Resizes an array with the filter of `decode`.

  Args:
    image: uint8 [h, w, 3].
    image_size: side of the result in pixels.
    interpolation: a key of `INTERPOLATIONS`.

  Returns:
    uint8 [image_size, image_size, 3].

  Raises:
    errors.UserError: for an unknown interpolation.
  """
  return _resize(Image.fromarray(image), image_size, interpolation)


@contextlib.contextmanager
def _errors_name(name: str) -> Iterator[None]:
  """Turns whatever Pillow raises into a `UserError` that starts with `name`."""
  try:
    yield
  except errors.UserError:
    raise
  except Image.UnidentifiedImageError as error:
    raise errors.UserError(f'{name}: not a JPEG, PNG or WebP image.') from error
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
    raise errors.UserError(f'{name}: too large an image ({error}).') from error
  # Broken files make Pillow raise nearly anything: OSError, SyntaxError, struct.error, IndexError.
  except Exception as error:
    raise errors.UserError(f'{name}: the image cannot be read ({error}).') from error


def _check_pixels(image: Image.Image) -> None:
  width, height = image.size
  if width * height > MAX_PIXELS:
    raise Image.DecompressionBombError(f'{width} x {height} pixels; at most {MAX_PIXELS:,}')


def _to_rgb(image: Image.Image) -> Image.Image:
  if image.mode.startswith('I'):  # 16-bit grey; Pillow's own conversion would clip at 255.
    high_byte = np.clip(np.asarray(image), 0, 65535).astype(np.uint16) >> 8
    return Image.fromarray(high_byte.astype(np.uint8)).convert('RGB')
  if image.has_transparency_data:
    white = Image.new('RGBA', image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert('RGBA')).convert('RGB')
  return image.convert('RGB')


def _resize(image: Image.Image, image_size: int, interpolation: str) -> np.ndarray:
  errors.one_of('interpolation', interpolation, INTERPOLATIONS)
  if image.size != (image_size, image_size):
    image = image.resize((image_size, image_size), INTERPOLATIONS[interpolation])
  return np.array(image)
