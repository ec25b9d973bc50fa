"""Reads every image or clip of a data set once, and says what is in it and what is wrong with it.

Of a clip every frame is decoded: nothing less shows that all of them can be. Memory is 40 bytes an
image (55 a clip) and the names of what is wrong, so that a million images are no matter.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import augment as augment_lib
from losa_scenic.dataset_lib import repeats, resize
from losa_scenic.dataset_lib.bad_files import Problem
from losa_scenic.dataset_lib.check_facts import Facts
from losa_scenic.dataset_lib.check_report import (
  ASPECTS,
  NAMED,
  SHORT_SIDES,
  Clips,
  Image,
  Part,
  Reading,
  Repeat,
  Report,
)
from losa_scenic.dataset_lib.clip_reader import Sampling
from losa_scenic.dataset_lib.image_reader import is_large
from losa_scenic.dataset_lib.loader import Loader
from losa_scenic.dataset_lib.sources import BadImage, Source, Splits

# Images or clips that a thread reads in a row: sets in one file are read forwards.
_CHUNK, _CLIP_CHUNK = 32, 8
_SAMPLE_IMAGES, _SAMPLE_SECONDS = 1024, 2.0
_BATCH, _CLIP_BATCH = 64, 8


def check(
  splits: Splits,
  name: str,
  view: resize.View,
  *,
  sampling: Sampling | None = None,
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
    sampling: which frames of clips, for the same; None for images, or if it is not known.
    augment: what is drawn at random, for the same.
    cache_bytes: what the loader may keep in memory.
    expected: what is no trouble in this set, see `Report`.
    jobs: number of threads to read with; None for one per core.
    progress: is told how many more images were read, from several threads.

  Returns:
    The report. Of each kind of repeat up to `NAMED` are named; the counts are exact.

  Raises:
    errors.UserError: for less than one job, or for clips that cannot be sampled in this way.
  """
  jobs = (os.cpu_count() or 1) if jobs is None else jobs
  if jobs < 1:
    raise errors.UserError(f'--jobs must be at least 1, not {jobs}.')
  parts = {'train': splits.train, 'valid': splits.valid, 'test': splits.test}
  parts = {part: source for part, source in parts.items() if source is not None}
  ends = np.cumsum([len(source) for source in parts.values()])
  facts, began = Facts(int(ends[-1]), splits.clips, sampling), time.monotonic()
  broken = _read_all(parts, facts, jobs, progress, _CLIP_CHUNK if splits.clips else _CHUNK)
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
    reading=_measure(splits, facts, view, augment, cache_bytes, jobs, seconds),
    expected=expected or {},
    clips=_clips(facts, known) if splits.clips else None,
  )


def _read_all(
  parts: Mapping[str, Source],
  facts: Facts,
  jobs: int,
  progress: Callable[[int], object],
  chunk: int,
) -> list[Problem]:
  """Fills the facts; returns what cannot be read, in order."""

  def some(split: str, start: int, offset: int) -> list[Problem]:
    source, bad = parts[split], []
    stop = min(start + chunk, len(source))
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
        waiting += [pool.submit(some, split, i, offset) for i in range(0, len(source), chunk)]
        offset += len(source)
      return [problem for future in waiting for problem in future.result()]
    finally:
      pool.shutdown(wait=False, cancel_futures=True)


def _part(facts: Facts, where: slice, num_classes: int, repeated: int) -> Part:
  labels = facts.label[where]
  counts = np.bincount(labels[labels >= 0], minlength=num_classes)
  return Part(
    images=len(labels),
    broken=int((labels < 0).sum()),
    bytes=int(facts.bytes[where].sum()),
    duplicates=int(repeated),
    class_counts=tuple(counts.tolist()),
  )


def _kinds(facts: Facts, known: np.ndarray) -> dict[str, int]:
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


def _clips(facts: Facts, known: np.ndarray) -> Clips:
  frames, rates = facts.frames[known], facts.rate[known]
  timed = rates > 0
  names, counts = np.unique([f'{rate:.2f}' for rate in rates[timed]], return_counts=True)
  order = np.argsort(-counts, kind='stable')
  sampling = facts.sampling
  return Clips(
    frames=tuple(int(number) for number in _spread(frames)),
    seconds=tuple(float(number) for number in _spread(frames[timed] / rates[timed])),
    frame_rates={f'{float(names[i]):g}': int(counts[i]) for i in order},
    varying=int(facts.varying[known].sum()),
    sampling=None if sampling is None else dataclasses.asdict(sampling),
    short=None if sampling is None else int(facts.short[known].sum()),
  )


def _spread(values: np.ndarray) -> np.ndarray:
  """The smallest, the median and the largest; nothing of nothing."""
  ordered = np.sort(values)
  return ordered[[0, len(ordered) // 2, -1]] if len(ordered) else ordered


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
  splits: Splits,
  facts: Facts,
  view: resize.View,
  augment: augment_lib.Augment | None,
  cache_bytes: int,
  jobs: int,
  check_seconds: float,
) -> Reading | None:
  """Makes batches of a sample of the training images or clips."""
  train, sampling = splits.train, facts.sampling
  if splits.clips and sampling is None:
    return None
  readable = np.flatnonzero(facts.label[: len(train)] >= 0)
  if not len(readable):
    return None
  sample = np.random.default_rng(0).permutation(readable)[:_SAMPLE_IMAGES]
  loader = Loader(train, view, sampling=sampling, augment=augment)
  size = max(2, min(_CLIP_BATCH if splits.clips else _BATCH, len(sample) // 4))
  loader.batch(sample[:size], np.zeros(len(sample[:size]), int))  # What is slow only once.
  done, began = 0, time.monotonic()
  while done < len(sample) and time.monotonic() - began < _SAMPLE_SECONDS:
    batch = sample[done : done + size]
    loader.batch(batch, np.zeros(len(batch), int))
    done += len(batch)
  rate = done / max(time.monotonic() - began, 1e-9)
  crops = augment is not None and augment.crops
  sizes = facts.size[readable].astype(np.int64)
  large = np.zeros(len(sizes), bool)
  if splits.clips:  # Kept are all frames of those that are not stored as pixels.
    stored = facts.kind[readable] != facts.kinds.get('pixels RGB', -1)
    pixels = (sizes.prod(axis=1) * facts.frames[readable])[stored].sum()
  elif crops:
    large = np.array([is_large(w, h, view.image_size) for w, h in sizes.tolist()], bool)
    pixels = sizes[~large].prod(axis=1).sum()
  else:
    pixels = len(train) * view.image_size**2
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
