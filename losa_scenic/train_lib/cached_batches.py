"""Batches of stored rows in the place of images; rows that are not there yet are made and kept.

A batch whose rows are all there never touches the image pipeline. For another one all its images
are decoded and encoded, in the slots they have in it, and what was missing is written. Every batch
is then read from the store, also the one that filled it: so training sees the same numbers whether
the store was empty, half full after a kill, or full.
"""

import collections
import concurrent.futures
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Num

from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Batch
from losa_scenic.dataset_lib.bad_files import BadFiles, Problem
from losa_scenic.dataset_lib.batches import Batches
from losa_scenic.train_lib.feature_layout import Layout
from losa_scenic.train_lib.feature_store import Store

# Batches that are made ready while one is in use.
_AHEAD = 2
_TRIES = 3  # to write what can be read again
# XLA uses arrays that start at a multiple of it where they are.
_ALIGNED = 64

Encode = Callable[[Num[np.ndarray, 'b ...']], Num[np.ndarray, 'b items']]


class CachedBatches:
  """What `Batches` offers, with rows [b items] for 'inputs'.

  Row v * n + i is image i of n in view v. An unreadable image has no row: its slot shows what the
  loader shows in its place, which has one.

  Attributes:
    images: the batches of images.
    store: the rows.
  """

  def __init__(
    self, images: Batches, store: Store, layout: Layout, encode: Encode, views: int = 1
  ) -> None:
    """Reads nothing yet.

    Args:
      images: the batches of images.
      store: with `views` rows for each image.
      layout: of a row.
      encode: the rows of a batch of images, on all devices.
      views: in how many views each image is shown; that of an epoch is epoch % views.
    """
    self.images, self.store = images, store
    self._layout, self._encode, self._views = layout, encode, views
    self._count = len(images.loader.source)
    # Rows of images that this process found unreadable.
    self._bad: set[int] = set()

  @property
  def bad_files(self) -> BadFiles:
    """See `Batches`."""
    return self.images.bad_files

  @property
  def workers(self) -> int:
    """See `Batches`."""
    return self.images.workers

  def __len__(self) -> int:
    """See `Batches`."""
    return len(self.images)

  def __getitem__(self, number: int) -> Batch:
    """The batch of that number."""
    return next(self.iterate(number, number + 1))

  def names(self, indices: Sequence[int] | np.ndarray) -> list[str]:
    """See `Batches`."""
    return self.images.names(indices)

  def reading(self) -> list[str]:
    """See `Batches`."""
    return self.images.reading()

  def pictures(self, batch: Batch, slots: Int[np.ndarray, ' k']) -> np.ndarray:
    """The images [k ...] in some slots of a batch, decoded for the occasion."""
    index = np.asarray(batch['index'])[slots]
    return self.images.loader.batch(index, np.zeros(len(index), int))['inputs']

  def iterate(self, start: int, stop: int | None) -> Iterator[Batch]:
    """Yields the batches from `start` on; the next ones are read or decoded in a thread.

    Raises:
      errors.UserError: if too many images cannot be read.
      OSError: if the disk is full or broken.
    """
    stop = len(self) if stop is None else min(stop, len(self))
    promised: set[int] = set()
    pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='features')
    waiting: collections.deque[concurrent.futures.Future] = collections.deque()
    try:
      for number in range(start, stop):
        while len(waiting) <= _AHEAD and number + len(waiting) < stop:
          waiting.append(pool.submit(self._ahead, number + len(waiting), promised))
        # None is ready where the batches before it had to be done first, which they are now.
        ready = waiting.popleft().result() or self._stored(number) or self._images(number)
        yield ready if ready['inputs'].ndim == 2 else self._filled(number, ready)
    finally:
      pool.shutdown(wait=False, cancel_futures=True)

  def _ahead(self, number: int, promised: set[int]) -> dict[str, Any] | None:
    """A batch of rows, else one of images, or None if all that it lacks was promised.

    Args:
      number: of the batch.
      promised: rows that the batches of images before this one bring; those of this one are added.
    """
    rows = self._rows(number)[2]
    lacking = rows[~self.store.whole(rows)]
    if lacking.size and promised.issuperset(lacking.tolist()):
      return None
    stored = None if lacking.size else self._stored(number)
    if stored is not None:
      return stored
    promised.update(rows.tolist())
    return self._images(number)

  def _images(self, number: int) -> dict[str, Any]:
    """The batch of that number from the image pipeline, with its problems."""
    images: Any = self.images.pipeline[number]
    return images

  def _rows(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of what a batch shows the slots [k], the positions [k] and the rows [k]."""
    indices, epochs = self.images.positions(number)
    views = epochs % self._views
    rows, slots = views * self._count + indices, np.arange(len(indices))
    if not self._bad:
      return slots, indices, rows
    if self.images.loader.split == 'train':
      pairs = zip(indices.tolist(), views.tolist(), strict=True)
      return slots, indices, np.array([self._shown(i, v) for i, v in pairs], rows.dtype)
    good = np.array([row not in self._bad for row in rows.tolist()], bool)
    return slots[good], indices[good], rows[good]

  def _shown(self, index: int, view: int) -> int:
    """The row of what training shows at a position: the next readable image from there on."""
    first = view * self._count
    after = (first + i % self._count for i in range(index, index + self._count))
    return next((row for row in after if row not in self._bad), first + index)

  def _stored(self, number: int) -> dict[str, Any] | None:
    """The batch of that number if all its rows are there."""
    slots, indices, rows = self._rows(number)
    return self._read(slots, indices, rows) if self.store.whole(rows).all() else None

  def _read(
    self, slots: np.ndarray, indices: np.ndarray, rows: np.ndarray
  ) -> dict[str, Any] | None:
    """A batch with these rows [k] in these slots [k]; None if one of them is damaged."""
    size = self.images.size
    values = _aligned(size, self.store.row_bytes)
    values[np.setdiff1d(np.arange(size), slots)] = 0
    if not self.store.read(rows, [values[slot] for slot in slots]):
      return None
    label, mask = np.zeros(size, np.int32), np.zeros(size, np.float32)
    index = np.full(size, -1, np.int32)
    label[slots], mask[slots], index[slots] = self.store.labels(rows), 1.0, indices
    inputs = values.view(self._layout.numpy_dtype)
    return {'inputs': inputs, 'label': label, 'batch_mask': mask, 'index': index}

  def _filled(self, number: int, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch of that number, from its images; rows that were missing are kept."""
    problems = batch.pop('problems', ())
    self._note(number, problems)
    self.bad_files.add(problems)
    slots, indices, rows = self._rows(number)
    shown = batch['batch_mask'][slots] > 0
    slots, indices, rows = slots[shown], indices[shown], rows[shown]
    for _ in range(_TRIES):  # A row that is damaged is noticed in reading, and missing then.
      if not self.store.whole(rows).all():
        values = self._encode(batch['inputs']).view(np.uint8)
        for slot, row in zip(slots.tolist(), rows.tolist(), strict=True):
          self.store.write(row, values[slot], int(batch['label'][slot]))
      filled = self._read(slots, indices, rows)
      if filled is not None:
        return filled
    raise errors.UserError(f'{self.store.path}: what is written there is not what is read again.')

  def _note(self, number: int, problems: Sequence[Problem]) -> None:
    """Notes which rows a batch found to be those of unreadable images."""
    bad = {problem.index for problem in problems}
    if not bad:
      return
    indices, epochs = self.images.positions(number)
    for index, view in zip(indices.tolist(), (epochs % self._views).tolist(), strict=True):
      for other in range(index, index + self._count):
        if other % self._count not in bad:
          break
        self._bad.add(view * self._count + other % self._count)


def _aligned(count: int, size: int) -> np.ndarray:
  """Bytes [count size] where XLA can use them without a copy."""
  raw = np.empty(count * size + _ALIGNED, np.uint8)
  start = -raw.ctypes.data % _ALIGNED
  return raw[start : start + count * size].reshape(count, size)
