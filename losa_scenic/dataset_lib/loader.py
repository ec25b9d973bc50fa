"""Positions in, batches out: reads, decodes, crops, augments; a pure function of its arguments.

What a slot of a batch shows depends on (seed, epoch, position) alone, never on the batch around it,
on threads or on processes. An image that cannot be read is replaced, in training, by the next one
that can, so that the batches before and after it stay what they were; in evaluation its slot is
masked, so that no image counts twice.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from multiprocessing import connection
from typing import Any

import cv2
import numpy as np

from losa_scenic.dataset_lib import augment as augment_lib
from losa_scenic.dataset_lib import decode, resize
from losa_scenic.dataset_lib.bad_files import Problem
from losa_scenic.dataset_lib.cache import Cache
from losa_scenic.dataset_lib.sources import BadImage, Record, Source

_CORES = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
_THREADS = min(16, _CORES)
# A reduced image keeps this many pixels per pixel that is wanted: shrinking twice costs detail.
_SPARE = 1.25
cv2.setNumThreads(0)  # Threads work on whole images here; OpenCV's own would only fight with them.
_pool: futures.ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


class Loader:
  """Makes batches of one split.

  Attributes:
    source: the images.
    view: what of an image is shown.
    augment: what is drawn at random.
    split: 'train', 'valid' or 'test', for messages.
    bad: position -> problem, of the images that this process found unreadable.
  """

  def __init__(
    self,
    source: Source,
    view: resize.View,
    *,
    augment: augment_lib.Augment | None = None,
    seed: int = 0,
    split: str = 'train',
    max_bad_fraction: float = 0.0,
    cache_bytes: int = 0,
  ) -> None:
    """Reads nothing yet.

    Args:
      source: at least one image.
      view: what of an image is shown where nothing is augmented.
      augment: what is drawn at random; None for nothing.
      seed: of the augmentation.
      split: 'train', 'valid' or 'test'.
      max_bad_fraction: with more unreadable images than this share of the split, no replacements
        are looked for any more.
      cache_bytes: keep decoded images in memory if those of the split fit into this many bytes.
    """
    self.source, self.view, self.split = source, view, split
    self.augment = augment or augment_lib.Augment()
    self.bad: dict[int, Problem] = {}
    self._seed, self._allowed_bad = seed, int(max_bad_fraction * len(source))
    self._cache = Cache(len(source), None if self.augment.crops else view.image_size, cache_bytes)

  def __setstate__(self, state: dict[str, Any]) -> None:
    """Unpickles; in a loader process, sees to it that the process ends with its parent."""
    self.__dict__.update(state)
    _end_with_parent()

  def batch(
    self, indices: np.ndarray, epochs: np.ndarray, count: int | None = None
  ) -> dict[str, Any]:
    """The batch at these positions.

    Args:
      indices: integers [b] in [0, len(source)).
      epochs: how often the split was gone through before, per image; integers [b].
      count: length of the batch: the slots after the b images are zeros and masked. None for b.

    Returns:
      'inputs' uint8 [count, s, s, 3], 'label' int32 [count], 'batch_mask' float32 [count], 'index'
      int32 [count] (-1 where masked). Where images are mixed, also 'partner_label' int32 [count]
      and 'label_share' float32 [count], the share of 'label'. Where images were bad, also
      'problems', a list of `Problem`: all that were met, also in looking for replacements.
    """
    count, size = len(indices) if count is None else count, self.view.image_size
    labels, mask = np.zeros(count, np.int32), np.zeros(count, np.float32)
    mask[: len(indices)] = 1.0
    index = np.full(count, -1, np.int32)
    index[: len(indices)] = indices
    met: set[int] = set()
    plain = not self.augment.active and count == len(indices)
    images = self._cache.gather(indices) if plain else None
    if images is not None:
      labels[:] = self._cache.labels[indices]
    else:
      images = np.empty((count, size, size, 3), np.uint8)
      images[len(indices) :] = 0

      def load(slot: int) -> None:
        shown = self._load(int(indices[slot]), int(epochs[slot]), met)
        if shown is None:
          images[slot], mask[slot], index[slot] = 0, 0.0, -1
        else:
          images[slot], labels[slot] = shown

      parallel(load, len(indices))
    batch = {'inputs': images, 'label': labels, 'batch_mask': mask, 'index': index}
    if self.augment.mixes:
      # A stream of its own: how many draws an image took must not matter to its mixing.
      rngs = [
        augment_lib.generator(self._seed, int(epoch), int(i), 1)
        for epoch, i in zip(epochs, indices, strict=True)
      ]
      mixed = augment_lib.mix(self.augment, rngs, images, labels)
      batch |= {
        'inputs': mixed.images,
        'partner_label': mixed.partner_labels,
        'label_share': mixed.share,
      }
    return batch | ({'problems': [self.bad[i] for i in sorted(met)]} if met else {})

  def _load(self, index: int, epoch: int, met: set[int]) -> tuple[np.ndarray, int] | None:
    """What stands at a position: its image, in training the next readable one, or None.

    Positions of images that could not be read are added to `met`.
    """
    for other in range(index, index + len(self.source)):
      other %= len(self.source)
      if other not in self.bad:
        try:
          return self._show(other, epoch)
        except BadImage as error:
          self.bad[other] = Problem(self.split, other, error.id, error.reason)
      met.add(other)
      # With too many of them the run ends as soon as it hears of it: no use to look further.
      if self.split != 'train' or len(self.bad) > self._allowed_bad:
        break
    return None

  def _show(self, index: int, epoch: int) -> tuple[np.ndarray, int]:
    if not self.augment.active:
      return self._viewed(index)
    rng = augment_lib.generator(self._seed, epoch, index)
    image, label = self._cropped(index, rng) if self.augment.crops else self._viewed(index)
    return augment_lib.apply(self.augment, rng, image), label

  def _viewed(self, index: int) -> tuple[np.ndarray, int]:
    image, label = self._cache.get(index)
    if image is None:
      record = self.source[index]
      pixels, label = _decoded(record), record.label
      box = self.view.box(*pixels.shape[:2])
      image = resize.resize(pixels, self.view.image_size, self.view.interpolation, box)
      self._cache.put(index, image, label)
    return image, label

  def _cropped(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    pixels, label = self._cache.get(index)
    if pixels is None:
      record = self.source[index]
      label = record.label
      if isinstance(record.image, bytes):
        header = decode.read_header(record.image, record.id)
        # Not a matter of the cache: what is shown must not depend on what was kept.
        if header.reducible and is_large(header.height, header.width, self.view.image_size):
          return self._cropped_file(record.image, record.id, header, rng), label
        pixels = decode.decode(record.image, record.id, header)
      else:
        pixels = record.image
      self._cache.put(index, pixels, label)
    height, width = pixels.shape[:2]
    box = augment_lib.random_crop(rng, height, width, self.augment.min_crop_area)
    size = self.view.image_size
    return resize.resize(pixels, size, self.augment.interpolation, box), label

  def _cropped_file(
    self, encoded: bytes, name: str, header: decode.Header, rng: np.random.Generator
  ) -> np.ndarray:
    """A random crop of a large JPEG, of which no more detail is decoded than the crop needs."""
    box = augment_lib.random_crop(rng, header.height, header.width, self.augment.min_crop_area)
    enough = min(box.height, box.width) / (_SPARE * self.view.image_size)
    reduction = next((r for r in decode.REDUCTIONS if r <= enough), 1)
    pixels = decode.decode(encoded, name, header, reduction)
    box = _reduced(box, reduction, pixels.shape)
    return resize.resize(pixels, self.view.image_size, self.augment.interpolation, box)


_watch: threading.Thread | None = None


def _end_with_parent() -> None:
  """In a process made by `multiprocessing`: ends it when the one that made it is gone.

  A killed run could not tell its loader processes, which would wait for ever.
  """
  global _watch
  parent = multiprocessing.parent_process()
  if parent is None or _watch is not None:
    return

  def watch() -> None:
    connection.wait([parent.sentinel])
    os._exit(1)

  _watch = threading.Thread(target=watch, name='end with parent', daemon=True)
  _watch.start()


def _decoded(record: Record) -> np.ndarray:
  if isinstance(record.image, np.ndarray):
    return record.image
  return decode.decode(record.image, record.id)


def _reduced(box: resize.Box, reduction: int, shape: Sequence[int]) -> resize.Box:
  """The box in an image that was decoded at 1 / reduction of its size."""
  if reduction == 1:
    return box
  top, left = box.top // reduction, box.left // reduction
  bottom = min(shape[0], -(-(box.top + box.height) // reduction))
  right = min(shape[1], -(-(box.left + box.width) // reduction))
  return resize.Box(top, left, bottom - top, right - left)


def is_large(height: int, width: int, image_size: int) -> bool:
  """Whether a JPEG of this size is decoded at a fraction of it where a random crop allows that."""
  return min(height, width) >= min(decode.REDUCTIONS) * _SPARE * image_size


def parallel(work: Callable[[int], object], count: int) -> None:
  """Calls `work(0)` ... `work(count - 1)` in a few threads; decoders let go of the interpreter.

  Args:
    work: a function of a position; its result is dropped.
    count: number of calls.

  Raises:
    Exception: what a failing position raised, one of them if there are several.
  """
  global _pool
  if count < 2 or _THREADS < 2:
    for position in range(count):
      work(position)
    return
  with _pool_lock:
    _pool = _pool or futures.ThreadPoolExecutor(_THREADS, 'decode')
  waiting = [_pool.submit(_some, work, range(k, count, _THREADS)) for k in range(_THREADS)]
  try:
    for future in waiting:
      future.result()
  finally:
    for future in waiting:
      future.cancel()


def _some(work: Callable[[int], object], positions: Sequence[int]) -> None:
  for position in positions:
    work(position)
