"""Images that occur more than once, found by a digest of their content."""

import hashlib
from typing import NamedTuple

import numpy as np


class Repeats(NamedTuple):
  """Who repeats whom; positions run through all splits, one after another.

  Attributes:
    again: positions [r] of the images that were there before, ascending.
    first: positions [r] of the first image with the same content.
    within: number of images of each split that repeat one of the same split, [splits].
    across: [splits, splits]; entry (a, b) with a < b counts the images of b that are in a too.
  """

  again: np.ndarray
  first: np.ndarray
  within: np.ndarray
  across: np.ndarray


def digest(image: bytes | np.ndarray) -> np.ndarray:
  """What identifies an image: uint64 [2] of the encoded bytes, or of shape and pixels."""
  content = hashlib.blake2b(digest_size=16)
  if isinstance(image, np.ndarray):
    content.update(repr(image.shape).encode())
    content.update(np.ascontiguousarray(image).data)
  else:
    content.update(image)
  return np.frombuffer(content.digest(), np.uint64)


def find(digests: np.ndarray, split: np.ndarray, readable: np.ndarray, splits: int) -> Repeats:
  """Finds repeated images.

  Args:
    digests: uint64 [n, 2], see `digest`.
    split: the split of each image, integers [n] in [0, splits), ascending.
    readable: bool [n]; the others are left out.
    splits: number of splits.

  Returns:
    The repeats; with the memory of a few integers per image.
  """
  # The sort is stable: among equal images the order of the splits stays.
  order = np.flatnonzero(readable)
  order = order[np.lexsort((digests[order, 1], digests[order, 0]))]
  same = np.zeros(len(order), bool)
  same[1:] = (digests[order[1:]] == digests[order[:-1]]).all(axis=1)
  start = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
  group, of_split = np.cumsum(~same) - 1, split[order]
  in_split = same.copy()
  in_split[1:] &= of_split[1:] == of_split[:-1]
  within = np.bincount(of_split[in_split], minlength=splits)
  across = np.zeros((splits, splits), int)
  for a in range(splits):
    has = np.zeros(len(order), bool)
    has[group[of_split == a]] = True
    across[a] = np.bincount(of_split[has[group]], minlength=splits)
  again, first = order[same], order[start[same]]
  ascending = np.argsort(again)
  return Repeats(again[ascending], first[ascending], within, np.triu(across, 1))
