"""The batches of a split: pure functions of their number, made ahead of time."""

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from losa_scenic.common_lib import types
from losa_scenic.dataset_lib import sources
from losa_scenic.dataset_lib.bad_files import BadFiles
from losa_scenic.dataset_lib.loader import Loader
from losa_scenic.dataset_lib.pipeline import Pipeline

# Two threads keep one batch in the making while another is handed over; each decodes its images in
# a pool of threads, see `loader`.
_THREADS, _BUFFER, _PER_WORKER_BUFFER = 2, 4, 2
# Batches of clips are large: those that wait take no more than this, but for one of each maker.
_WAITING_BYTES = 10**9


class Batches:
  """The batches of a split by number; see `Loader.batch` for what they hold.

  Attributes:
    pipeline: the Grain data set.
    bad_files: where images that could not be read are listed.
    workers: number of processes that `iterate` loads with; 0 for threads.
  """

  def __init__(
    self, pipeline: grain.MapDataset, bad_files: BadFiles, workers: int = 0, batch_bytes: int = 1
  ) -> None:
    """Keeps them; `batch_bytes` is the size of a batch of this host."""
    self.pipeline, self.bad_files, self.workers = pipeline, bad_files, workers
    self._many = _WAITING_BYTES // batch_bytes

  def __len__(self) -> int:
    """Number of batches; of training, practically without end."""
    return len(self.pipeline)

  def __getitem__(self, number: int) -> types.Batch:
    """The batch of that number."""
    return self._listed(self.pipeline[number])

  def iterate(self, start: int, stop: int | None) -> Iterator[types.Batch]:
    """Yields the batches from `start` on, made ahead of time; see `dataset_utils.iterate`."""
    part = self.pipeline[start:stop]
    if self.workers:
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's processes read flags of its own; ours are apart.
      buffer = max(1, min(_PER_WORKER_BUFFER, self._many // self.workers))
      batches = part.to_iter_dataset(grain.ReadOptions(1, buffer)).mp_prefetch(
        grain.MultiprocessingOptions(self.workers, per_worker_buffer_size=buffer)
      )
    else:
      buffer = max(1, min(_BUFFER, self._many))
      batches = part.to_iter_dataset(grain.ReadOptions(min(_THREADS, buffer), buffer))
    iterator = iter(batches)
    try:
      for batch in iterator:
        yield self._listed(batch)
    finally:
      iterator.close()

  def _listed(self, batch: Any) -> dict[str, Any]:
    """The batch without its problems, which go to the list."""
    self.bad_files.add(batch.pop('problems', ()))
    # From loader processes arrays come in shared memory, which is freed when nobody holds them.
    return {key: np.array(value) for key, value in batch.items()} if self.workers else batch


def _loader(source: sources.Source, pipeline: Pipeline, split: str, workers: int) -> Loader:
  return Loader(
    source,
    pipeline.view,
    sampling=pipeline.sampling,
    augment=pipeline.augment if split == 'train' else None,
    seed=pipeline.shuffle_seed,
    split=split,
    max_bad_fraction=pipeline.max_bad_fraction,
    cache_bytes=_cache_bytes(pipeline, split, workers),
  )


def _cache_bytes(pipeline: Pipeline, split: str, workers: int) -> int:
  if workers:
    return 0  # Every process would keep images of its own.
  if pipeline.sampling is not None and split == 'test':
    return 0  # Whole clips would be decoded, and of most runs they are shown once.
  return int(pipeline.cache_gigabytes * 1e9)


def train_pipeline(source: sources.Source, pipeline: Pipeline) -> grain.MapDataset:
  """Training batches without end: one fresh permutation of the images per epoch, across batches.

  Args:
    source: at least one image.
    pipeline: what becomes of them.

  Returns:
    What `Batches` takes; see `Loader.batch`. Images are this host's.
  """
  loader = _loader(source, pipeline, 'train', pipeline.workers)
  count, size = len(source), pipeline.batch_size // pipeline.hosts
  mine = slice(pipeline.host * size, (pipeline.host + 1) * size)

  def batch(positions: np.ndarray) -> types.Batch:
    number, index = positions[mine].T
    return _converted(loader.batch(index, number // count), pipeline.dtype_str)

  order = grain.MapDataset.range(count).seed(pipeline.shuffle_seed).shuffle().repeat(None)
  numbered = order.map_with_index(lambda number, index: (number, index))
  return numbered.batch(pipeline.batch_size, batch_fn=np.asarray).map(batch)


def eval_pipeline(source: sources.Source, pipeline: Pipeline, split: str) -> grain.MapDataset:
  """Every image once, in order, the last batch filled up.

  Args:
    source: at least one image.
    pipeline: what becomes of them; nothing is augmented.
    split: 'valid' or 'test'.

  Returns:
    What `Batches` takes; see `Loader.batch`. Images are this host's.
  """
  loader = _loader(source, pipeline, split, workers=0)
  count, size = len(source), pipeline.eval_batch_size // pipeline.hosts

  def batch(number: int) -> types.Batch:
    start = number * pipeline.eval_batch_size + pipeline.host * size
    indices = np.arange(start, max(start, min(start + size, count)))
    loaded = loader.batch(indices, np.zeros(len(indices), int), size)
    return _converted(loaded, pipeline.dtype_str)

  return grain.MapDataset.range(-(-count // pipeline.eval_batch_size)).map(batch)


def _converted(batch: dict[str, Any], dtype_str: str) -> dict[str, Any]:
  if dtype_str == 'float32':
    scaled = batch['inputs'].astype(np.float32)
    scaled /= 127.5
    scaled -= 1.0
    # What is masked is zero in every dtype.
    scaled[batch['batch_mask'] == 0] = 0.0
    batch = batch | {'inputs': scaled}
  return batch
