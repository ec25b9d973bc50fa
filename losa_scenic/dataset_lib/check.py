"""Reads every image of a data set once, and says what is in it and what is wrong with it.

Memory is 40 bytes an image and the names of what is wrong, so that a million images are no matter.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import augment as augment_lib
from losa_scenic.dataset_lib import decode, repeats, resize
from losa_scenic.dataset_lib.bad_files import Problem
from losa_scenic.dataset_lib.check_report import (
  ASPECTS,
  NAMED,
  SHORT_SIDES,
  Image,
  Part,
  Reading,
  Repeat,
  Report,
)
from losa_scenic.dataset_lib.loader import Loader, is_large
from losa_scenic.dataset_lib.sources import BadImage, Source, Splits

_CHUNK = 32  # images that a thread reads in a row: sets in one file are read forwards
_SAMPLE_IMAGES, _SAMPLE_SECONDS = 1024, 2.0


class _Facts:
  """What is kept of each image of one or more splits.

  Attributes:
    digest: uint64 [n, 2].
    label: int32 [n]; -1 where the image cannot be read.
    size: width and height, int32 [n, 2].
    bytes: int64 [n].
    kind: int16 [n], positions in `kinds`.
    rotated: bool [n].
  """

  def __init__(self, count: int) -> None:
    self.digest = np.zeros((count, 2), np.uint64)
    self.label = np.full(count, -1, np.int32)
    self.size = np.zeros((count, 2), np.int32)
    self.bytes = np.zeros(count, np.int64)
    self.kind = np.zeros(count, np.int16)
    self.rotated = np.zeros(count, bool)
    self.kinds: dict[str, int] = {}
    self._lock = threading.Lock()

  def read(self, source: Source, index: int, place: int) -> None:
    """Reads and decodes an image, and notes it at a place.

    Raises:
      BadImage: if it cannot be read.
    """
    record = source[index]
    if isinstance(record.image, np.ndarray):
      (height, width), kind, rotated = record.image.shape[:2], 'pixels RGB', False
      size = record.image.nbytes
    else:
      header = decode.read_header(record.image, record.id)
      # All of the compressed data is gone through at any reduction, so it fails or not alike.
      reduction = max(decode.REDUCTIONS) if header.reducible else 1
      decode.decode(record.image, record.id, header, reduction)
      width, height, rotated = header.width, header.height, header.orientation != 1
      size, kind = len(record.image), f'{header.format} {header.mode}'
    with self._lock:
      self.kind[place] = self.kinds.setdefault(kind, len(self.kinds))
    self.digest[place] = repeats.digest(record.image)
    self.size[place], self.bytes[place], self.rotated[place] = (width, height), size, rotated
    self.label[place] = record.label  # Last: the image is fine.


def check(
  splits: Splits,
  name: str,
  view: resize.View,
  *,
  augment: augment_lib.Augment | None = None,
  cache_bytes: int = 0,
  expected: Mapping[str, str] | None = None,
  jobs: int | None = None,
  progress: Callable[[int], object] = lambda images: None,
) -> Report:
  """Reads every image of every split once.

  Args:
    splits: the data set.
    name: its name.
    view: what the model is shown, for measuring the time of an epoch.
    augment: what is drawn at random, for the same.
    cache_bytes: what the loader may keep in memory.
    expected: what is no trouble in this set, see `Report`.
    jobs: number of threads to read with; None for one per core.
    progress: is told how many more images were read, from several threads.

  Returns:
    The report. Of each kind of repeat up to `NAMED` are named; the counts are exact.

  Raises:
    errors.UserError: for less than one job.
  """
  jobs = (os.cpu_count() or 1) if jobs is None else jobs
  if jobs < 1:
    raise errors.UserError(f'--jobs must be at least 1, not {jobs}.')
  parts = {'train': splits.train, 'valid': splits.valid, 'test': splits.test}
  parts = {part: source for part, source in parts.items() if source is not None}
  ends = np.cumsum([len(source) for source in parts.values()])
  facts, began = _Facts(int(ends[-1])), time.monotonic()
  broken = _read_all(parts, facts, jobs, progress)
  seconds = time.monotonic() - began
  readable = facts.label >= 0
  split = np.repeat(np.arange(len(parts)), np.diff(ends, prepend=0))
  found = repeats.find(facts.digest, split, readable, len(parts))
  differ = facts.label[found.again] != facts.label[found.first]
  names, known = list(parts), readable.nonzero()[0]
  return Report(
    name=name,
    about=splits.about,
    class_names=splits.class_names,
    image_size=view.image_size,
    parts={
      part: _part(facts, slice(end - len(source), end), len(splits.class_names), repeated)
      for (part, source), end, repeated in zip(parts.items(), ends, found.within, strict=True)
    },
    kinds=_kinds(facts, known),
    **_shapes(facts.size[known], view.image_size),
    rotated=int(facts.rotated.sum()),
    broken=tuple(broken),
    leaks={
      (names[a], names[b]): int(found.across[a, b])
      for a, b in zip(*np.nonzero(found.across), strict=True)
    },
    conflicts=int(differ.sum()),
    repeats=_named(found, split, differ, parts, ends, splits.class_names),
    reading=_measure(splits.train, facts, view, augment, cache_bytes, jobs, seconds),
    expected=expected or {},
  )


def _read_all(
  parts: Mapping[str, Source], facts: _Facts, jobs: int, progress: Callable[[int], object]
) -> list[Problem]:
  """Fills the facts; returns what cannot be read, in order."""

  def some(split: str, start: int, offset: int) -> list[Problem]:
    source, bad = parts[split], []
    stop = min(start + _CHUNK, len(source))
    for index in range(start, stop):
      try:
        facts.read(source, index, offset + index)
      except BadImage as error:
        bad.append(Problem(split, index, error.id, error.reason))
    progress(stop - start)
    return bad

  offset, waiting = 0, []
  with futures.ThreadPoolExecutor(jobs, 'check') as pool:
    try:
      for split, source in parts.items():
        waiting += [pool.submit(some, split, i, offset) for i in range(0, len(source), _CHUNK)]
        offset += len(source)
      return [problem for future in waiting for problem in future.result()]
    finally:
      pool.shutdown(wait=False, cancel_futures=True)


def _part(facts: _Facts, where: slice, num_classes: int, repeated: int) -> Part:
  labels = facts.label[where]
  counts = np.bincount(labels[labels >= 0], minlength=num_classes)
  return Part(
    images=len(labels),
    broken=int((labels < 0).sum()),
    bytes=int(facts.bytes[where].sum()),
    duplicates=int(repeated),
    class_counts=tuple(counts.tolist()),
  )


def _kinds(facts: _Facts, known: np.ndarray) -> dict[str, int]:
  counts = np.bincount(facts.kind[known], minlength=len(facts.kinds)).tolist()
  by_count = sorted(facts.kinds.items(), key=lambda item: -counts[item[1]])
  return {kind: counts[number] for kind, number in by_count}


def _shapes(sizes: np.ndarray, image_size: int) -> dict[str, Any]:
  """What the report says of widths and heights [n, 2]."""
  short, aspect = sizes.min(axis=1), sizes[:, 0] / sizes[:, 1]
  order = np.argsort(short, kind='stable')
  chosen = sizes[order[[0, len(order) // 2, -1]]] if len(order) else ()

  def counted(values: np.ndarray, ends: Sequence[float]) -> tuple[int, ...]:
    buckets = np.searchsorted(ends, values, side='right')
    return tuple(np.bincount(buckets, minlength=len(ends) + 1).tolist())

  return {
    'distinct_sizes': len(np.unique(sizes, axis=0)),
    'sizes': tuple((int(width), int(height)) for width, height in chosen),
    'short_sides': counted(short, SHORT_SIDES),
    'aspects': counted(aspect, ASPECTS),
    'enlarged': int((short < image_size).sum()),
  }


def _named(
  found: repeats.Repeats,
  split: np.ndarray,
  differ: np.ndarray,
  parts: Mapping[str, Source],
  ends: np.ndarray,
  class_names: Sequence[str],
) -> tuple[Repeat, ...]:
  """Up to `NAMED` repeats of each kind; what matters most first."""
  leak = split[found.again] != split[found.first]
  kinds = (differ, leak & ~differ, ~leak & ~differ)
  chosen = [np.flatnonzero(kind)[:NAMED] for kind in kinds]

  def image(place: int) -> Image:
    part = list(parts)[split[place]]
    index = place - int(ends[split[place]]) + len(parts[part])
    record = parts[part][index]
    return Image(part, index, record.id, class_names[record.label])

  return tuple(
    Repeat(image(int(found.again[i])), image(int(found.first[i]))) for i in np.concatenate(chosen)
  )


def _measure(
  train: Source,
  facts: _Facts,
  view: resize.View,
  augment: augment_lib.Augment | None,
  cache_bytes: int,
  jobs: int,
  check_seconds: float,
) -> Reading | None:
  """Makes batches of a sample of the training images."""
  readable = np.flatnonzero(facts.label[: len(train)] >= 0)
  if not len(readable):
    return None
  sample = np.random.default_rng(0).permutation(readable)[:_SAMPLE_IMAGES]
  loader = Loader(train, view, augment=augment)
  size = max(2, min(64, len(sample) // 4))
  loader.batch(sample[:size], np.zeros(len(sample[:size]), int))  # What is slow only once.
  done, began = 0, time.monotonic()
  while done < len(sample) and time.monotonic() - began < _SAMPLE_SECONDS:
    batch = sample[done : done + size]
    loader.batch(batch, np.zeros(len(batch), int))
    done += len(batch)
  rate = done / max(time.monotonic() - began, 1e-9)
  crops = augment is not None and augment.crops
  sizes = facts.size[readable].astype(np.int64)
  large = np.array([crops and is_large(w, h, view.image_size) for w, h in sizes.tolist()], bool)
  pixels = sizes[~large].prod(axis=1).sum() if crops else len(train) * view.image_size**2
  return Reading(
    cores=os.cpu_count() or 1,
    jobs=jobs,
    check_seconds=check_seconds,
    sample=done,
    images_per_second=rate,
    epoch_seconds=len(train) / rate,
    decoded_bytes=int(pixels) * 3,
    decoded_anew=int(large.sum()),
    cache_bytes=cache_bytes,
  )
