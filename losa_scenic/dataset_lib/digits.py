"""Handwritten digits: the 1,797 real 8x8 images of scikit-learn's `load_digits` (no download).

They are the test part of the UCI set "Optical Recognition of Handwritten Digits" (Alpaydin and
Kaynak, https://doi.org/10.24432/C50P49). The split into 800 training, 200 validation and 797 test
images, the sizes of VTAB-1k, is ours: fixed, and with equal class shares in all parts.
"""

import numpy as np
from sklearn import datasets as sklearn_datasets

from losa_scenic.dataset_lib import sources

NUM_TRAIN = 800
NUM_VALID = 200
NUM_CLASSES = 10


def splits() -> sources.Splits:
  """Loads the digits as RGB images of 8x8 pixels (ink white on black).

  Returns:
    800 / 200 / 797 images in memory.
  """
  digits = sklearn_datasets.load_digits()
  grey = np.round(digits.images * (255 / 16)).astype(np.uint8)  # The set counts ink as 0..16.
  images = np.repeat(grey[..., None], 3, axis=-1)
  order = _stratified_order(digits.target)
  parts = np.split(order, [NUM_TRAIN, NUM_TRAIN + NUM_VALID])
  train, valid, test = (
    sources.ArraySource(
      images[part], digits.target[part], 'digits', num_classes=NUM_CLASSES, numbers=part
    )
    for part in parts
  )
  return sources.Splits(train, valid, test, tuple(str(digit) for digit in range(NUM_CLASSES)))


def _stratified_order(labels: np.ndarray) -> np.ndarray:
  """An order of the images [n] in which every stretch holds the classes in equal shares."""
  # RandomState, unlike default_rng, promises the same numbers in every numpy version.
  shuffled = np.random.RandomState(0).permutation(len(labels))
  share = np.zeros(len(labels))
  for label in range(NUM_CLASSES):
    members = shuffled[labels[shuffled] == label]
    share[members] = (np.arange(len(members)) + 0.5) / len(members)
  return np.lexsort((labels, share))
