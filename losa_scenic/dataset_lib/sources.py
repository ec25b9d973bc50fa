"""Random access to labelled images: in memory, in files, or several sources one after another.

A source answers for a whole batch of positions at once, so that a set held in memory costs one
gather per batch and not one Python call per image (google/grain#1164).
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Protocol

import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import decode

_DECODE_THREADS = min(8, os.cpu_count() or 1)


class Source(Protocol):
  """Labelled images by position."""

  @property
  def ids(self) -> Sequence[str]:
    """One name per image, for messages."""
    ...

  def __len__(self) -> int:
    """Number of images."""
    ...

  def fetch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels at these positions, as new arrays.

    Args:
      indices: integers [b] in [0, len(self)).

    Returns:
      images uint8 [b, h, w, 3] and labels int32 [b].
    """
    ...


@dataclasses.dataclass(frozen=True)
class Splits:
  """The three parts of a data set.

  Attributes:
    train: images to train on.
    valid: images to choose settings with; None if the set has none.
    test: images to report on.
    class_names: one name per class, in the order of the labels.
  """

  train: Source
  valid: Source | None
  test: Source
  class_names: tuple[str, ...]


class ArraySource:
  """Images held in memory.

  Attributes:
    images: uint8 [n, h, w, 3].
    labels: int32 [n] in [0, num_classes).
    ids: n names.
  """

  def __init__(
    self, images: np.ndarray, labels: np.ndarray, ids: Sequence[str], *, num_classes: int
  ) -> None:
    """Checks and keeps the arrays, without copying the images.

    Args:
      images: uint8 [n, h, w, 3].
      labels: integers [n] in [0, num_classes).
      ids: n names.
      num_classes: number of classes.

    Raises:
      errors.UserError: for a label out of range, naming the image.
      ValueError: for shapes or types that do not fit.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
      raise ValueError(f'Images must be uint8 [n, h, w, 3], not {images.dtype} {images.shape}.')
    self.images = images
    self.labels = _checked_labels(labels, ids, len(images), num_classes)
    self.ids = ids

  def __len__(self) -> int:
    """Number of images."""
    return len(self.images)

  def fetch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """See `Source.fetch`."""
    # `take` copies rows three times as fast as `images[indices]`.
    return self.images.take(indices, axis=0), self.labels.take(indices)


class FileSource:
  """Images in files, decoded each time they are fetched.

  Attributes:
    paths: the files.
    labels: int32 [n] in [0, num_classes).
    ids: the files' names in messages.
    image_size: side of the decoded images in pixels.
    interpolation: how they are resized.
  """

  def __init__(
    self,
    paths: Sequence[str | os.PathLike[str]],
    labels: Sequence[int] | np.ndarray,
    image_size: int,
    *,
    num_classes: int,
    interpolation: str = 'bicubic',
  ) -> None:
    """Keeps the paths; opens nothing.

    Args:
      paths: n image files of the formats of `decode`.
      labels: integers [n] in [0, num_classes).
      image_size: side of the decoded images in pixels.
      num_classes: number of classes.
      interpolation: a key of `decode.INTERPOLATIONS`.

    Raises:
      errors.UserError: for a label out of range, naming the file.
    """
    self.interpolation = interpolation
    self.paths = [pathlib.Path(path) for path in paths]
    self.ids = [str(path) for path in self.paths]
    self.labels = _checked_labels(labels, self.ids, len(self.paths), num_classes)
    self.image_size = image_size

  def __len__(self) -> int:
    """Number of files."""
    return len(self.paths)

  def fetch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """See `Source.fetch`.

    Raises:
      errors.UserError: for a file that is gone or cannot be decoded, naming it.
    """
    labels = self.labels.take(indices)
    images = np.empty((len(labels), self.image_size, self.image_size, 3), np.uint8)

    def load(position: int) -> None:
      images[position] = self._load(int(indices[position]))

    parallel(load, len(labels))
    return images, labels

  def _load(self, index: int) -> np.ndarray:
    try:
      encoded = self.paths[index].read_bytes()
    except OSError as error:
      raise errors.UserError(f'{self.ids[index]}: cannot be read ({error.strerror}).') from error
    return decode.decode(encoded, self.ids[index], self.image_size, self.interpolation)


class _ConcatSource:
  """Several sources, one after another."""

  def __init__(self, parts: Sequence[Source]) -> None:
    self._parts = tuple(parts)
    self._starts = np.cumsum([0] + [len(part) for part in parts])
    self.ids = [name for part in parts for name in part.ids]

  def __len__(self) -> int:
    return int(self._starts[-1])

  def fetch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    indices = np.asarray(indices)
    if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
      raise IndexError(f'Positions must lie in [0, {len(self)}).')
    of_part = np.searchsorted(self._starts, indices, side='right') - 1
    images, labels = None, np.zeros(len(indices), np.int32)
    for number, part in enumerate(self._parts):
      places = np.flatnonzero(of_part == number)
      if not len(places):
        continue
      found, labels[places] = part.fetch(indices[places] - self._starts[number])
      if images is None:
        images = np.empty((len(indices), *found.shape[1:]), np.uint8)
      images[places] = found
    if images is None:  # No positions: the first part knows the image shape.
      return self._parts[0].fetch(indices)
    return images, labels


def concat(parts: Sequence[Source]) -> Source:
  """Joins sources of the same classes and image size, e.g. training and validation images.

  Args:
    parts: at least one source.

  Returns:
    A source over the images of all parts, in the order of the parts; nothing is copied.

  Raises:
    ValueError: without parts.
  """
  if not parts:
    raise ValueError('concat() needs at least one source.')
  return parts[0] if len(parts) == 1 else _ConcatSource(parts)


def parallel(work: Callable[[int], object], count: int) -> None:
  """Calls `work(0)` ... `work(count - 1)` in a small thread pool.

  Args:
    work: a function of a position; its result is dropped.
    count: number of calls.

  Raises:
    Exception: what the first failing position raised; positions not yet begun are skipped.
  """
  if count < 2 or _DECODE_THREADS < 2:
    for position in range(count):
      work(position)
    return
  with futures.ThreadPoolExecutor(_DECODE_THREADS) as pool:
    for _ in pool.map(work, range(count)):
      pass


def _checked_labels(
  labels: Sequence[int] | np.ndarray, ids: Sequence[str], count: int, num_classes: int
) -> np.ndarray:
  labels = np.asarray(labels, dtype=None if len(labels) else np.int32)
  if labels.shape != (count,) or len(ids) != count or labels.dtype.kind not in 'iu':
    raise ValueError(
      f'{count} images need as many integer labels and ids, not labels {labels.dtype} '
      f'{labels.shape} and {len(ids)} ids.'
    )
  wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
  if len(wrong):
    raise errors.UserError(
      f'{ids[wrong[0]]}: label {labels[wrong[0]]} is outside 0..{num_classes - 1} '
      f'({num_classes} classes).'
    )
  return labels.astype(np.int32)
