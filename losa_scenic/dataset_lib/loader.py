"""Positions in, batches out: reads, decodes, crops, augments; a pure function of its arguments.

What a slot of a batch shows depends on (seed, epoch, position) alone, never on the batch around it,
on threads or on processes. An image that cannot be read is replaced, in training, by the next one
that can, so that the batches before and after it stay what they were; in evaluation its slot is
masked, so that no image counts twice.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from multiprocessing import connection
from typing import Any

import cv2
import numpy as np

from losa_scenic.dataset_lib import augment as augment_lib
from losa_scenic.dataset_lib import mixing, resize, sources
from losa_scenic.dataset_lib.bad_files import Problem
from losa_scenic.dataset_lib.clip_reader import ClipReader, Sampling
from losa_scenic.dataset_lib.image_reader import ImageReader
from losa_scenic.dataset_lib.sources import BadImage, Source

_CORES = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
_THREADS = min(16, _CORES)
# In sentences: 'training image 12'.
_SPLITS = {'train': 'training', 'valid': 'validation', 'test': 'test'}
cv2.setNumThreads(0)  # Threads work on whole images here; OpenCV's own would only fight with them.
_pool: futures.ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


class Loader:
  """Makes batches of one split.

  Attributes:
    source: the images or clips.
    augment: what is drawn at random.
    split: 'train', 'valid' or 'test'.
    bad: position -> problem, of the images that this process found unreadable.
  """

  def __init__(
    self,
    source: Source,
    view: resize.View,
    *,
    sampling: Sampling | None = None,
    augment: augment_lib.Augment | None = None,
    seed: int = 0,
    split: str = 'train',
    max_bad_fraction: float = 0.0,
    cache_bytes: int = 0,
  ) -> None:
    """Reads nothing yet.

    Args:
      source: at least one image or clip.
      view: what of an image is shown where nothing is augmented.
      sampling: which frames of a clip are shown; None for images.
      augment: what is drawn at random; None for nothing.
      seed: of the augmentation and of the windows of clips.
      split: 'train', 'valid' or 'test'.
      max_bad_fraction: with more unreadable images than this share of the split, no replacements
        are looked for any more.
      cache_bytes: keep decoded images in memory if those of the split fit into this many bytes.
    """
    self.source, self.split = source, split
    self.augment = augment or augment_lib.Augment()
    self.bad: dict[int, Problem] = {}
    self._reading: dict[int, tuple[int, float]] = {}  # thread -> position, since when
    self._what = f'{_SPLITS.get(split, split)} {"image" if sampling is None else "clip"}'
    self._seed, self._allowed_bad = seed, int(max_bad_fraction * len(source))
    self._reader: ImageReader | ClipReader
    if sampling is None:
      self._reader = ImageReader(source, view, self.augment, seed, cache_bytes)
    else:
      self._reader = ClipReader(
        source, view, sampling, self.augment, split=split, seed=seed, cache_bytes=cache_bytes
      )

  def __getstate__(self) -> dict[str, Any]:
    """Pickles without what threads of this process are reading."""
    return {**self.__dict__, '_reading': {}}

  def __setstate__(self, state: dict[str, Any]) -> None:
    """Unpickles; in a loader process, sees to it that the process ends with its parent alone."""
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
      'inputs' uint8 [count, s, s, 3] ([count, t, s, s, 3] of clips, [count, v, t, s, s, 3] of
      several views of them), 'label' int32 [count], 'batch_mask' float32 [count], 'index'
      int32 [count] (-1 where masked). Where images are mixed, also 'partner_label' int32 [count]
      and 'label_share' float32 [count], the share of 'label'. Where images were bad, also
      'problems', a list of `Problem`: all that were met, also in looking for replacements.
    """
    count = len(indices) if count is None else count
    labels, mask = np.zeros(count, np.int32), np.zeros(count, np.float32)
    mask[: len(indices)] = 1.0
    index = np.full(count, -1, np.int32)
    index[: len(indices)] = indices
    met: set[int] = set()
    kept = self._reader.gather(indices) if count == len(indices) else None
    if kept is not None:
      images, labels = kept
    else:
      images = np.empty((count, *self._reader.shape), np.uint8)
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
      mixed = mixing.mix(self.augment, rngs, images, labels)
      batch |= {
        'inputs': mixed.images,
        'partner_label': mixed.partner_labels,
        'label_share': mixed.share,
      }
    return batch | ({'problems': [self.bad[i] for i in sorted(met)]} if met else {})

  def reading(self) -> list[str]:
    """What threads of this process are reading now, those first that have taken longest.

    Safe to call from any thread, at any time.

    Returns:
      Lines as 'training image 5123 (a/b.jpg), for 130 s'; without the name where the image would
      have to be read to know it.
    """
    now, lines = time.monotonic(), []
    for index, since in sorted(self._reading.values(), key=lambda item: item[1]):
      name = sources.name(self.source, index)
      shown = f' ({name})' if name else ''
      lines.append(f'{self._what} {index}{shown}, for {now - since:.0f} s')
    return lines

  def _load(self, index: int, epoch: int, met: set[int]) -> tuple[np.ndarray, int] | None:
    """What stands at a position: its image, in training the next readable one, or None.

    Positions of images that could not be read are added to `met`.
    """
    for other in range(index, index + len(self.source)):
      other %= len(self.source)
      if other not in self.bad or not self._reader.lasting:
        self._reading[threading.get_ident()] = other, time.monotonic()
        try:
          return self._reader.show(other, epoch)
        except BadImage as error:
          self.bad[other] = Problem(self.split, other, error.id, error.reason)
        finally:
          del self._reading[threading.get_ident()]
      met.add(other)
      # With too many of them the run ends as soon as it hears of it: no use to look further.
      if self.split != 'train' or len(self.bad) > self._allowed_bad:
        break
    return None


_watch: threading.Thread | None = None


def _end_with_parent() -> None:
  """In a process made by `multiprocessing`: ends it when the one that made it is gone, or says so.

  A killed run could not tell its loader processes, which would wait for ever. A run that is asked
  to stop still needs them for its last step, but the signal often goes to the whole group.
  """
  global _watch
  parent = multiprocessing.parent_process()
  if parent is None or _watch is not None:
    return
  if threading.current_thread() is threading.main_thread():
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, signal.SIG_IGN)

  def watch() -> None:
    connection.wait([parent.sentinel])
    os._exit(1)

  _watch = threading.Thread(target=watch, name='end with parent', daemon=True)
  _watch.start()


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
