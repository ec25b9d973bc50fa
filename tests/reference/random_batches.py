"""Batches of noise, and what draws their augmentation."""

import numpy as np

from losa_scenic.dataset_lib import augment

SIDE = 24


def images(count: int = 8, seed: int = 0, side: int = SIDE) -> np.ndarray:
  """uint8 [count, side, side, 3], uniform, that cannot be written to."""
  array = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
  array.flags.writeable = False
  return array


def rngs(count: int, seed: int = 0, epoch: int = 0) -> list[np.random.Generator]:
  """The generators of the first images of an epoch."""
  return [augment.generator(seed, epoch, i) for i in range(count)]
