"""Sprites: white shapes on black with known factors, drawn on demand in the manner of dSprites.

The factors are those of dSprites (Matthey et al. 2017, https://github.com/google-deepmind/dsprites-dataset):
3 shapes x 6 scales x 40 orientations x 32 x-positions x 32 y-positions = 737,280 images. The labels
are those of VTAB (Zhai et al. 2019, https://arxiv.org/abs/1910.04867): x-position or orientation in
16 bins, floor(16 value / number of values). Deviations: edges are antialiased, images are drawn at
the size asked for, and orientation 39 is 351 degrees (dSprites repeats 0 degrees at the end).

As in dSprites a square looks the same after a quarter turn and an ellipse after half a turn. So no
method can pass (1/4 + 1/2 + 1) / 3 = 58 % on 'orientation'; on 'x_position' 100 % is possible.
"""

import functools

import cv2
import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import sources

SHAPES = ('square', 'ellipse', 'heart')
# Number of values of: shape, scale, orientation, x-position, y-position.
FACTOR_SIZES = (len(SHAPES), 6, 40, 32, 32)
NUM_IMAGES = int(np.prod(FACTOR_SIZES))
NUM_BINS = 16
# label -> column of the factors.
LABELS = {'orientation': 2, 'x_position': 3}
# Shapes are drawn this many times larger, then averaged over squares of pixels.
_SUPERSAMPLING = 4
# Bits behind the point in OpenCV's polygon corners.
_SHIFT = 4


def splits(
  *,
  image_size: int,
  label: str = 'x_position',
  num_train: int = 800,
  num_val: int = 200,
  num_test: int = 1000,
  seed: int = 0,
) -> sources.Splits:
  """Draws a sample of the sprites, no two of them with the same factors.

  Args:
    image_size: side of the images in pixels.
    label: 'x_position' or 'orientation'; 16 classes either way.
    num_train: number of training images.
    num_val: number of validation images; 0 for no validation split.
    num_test: number of test images.
    seed: which images are drawn, at least 0.

  Returns:
    The images in memory.

  Raises:
    errors.UserError: for an unknown label, or for more images than there are.
  """
  column = LABELS[errors.one_of("label of dataset 'sprites'", label, LABELS)]
  counts = {'num_train': num_train, 'num_val': num_val, 'num_test': num_test, 'seed': seed}
  for option, value in counts.items():
    errors.check_at_least(option, value, 0)
  if num_train + num_val + num_test > NUM_IMAGES:
    raise errors.UserError(
      f'num_train + num_val + num_test = {num_train + num_val + num_test:,} is more than the '
      f'{NUM_IMAGES:,} sprites there are.'
    )
  # RandomState, unlike default_rng, promises the same numbers in every numpy version.
  chosen = np.random.RandomState(seed).permutation(NUM_IMAGES)

  def source(start: int, count: int) -> sources.ArraySource:
    indices = chosen[start : start + count]
    rows = factors(indices)
    labels = bins(rows[:, column], FACTOR_SIZES[column])
    return sources.ArraySource(
      render(rows, image_size), labels, 'sprites', num_classes=NUM_BINS, numbers=indices
    )

  return sources.Splits(
    train=source(0, num_train),
    valid=source(num_train, num_val) if num_val else None,
    test=source(num_train + num_val, num_test),
    class_names=tuple(f'{label}_{number}' for number in range(NUM_BINS)),
  )


def factors(indices: np.ndarray) -> np.ndarray:
  """Factors of sprites by number.

  Args:
    indices: integers [n] in [0, NUM_IMAGES).

  Returns:
    int64 [n, 5]: shape, scale, orientation, x-position, y-position, each from 0 on.
  """
  return np.stack(np.unravel_index(indices, FACTOR_SIZES), axis=-1)


def bins(values: np.ndarray, num_values: int) -> np.ndarray:
  """VTAB's rule: `floor(value / (num_values / 16))`, in integers.

  Args:
    values: integers [n] in [0, num_values).
    num_values: number of values of the factor.

  Returns:
    int32 [n] in [0, 16).
  """
  return (np.asarray(values) * NUM_BINS // num_values).astype(np.int32)


def render(rows: np.ndarray, image_size: int) -> np.ndarray:
  """Draws sprites.

  The centre of gravity moves over the middle half of the image in both directions; the largest
  shape reaches 0.22 image sides from it, so none is ever cut off. Orientations are counted
  clockwise.

  Args:
    rows: integers [n, 5], see `factors`.
    image_size: side of the images in pixels.

  Returns:
    uint8 [n, image_size, image_size, 3].
  """
  scale = 0.5 + 0.5 * rows[:, 1] / (FACTOR_SIZES[1] - 1)
  angle = 2 * np.pi * rows[:, 2] / FACTOR_SIZES[2]
  centre = 0.25 + 0.5 * rows[:, 3:] / (np.array(FACTOR_SIZES[3:]) - 1)
  return draw(rows[:, 0], scale, angle, centre, image_size)


def draw(
  shapes: np.ndarray, scale: np.ndarray, angle: np.ndarray, centre: np.ndarray, image_size: int
) -> np.ndarray:
  """Draws sprites at any place; what is outside the image is cut off.

  Args:
    shapes: integers [n], positions in `SHAPES`.
    scale: [n]; 1 reaches 0.22 image sides from the centre of gravity.
    angle: [n], clockwise, in radians.
    centre: of gravity, x (to the right) and y (down) in image sides, [n, 2].
    image_size: side of the images in pixels.

  Returns:
    uint8 [n, image_size, image_size, 3].
  """
  outlines = _outlines()
  # Row vectors times the transposed rotation; y points down, so this turns clockwise.
  turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
  turn = turn.transpose(2, 0, 1) * scale[:, None, None]

  large = image_size * _SUPERSAMPLING
  images = np.empty((len(shapes), image_size, image_size, 3), np.uint8)
  for i, shape in enumerate(shapes):
    corners = (outlines[shape] @ turn[i] + centre[i]) * large - 0.5
    canvas = np.zeros((large, large), np.uint8)
    corners = np.round(corners * 2**_SHIFT).astype(np.int32)
    cv2.fillPoly(canvas, [corners], 255, shift=_SHIFT)
    small = cv2.resize(canvas, (image_size, image_size), interpolation=cv2.INTER_AREA)
    images[i] = small[..., None]
  return images


@functools.cache
def _outlines() -> list[np.ndarray]:
  """Corners [k, 2] of each shape at scale 1, in image sides around the centre of gravity."""
  side = 0.22 / np.sqrt(2)
  square = side * np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
  t = np.linspace(0, 2 * np.pi, 128, endpoint=False)
  ellipse = np.stack([0.22 * np.cos(t), 0.11 * np.sin(t)], axis=-1)
  height = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
  heart = np.stack([16 * np.sin(t) ** 3, -height], axis=-1)
  heart -= _centre_of_gravity(heart)
  heart *= 0.22 / np.linalg.norm(heart, axis=-1).max()
  return [square, ellipse, heart]


def _centre_of_gravity(corners: np.ndarray) -> np.ndarray:
  following = np.roll(corners, -1, axis=0)
  cross = corners[:, 0] * following[:, 1] - following[:, 0] * corners[:, 1]
  return ((corners + following) * cross[:, None]).sum(0) / (3 * cross.sum())
