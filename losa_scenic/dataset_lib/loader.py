"""Positions in, batches out: reads, decodes, crops, augments; a pure function of its arguments.

What a slot of a batch shows depends on (seed, epoch, position) alone, never on the batch around it,
on threads or on processes. An image that cannot be read is replaced, in training, by the next one
that can, so that the batches before and after it stay what they were; in evaluation its slot is
masked, so that no image counts twice.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import cv2
import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import augment as augment_lib
from losa_scenic.dataset_lib import decode, resize
from losa_scenic.dataset_lib.bad_files import Problem
from losa_scenic.dataset_lib.sources import BadImage, Record, Source

_CORES = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
_THREADS = min(16, _CORES)
cv2.setNumThreads(0)  # Threads work on whole images here; OpenCV's own would only fight with them.
_pool: futures.ThreadPoolExecutor | None = None
_lock = threading.Lock()  # of what is made once: the pool, the arrays of caches


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
      max_bad_fraction: more unreadable images than this share of the split end the run.
      cache_bytes: keep decoded images in memory if those of the split fit into this many bytes.
    """
    self.source, self.view, self.split = source, view, split
    self.augment = augment or augment_lib.Augment()
    self.bad: dict[int, Problem] = {}
    self._seed, self._max_bad_fraction = seed, max_bad_fraction
    self._cache = _Cache(len(source), None if self.augment.crops else view.image_size, cache_bytes)

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
      'problems', a list of `Problem`.

    Raises:
      errors.UserError: if too large a share of the split cannot be read.
    """
    count, size = len(indices) if count is None else count, self.view.image_size
    labels, mask = np.zeros(count, np.int32), np.zeros(count, np.float32)
    mask[: len(indices)] = 1.0
    index = np.full(count, -1, np.int32)
    index[: len(indices)] = indices
    plain = not self.augment.active and count == len(indices)
    images = self._cache.gather(indices) if plain else None
    if images is not None:
      labels[:] = self._cache.labels[indices]
    else:
      images = np.empty((count, size, size, 3), np.uint8)
      images[len(indices) :] = 0

      def load(slot: int) -> None:
        shown = self._load(int(indices[slot]), int(epochs[slot]))
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
    problems = [self.bad[i] for i in dict.fromkeys(indices.tolist()) if i in self.bad]
    return batch | ({'problems': problems} if problems else {})

  def _load(self, index: int, epoch: int) -> tuple[np.ndarray, int] | None:
    """What stands at a position: its image, in training the next readable one, or None."""
    for other in range(index, index + len(self.source)):
      other %= len(self.source)
      if other not in self.bad:
        try:
          return self._show(other, epoch)
        except BadImage as error:
          self._mark(other, error)
      if self.split != 'train':
        return None
    raise AssertionError('Too many bad images are an error before all of them are.')

  def _mark(self, index: int, error: BadImage) -> None:
    self.bad[index] = Problem(self.split, index, error.id, error.reason)
    allowed = self._max_bad_fraction * len(self.source)
    if len(self.bad) > allowed:
      raise errors.UserError(
        f'{error} That is unreadable image {len(self.bad)} of the {len(self.source):,} in the '
        f'{self.split} split, and at most {int(allowed)} are allowed '
        f'(dataset_configs.max_bad_fraction = {self._max_bad_fraction:g}).'
      ) from error

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
      if isinstance(record.image, bytes) and not self._cache.open:
        return self._cropped_file(record.image, record.id, rng), label
      pixels = _decoded(record)
      self._cache.put(index, pixels, label)
    height, width = pixels.shape[:2]
    box = augment_lib.random_crop(rng, height, width, self.augment.min_crop_area)
    size = self.view.image_size
    return resize.resize(pixels, size, self.augment.interpolation, box), label

  def _cropped_file(self, encoded: bytes, name: str, rng: np.random.Generator) -> np.ndarray:
    """A random crop of a file, of which no more detail is decoded than the crop needs."""
    header = decode.read_header(encoded, name)
    box = augment_lib.random_crop(rng, header.height, header.width, self.augment.min_crop_area)
    reduction = 1
    if header.reducible:
      enough = min(box.height, box.width) // self.view.image_size
      reduction = next((r for r in decode.REDUCTIONS if r <= enough), 1)
    pixels = decode.decode(encoded, name, header, reduction)
    box = _reduced(box, reduction, pixels.shape)
    return resize.resize(pixels, self.view.image_size, self.augment.interpolation, box)


class _Cache:
  """Decoded images, kept the first time they are made; safe for threads.

  Images of one size are kept in one array, for whole batches at once; others one by one, as long as
  there is room.
  """

  def __init__(self, count: int, image_size: int | None, max_bytes: int) -> None:
    self.labels = np.zeros(count, np.int32)
    self._size, self._room = image_size, max_bytes
    self._images: np.ndarray | dict[int, np.ndarray] | None = {}
    self._kept = np.zeros(count, bool)
    if image_size is not None and count * image_size**2 * 3 > max_bytes:
      self._images = None

  @property
  def open(self) -> bool:
    """Whether another image would be kept."""
    return self._images is not None and self._room > 0

  def get(self, index: int) -> tuple[np.ndarray | None, int]:
    if not self._kept[index] or self._images is None:
      return None, 0
    return self._images[index], int(self.labels[index])

  def put(self, index: int, image: np.ndarray, label: int) -> None:
    if self._images is None or (self._size is None and self._room < image.nbytes):
      self._room = 0
      return
    with _lock:
      if self._size is None:
        self._room -= image.nbytes
      elif not isinstance(self._images, np.ndarray):
        self._images = np.empty((len(self._kept), self._size, self._size, 3), np.uint8)
    self._images[index], self.labels[index] = image, label
    self._kept[index] = True

  def gather(self, indices: np.ndarray) -> np.ndarray | None:
    """The images [b, s, s, 3] as a new array if all are there."""
    if not isinstance(self._images, np.ndarray) or not self._kept[indices].all():
      return None
    # `take` copies rows three times as fast as `images[indices]`.
    return self._images.take(indices, axis=0)


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
  with _lock:
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
