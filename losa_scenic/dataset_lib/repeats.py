"""Images or clips that occur more than once, found by a digest of their content."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from losa_scenic.dataset_lib.clip_files import Clip

_BLOCK = 1 << 20  # bytes of a file that are read at a time


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


def digest(image: bytes | np.ndarray | Clip | Sequence[bytes]) -> np.ndarray:
  """What identifies an image or clip.

  Args:
    image: see `sources.Record`.

  Returns:
    uint64 [2] of the encoded bytes, of shape and pixels, or of the file's bytes, the segment
    and the order: two parts of one file differ, also if they overlap.

  Raises:
    OSError: for a file that cannot be read.
  """
  content = hashlib.blake2b(digest_size=16)
  if isinstance(image, np.ndarray):
    content.update(repr(image.shape).encode())
    content.update(np.ascontiguousarray(image).data)
  elif isinstance(image, Clip):
    content.update(repr((*image.segment, image.order)).encode())
    with open(image.path, 'rb') as file:
      while block := file.read(_BLOCK):
        content.update(block)
  elif isinstance(image, bytes):
    content.update(image)
  else:
    content.update(repr([len(frame) for frame in image]).encode())
    for frame in image:
      content.update(frame)
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
