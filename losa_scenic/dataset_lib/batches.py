"""The batches of a split: pure functions of their number, made ahead of time."""

import multiprocessing
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from losa_scenic.common_lib import errors, types
from losa_scenic.dataset_lib import sources
from losa_scenic.dataset_lib.bad_files import BadFiles
from losa_scenic.dataset_lib.loader import Loader
from losa_scenic.dataset_lib.pipeline import Pipeline

# Two threads keep one batch in the making while another is handed over; each decodes its images in
# a pool of threads, see `loader`.
_THREADS, _BUFFER, _PER_WORKER_BUFFER = 2, 4, 2
# Batches of clips are large: those that wait take no more than this, but for one of each maker.
_WAITING_BYTES = 10**9
_RESTARTS = 3  # of the loader processes, at the same batch
# Grain's error where one of its processes is gone, within a second or two, and the processes' name.
_GONE = re.compile(r'Worker process was terminated unexpectedly with exit code (-?\d+)')
_PROCESS = 'grain-process-prefetch'


class Batches:
  """The batches of a split by number; see `Loader.batch` for what they hold.

  Attributes:
    pipeline: the Grain data set.
    loader: what makes them.
    positions: number of a batch -> (positions of its images [k], how often the split was gone
      through before each of them [k]), int64.
    size: slots of a batch of this host; those after the k images are masked.
    bad_files: where images that could not be read are listed.
    workers: number of processes that `iterate` loads with; 0 for threads.
  """

  def __init__(
    self,
    pipeline: grain.MapDataset,
    loader: Loader,
    positions: Callable[[int], tuple[np.ndarray, np.ndarray]],
    size: int,
    bad_files: BadFiles,
    workers: int = 0,
    batch_bytes: int = 1,
  ) -> None:
    """Keeps them; `batch_bytes` is the size of a batch of this host."""
    self.pipeline, self.loader = pipeline, loader
    self.positions, self.size = positions, size
    self.bad_files, self.workers = bad_files, workers
    self._many = _WAITING_BYTES // batch_bytes

  def __len__(self) -> int:
    """Number of batches; of training, practically without end."""
    return len(self.pipeline)

  def __getitem__(self, number: int) -> types.Batch:
    """The batch of that number."""
    return self._listed(self.pipeline[number])

  def iterate(self, start: int, stop: int | None) -> Iterator[types.Batch]:
    """Yields the batches from `start` on, made ahead of time; see `dataset_utils.iterate`.

    Where a loader process is gone, e.g. killed for want of memory, all are started again at the
    next batch. What the loader raises is raised here at once.

    Raises:
      errors.UserError: if that happens again and again at the same batch.
    """
    number, restarts, iterator = start, 0, self._started(start, stop)
    try:
      while True:
        try:
          batch = next(iterator)
        except StopIteration:
          return
        except RuntimeError as error:
          gone = _GONE.match(str(error)) if self.workers else None
          if gone is None:
            raise
          iterator.close()
          # Steps count from 1: the batch of step 41 is batch 41.
          self._say_gone(int(gone[1]), number + 1, restarts)
          restarts, iterator = restarts + 1, self._started(number, stop)
          continue
        number, restarts = number + 1, 0
        yield self._listed(batch)
    finally:
      iterator.close()

  def reading(self) -> list[str]:
    """What is being read now, or the state of the processes that read; from any thread.

    Returns:
      The lines of `Loader.reading`, and with loader processes one line about them: what they read,
      only they know.
    """
    lines = self.loader.reading()
    if self.workers:
      children = multiprocessing.active_children()
      alive = sorted(c.pid or 0 for c in children if c.name.startswith(_PROCESS))
      those = f' (process {", ".join(map(str, alive))})' if alive else ''
      lines.append(f'{len(alive)} of {self.workers} loader processes are alive{those}')
    return lines

  def names(self, indices: Sequence[int] | np.ndarray) -> list[str]:
    """The names of the images or clips at these positions, as `Record.id` has them.

    Args:
      indices: integers [n] in [-1, images of the split), as a batch's 'index'.

    Returns:
      n names; of -1 ''. Images are read only where a source does not know their names before.
    """
    return [self._name(int(index)) if index >= 0 else '' for index in indices]

  def pictures(self, batch: types.Batch, slots: np.ndarray) -> np.ndarray:
    """The inputs [k ...] in some slots [k] of a batch, for people to look at."""
    return batch['inputs'][slots]

  def _name(self, index: int) -> str:
    name = sources.name(self.loader.source, index)
    if name is not None:
      return name
    try:
      return self.loader.source[index].id
    except sources.BadImage as error:
      return error.id

  def _started(self, start: int, stop: int | None) -> grain.DatasetIterator:
    """Grain's iterator over the batches from `start` on."""
    part = self.pipeline[start:stop]
    if not self.workers:
      buffer = max(1, min(_BUFFER, self._many))
      return iter(part.to_iter_dataset(grain.ReadOptions(min(_THREADS, buffer), buffer)))
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # Grain's processes read flags of its own; ours are apart.
    buffer = max(1, min(_PER_WORKER_BUFFER, self._many // self.workers))
    options = grain.MultiprocessingOptions(self.workers, per_worker_buffer_size=buffer)
    return iter(part.to_iter_dataset(grain.ReadOptions(1, buffer)).mp_prefetch(options))

  def _say_gone(self, status: int, number: int, restarts: int) -> None:
    """Says that a loader process ended with `status`, or raises if that is of no use any more."""
    how = f'ended with status {status}'
    if status < 0:
      memory = '; out of memory?' if -status == signal.SIGKILL else ''
      how = f'was killed (signal {-status}{memory})'
    if restarts < _RESTARTS:
      print(f'a loader process {how}: started again at batch {number}', file=sys.stderr, flush=True)
      return
    raise errors.UserError(
      f'A loader process {how}, {restarts + 1} times in a row before batch {number} was made. If '
      'memory is short, use fewer of them, or threads alone: --config.num_workers=N, at most '
      f'{self.workers - 1} (0: threads), or smaller batches; what they printed last is above.'
    )

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
    seed=0 if pipeline.views else pipeline.shuffle_seed,
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


def train_batches(source: sources.Source, pipeline: Pipeline, bad_files: BadFiles) -> Batches:
  """Training batches without end: one fresh permutation of the images per epoch, across batches.

  With `Pipeline.views` the random numbers of an image depend on its position and the view alone.

  Args:
    source: at least one image.
    pipeline: what becomes of them.
    bad_files: where unreadable images are listed.

  Returns:
    The batches of this host.
  """
  loader = _loader(source, pipeline, 'train', pipeline.workers)
  count, size = len(source), pipeline.batch_size // pipeline.hosts
  mine = slice(pipeline.host * size, (pipeline.host + 1) * size)

  def of_host(numbered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    number, index = numbered[mine].T
    epochs = number // count
    return index, epochs % pipeline.views if pipeline.views else epochs

  def batch(numbered: np.ndarray) -> types.Batch:
    return _converted(loader.batch(*of_host(numbered)), pipeline.dtype_str)

  order = grain.MapDataset.range(count).seed(pipeline.shuffle_seed).shuffle().repeat(None)
  numbered = order.map_with_index(lambda number, index: (number, index))
  batched = numbered.batch(pipeline.batch_size, batch_fn=np.asarray)
  return Batches(
    batched.map(batch),
    loader,
    lambda number: of_host(np.asarray(batched[number])),
    size,
    bad_files,
    pipeline.workers,
    pipeline.batch_bytes('train'),
  )


def eval_batches(
  source: sources.Source, pipeline: Pipeline, bad_files: BadFiles, split: str
) -> Batches:
  """Every image once, in order, the last batch filled up.

  Args:
    source: at least one image.
    pipeline: what becomes of them; nothing is augmented.
    bad_files: where unreadable images are listed.
    split: 'valid' or 'test'.

  Returns:
    The batches of this host.
  """
  loader = _loader(source, pipeline, split, workers=0)
  count, size = len(source), pipeline.eval_batch_size // pipeline.hosts

  def positions(number: int) -> tuple[np.ndarray, np.ndarray]:
    start = number * pipeline.eval_batch_size + pipeline.host * size
    indices = np.arange(start, max(start, min(start + size, count)))
    return indices, np.zeros(len(indices), int)

  def batch(number: int) -> types.Batch:
    return _converted(loader.batch(*positions(number), size), pipeline.dtype_str)

  made = grain.MapDataset.range(-(-count // pipeline.eval_batch_size)).map(batch)
  return Batches(made, loader, positions, size, bad_files, batch_bytes=pipeline.batch_bytes(split))


def _converted(batch: dict[str, Any], dtype_str: str) -> dict[str, Any]:
  if dtype_str == 'float32':
    scaled = batch['inputs'].astype(np.float32)
    scaled /= 127.5
    scaled -= 1.0
    # What is masked is zero in every dtype.
    scaled[batch['batch_mask'] == 0] = 0.0
    batch = batch | {'inputs': scaled}
  return batch
