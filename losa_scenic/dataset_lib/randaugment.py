"""RandAugment and the colour operations, on images uint8 [h, w, 3] of any size, red first.

Cubuk et al. 2020, https://arxiv.org/abs/1909.13719, with the 14 operations of torchvision, each
drawn alike, one image possibly getting one twice. A level in [0, 1] is the paper's magnitude 0..10
divided by 10; signed operations get -level half of the time:

  identity, autocontrast, equalize           no strength
  rotate                                     30 level degrees, about the centre       signed
  shear_x, shear_y                           0.3 level, the top left corner stays     signed
  translate_x, translate_y                   150/331 level of the side, whole pixels  signed
  brightness, color, contrast, sharpness     factor 1 + 0.9 level                     signed
  posterize                                  keeps 8 - round(4 level) bits
  solarize                                   inverts values of at least 255 (1 - level)

torchvision counts the same range in 31 steps: its magnitude 30 is 10 here, and its default of 9
is 3 here. timm's 'rand-m9-inc1' counts to 10 as here. Nearest neighbour, and black where nothing
was, as torchvision's defaults.

Every operation gives what Pillow gives, bit for bit, but that color (`saturation`) and sharpness
differ by 1 in about one value of a thousand. Each is done by the faster of OpenCV and Pillow.
"""

from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

# Pillow's weights of red, green and blue in a grey, and 1/2 for rounding, in units of 2^-16. All
# sums are below 2^24: exact in float32, in any order.
_GREY = np.array([[19595, 38470, 7471, 32768]], np.float32)
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
_VALUES = np.arange(256, dtype=np.float32)


class Operation(NamedTuple):
  """An operation of RandAugment.

  Attributes:
    run: (image, level) -> a new image of the same shape, or the same image.
    signed: whether the level is in [-1, 1] or in [0, 1].
  """

  run: Callable[[np.ndarray, float], np.ndarray]
  signed: bool


def randaugment(
  rng: np.random.Generator, image: np.ndarray, count: int, magnitude: float
) -> np.ndarray:
  """Applies random operations, one after another.

  Args:
    rng: decides which.
    image: uint8 [h, w, 3]; not modified.
    count: how many.
    magnitude: of all of them, in [0, 10].

  Returns:
    uint8 [h, w, 3]; `image` itself if nothing was to be done.
  """
  for _ in range(count):
    operation = _DRAWN[rng.integers(len(_DRAWN))]
    sign = -1 if operation.signed and rng.random() < 0.5 else 1
    image = operation.run(image, sign * magnitude / 10)
  return image


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
  """Blends an image with black: factor 0 is black, 1 the image, more is brighter."""
  return cv2.LUT(image, _blend_table(0, factor))


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
  """Blends an image with the mean of its greys: factor 0 is that grey, 1 the image."""
  grey = _grey(image)
  return cv2.LUT(image, _blend_table(int(cv2.sumElems(grey)[0] / grey.size + 0.5), factor))


def saturation(image: np.ndarray, factor: float) -> np.ndarray:
  """Blends an image with its greys: factor 0 is grey, 1 the image, more is more colourful."""
  return _blend(cv2.cvtColor(_grey(image), cv2.COLOR_GRAY2RGB), image, factor)


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
  """Blends an image with its blur: factor 0 is blurred, 1 the image, more is sharper."""
  blurred = cv2.filter2D(image, -1, _SMOOTH)
  for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):  # Pillow leaves them as they are.
    blurred[edge] = image[edge]
  return _blend(blurred, image, factor)


def autocontrast(image: np.ndarray) -> np.ndarray:
  """Stretches the values of each channel to 0..255; a channel of one value stays."""
  tables = []
  for counts in _histograms(image):
    used = np.flatnonzero(counts)
    low, high = int(used[0]), int(used[-1])
    scale = 255 / (high - low) if high > low else 1.0
    offset = -low * scale if high > low else 0.0
    tables.append(np.clip(_VALUES.astype(np.float64) * scale + offset, 0, 255).astype(np.uint8))
  return _look_up(image, tables)


