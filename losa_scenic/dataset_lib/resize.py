"""Resizing and cropping: how an image of any size becomes the square that a backbone reads.

The names of interpolations are Pillow's filters, antialiased when they shrink, and three more:

  area         the mean over each new pixel's square, as OpenCV has it; bicubic where a side grows.
  fast         nearly `area` in half the time, for augmented training, where an exact filter matters
               least: bilinear to twice the size that is wanted, then means of 2 x 2; bilinear alone
               where an image hardly shrinks, bicubic where a side grows.
  bilinear_tf  bilinear without antialiasing, as `tf.image.resize`: for comparing with results that
               were made on TFDS (the original VTAB, VPT). Rounded to integers here, not there.
"""

import dataclasses
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from losa_scenic.common_lib import errors
from losa_scenic.model_lib.spec import CHOICES

PILLOW = {name: Image.Resampling[name.upper()] for name in CHOICES['interpolation']}
INTERPOLATIONS = (*PILLOW, 'area', 'fast', 'bilinear_tf')
# How much `fast` shrinks the longer side at most: in one step, in two, and where the other grows.
_ONE_STEP, _TWO_STEPS, _WITH_GROWTH = 1.25, 2.7, 1.4


class Box(NamedTuple):
  """A rectangle of whole pixels inside an image."""

  top: int
  left: int
  height: int
  width: int


@dataclasses.dataclass(frozen=True)
class View:
  """What of an image is shown, and how large, when nothing is augmented.

  Attributes:
    image_size: side of the result in pixels.
    interpolation: one of `INTERPOLATIONS`.
    central_crop: None for the whole image, its aspect ratio not kept (the protocol of VTAB-1k);
      else the central square whose side is this share, in (0, 1], of the shorter side (0.875 is
      what most ImageNet evaluations take).
  """

  image_size: int
  interpolation: str = 'bicubic'
  central_crop: float | None = None

  def __post_init__(self):
    """Raises `UserError` for values out of range."""
    errors.one_of('interpolation', self.interpolation, INTERPOLATIONS)
    if self.central_crop is not None and not 0 < self.central_crop <= 1:
      raise errors.UserError(f'central_crop must be in (0, 1], not {self.central_crop}.')

  def box(self, height: int, width: int) -> Box:
    """The part of an image of this size that is shown."""
    if self.central_crop is None:
      return Box(0, 0, height, width)
    side = max(1, round(self.central_crop * min(height, width)))
    return Box((height - side) // 2, (width - side) // 2, side, side)


def resize(
  image: np.ndarray, image_size: int, interpolation: str = 'bicubic', box: Box | None = None
) -> np.ndarray:
  """Cuts a box out of an image and makes it a square.

  Args:
    image: uint8 [h, w, 3].
    image_size: side of the result in pixels.
    interpolation: one of `INTERPOLATIONS`.
    box: the part that is shown; None for the whole image.

  Returns:
    uint8 [image_size, image_size, 3]; never a view of `image`.

  Raises:
    errors.UserError: for an unknown interpolation.
  """
  errors.one_of('interpolation', interpolation, INTERPOLATIONS)
  if box is not None:
    image = image[box.top : box.top + box.height, box.left : box.left + box.width]
  size = (image_size, image_size)
  if image.shape[:2] == size:
    return image.copy()
  if interpolation == 'bilinear_tf':
    resized = cv2.resize(image.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
    return np.rint(resized).astype(np.uint8)
  if interpolation == 'fast':
    return _fast(image, image_size)
  if interpolation == 'area':
    if min(image.shape[:2]) >= image_size:
      return cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    interpolation = 'bicubic'
  return np.array(Image.fromarray(image).resize(size, PILLOW[interpolation]))


def _fast(image: np.ndarray, image_size: int) -> np.ndarray:
  """See the module: the factors were measured against exact means and Lanczos' filter."""
  size = (image_size, image_size)
  shrinks = max(image.shape[:2]) / image_size
  if min(image.shape[:2]) < image_size:
    if shrinks > _WITH_GROWTH:  # One side shrinks so much that it has to be antialiased.
      return np.array(Image.fromarray(image).resize(size, PILLOW['bicubic']))
    return cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)
  if shrinks > _TWO_STEPS:
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)
  if shrinks > _ONE_STEP:
    twice = cv2.resize(image, (2 * image_size, 2 * image_size), interpolation=cv2.INTER_LINEAR)
    return cv2.resize(twice, size, interpolation=cv2.INTER_AREA)
  return cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