def equalize(image: np.ndarray) -> np.ndarray:
  """Makes the values of each channel about equally frequent."""
  tables = []
  for counts in _histograms(image):
    used = np.flatnonzero(counts)
    step = (int(counts.sum()) - int(counts[used[-1]])) // 255
    if not step:
      tables.append(np.arange(256, dtype=np.uint8))
      continue
    before = np.cumsum(counts) - counts
    tables.append(np.minimum((before + step // 2) // step, 255).astype(np.uint8))
  return _look_up(image, tables)


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
  """Keeps the `bits` highest bits, 1..8, of each value."""
  return np.bitwise_and(image, np.uint8(256 - 2 ** (8 - bits)))


def solarize(image: np.ndarray, threshold: float) -> np.ndarray:
  """Inverts the values that are at least the threshold."""
  return cv2.LUT(image, np.where(threshold > _VALUES, _VALUES, 255 - _VALUES).astype(np.uint8))


def rotate(image: np.ndarray, degrees: float) -> np.ndarray:
  """Turns an image about its centre, counter-clockwise."""
  return np.array(Image.fromarray(image).rotate(degrees))


def shear(image: np.ndarray, x: float, y: float) -> np.ndarray:
  """Takes each pixel from `x` times its row to the right and `y` times its column further down."""
  size = image.shape[1], image.shape[0]
  affine = Image.Transform.AFFINE
  return np.array(Image.fromarray(image).transform(size, affine, (1.0, x, 0.0, y, 1.0, 0.0)))


def translate(image: np.ndarray, right: int, down: int) -> np.ndarray:
  """Moves an image by less than its size."""
  height, width = image.shape[:2]
  moved = np.zeros_like(image)
  moved[max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)] = image[
    max(0, -down) : height - max(0, down), max(0, -right) : width - max(0, right)
  ]
  return moved


# Name -> operation.
OPERATIONS = {
  'identity': Operation(lambda image, level: image, False),
  'autocontrast': Operation(lambda image, level: autocontrast(image), False),
  'equalize': Operation(lambda image, level: equalize(image), False),
  'rotate': Operation(lambda image, level: rotate(image, 30 * level), True),
  'solarize': Operation(lambda image, level: solarize(image, 255 - 255 * level), False),
  'color': Operation(lambda image, level: saturation(image, 1 + 0.9 * level), True),
  'posterize': Operation(lambda image, level: posterize(image, 8 - round(4 * level)), False),
  'contrast': Operation(lambda image, level: contrast(image, 1 + 0.9 * level), True),
  'brightness': Operation(lambda image, level: brightness(image, 1 + 0.9 * level), True),
  'sharpness': Operation(lambda image, level: sharpness(image, 1 + 0.9 * level), True),
  'shear_x': Operation(lambda image, level: shear(image, 0.3 * level, 0), True),
  'shear_y': Operation(lambda image, level: shear(image, 0, 0.3 * level), True),
  'translate_x': Operation(
    lambda image, level: translate(image, int(150 / 331 * level * image.shape[1]), 0), True
  ),
  'translate_y': Operation(
    lambda image, level: translate(image, 0, int(150 / 331 * level * image.shape[0])), True
  ),
}
_DRAWN = tuple(OPERATIONS.values())


def _grey(image: np.ndarray) -> np.ndarray:
  """Pillow's grey of each pixel, uint8 [h, w]."""
  return (cv2.transform(image.astype(np.float32), _GREY) * np.float32(2**-16)).astype(np.uint8)


def _blend_table(base: int, factor: float) -> np.ndarray:
  """base + factor * (value - base) for all values, cut to 0..255 and rounded down as by Pillow."""
  return np.clip(base + np.float32(factor) * (_VALUES - base), 0, 255).astype(np.uint8)


def _blend(base: np.ndarray, image: np.ndarray, factor: float) -> np.ndarray:
  """base + factor * (image - base), cut to 0..255 and rounded down as by Pillow.

  OpenCV rounds to the nearest, hence the -1/2; the rest keeps what is an integer but for rounding
  errors, e.g. greys, from falling by 1.
  """
  return cv2.addWeighted(image, factor, base, 1 - factor, -0.5 + 2**-13)


def _histograms(image: np.ndarray) -> np.ndarray:
  """How often each value is in each channel, int64 [3, 256]."""
  counts = [cv2.calcHist([image], [c], None, [256], [0, 256]).ravel() for c in range(3)]
  return np.stack(counts).astype(np.int64)


def _look_up(image: np.ndarray, tables: list[np.ndarray]) -> np.ndarray:
  """Maps each channel by its own table uint8 [256]."""
  return cv2.LUT(image, np.stack(tables, axis=-1)[None])
