"""Batches of labelled images as Grain pipelines, in the `Dataset` record of Scenic.

Batch `step` of training is a pure function of (seed, step): `train_ds[step]` needs no state, so a
run resumes exactly with `iterate(train_ds, start=step)`, whatever stopped it, and with any number
of loader processes. Shuffling works on positions, and batches are global: each host then makes its
own part of a batch, so that the order is the same for any number of hosts.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np
from absl import flags

from losa_scenic.common_lib import errors, types
from losa_scenic.dataset_lib import augment as augment_lib
from losa_scenic.dataset_lib import resize, sources
from losa_scenic.dataset_lib.bad_files import BadFiles
from losa_scenic.dataset_lib.loader import Loader

DTYPES = ('uint8', 'float32')
METRICS = ('accuracy', 'per_class')
# Two threads keep one batch in the making while another is handed over; each decodes its images in
# a pool of threads, see `loader`.
_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
_PER_WORKER_BUFFER = 2  # batches


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A data set as trainers see it; the fields are Scenic's.

  Attributes:
    train_iter: endless shuffled training batches, from the first on.
    valid_iter: validation batches in order, over and over; None without a validation split.
    test_iter: test batches in order, over and over.
    meta_data: see `make_dataset`.
    train_ds: endless; `train_ds[step]` is the batch of that step.
    valid_ds: one pass over the validation images; None without a validation split.
    test_ds: one pass over the test images.
    train_multi_iter: Scenic's sets of several parts; not used here, as all `*_multi_*` fields.
    valid_multi_iter: not used.
    test_multi_iter: not used.
    train_multi_ds: not used.
    valid_multi_ds: not used.
    test_multi_ds: not used.
  """

  train_iter: Iterator[types.Batch] | None = None
  valid_iter: Iterator[types.Batch] | None = None
  test_iter: Iterator[types.Batch] | None = None
  meta_data: dict[str, Any] = dataclasses.field(default_factory=dict)
  train_ds: Any = None
  valid_ds: Any = None
  test_ds: Any = None
  train_multi_iter: Any = None
  valid_multi_iter: Any = None
  test_multi_iter: Any = None
  train_multi_ds: Any = None
  valid_multi_ds: Any = None
  test_multi_ds: Any = None


class Batches:
  """The batches of a split by number; see `Loader.batch` for what they hold.

  Attributes:
    pipeline: the Grain data set.
    bad_files: where images that could not be read are listed.
    workers: number of processes that `iterate` loads with; 0 for threads.
  """

  def __init__(self, pipeline: grain.MapDataset, bad_files: BadFiles, workers: int = 0) -> None:
    """Keeps them."""
    self.pipeline, self.bad_files, self.workers = pipeline, bad_files, workers

  def __len__(self) -> int:
    """Number of batches; of training, practically without end."""
    return len(self.pipeline)

  def __getitem__(self, number: int) -> types.Batch:
    """The batch of that number."""
    return self._listed(self.pipeline[number])

  def iterate(self, start: int, stop: int | None) -> Iterator[types.Batch]:
    """See the function of the same name."""
    part = self.pipeline[start:stop]
    if self.workers:
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's processes read flags of its own; ours are apart.
      batches = part.to_iter_dataset(grain.ReadOptions(1, _PER_WORKER_BUFFER)).mp_prefetch(
        grain.MultiprocessingOptions(self.workers, per_worker_buffer_size=_PER_WORKER_BUFFER)
      )
    else:
      batches = part.to_iter_dataset(_READ_OPTIONS)
    iterator = iter(batches)
    try:
      for batch in iterator:
        yield self._listed(batch)
    finally:
      iterator.close()

  def _listed(self, batch: Any) -> dict[str, Any]:
    """The batch without its problems, which go to the list."""
    self.bad_files.add(batch.pop('problems', ()))
    return batch


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """How images become batches; all but the images.

  Attributes:
    batch_size: training images per batch, of all hosts together.
    eval_batch_size: validation and test images per batch, of all hosts together.
    shuffle_seed: seed of the training order and of the augmentation, at least 0.
    dtype_str: 'uint8' (0..255 as stored) or 'float32' (scaled to [-1, 1]).
    view: what of an image is shown where nothing is augmented.
    augment: what is drawn at random in training.
    metric: 'accuracy' (over images) or 'per_class' (mean of the classes' accuracies).
    max_bad_fraction: more unreadable images than this share of a split end the run; in [0, 1).
    cache_gigabytes: splits whose decoded images fit into this much memory are decoded once.
    workers: number of loader processes; 0 for threads alone. With processes nothing is kept.
    host: number of this host.
    hosts: number of hosts.
  """

  batch_size: int
  eval_batch_size: int
  shuffle_seed: int
  dtype_str: str
  view: resize.View
  augment: augment_lib.Augment = dataclasses.field(default_factory=augment_lib.Augment)
  metric: str = 'accuracy'
  max_bad_fraction: float = 0.01
  cache_gigabytes: float = 4.0
  workers: int = 0
  host: int = 0
  hosts: int = 1

  def __post_init__(self):
    """Raises `UserError` for values out of range."""
    errors.one_of('dtype_str', self.dtype_str, DTYPES)
    errors.one_of('metric', self.metric, METRICS)
    check_at_least('batch_size', self.batch_size, 1)
    check_at_least('eval_batch_size', self.eval_batch_size, 1)
    check_at_least('shuffle_seed', self.shuffle_seed, 0)
    check_at_least('workers', self.workers, 0)
    check_at_least('image_size', self.view.image_size, 1)
    if not 0 <= self.max_bad_fraction < 1:
      raise errors.UserError(f'max_bad_fraction must be in [0, 1), not {self.max_bad_fraction}.')
    if self.cache_gigabytes < 0:
      raise errors.UserError(f'cache_gigabytes must be at least 0, not {self.cache_gigabytes}.')
    for name in ('batch_size', 'eval_batch_size'):
      if getattr(self, name) % self.hosts:
        raise errors.UserError(
          f'{name} {getattr(self, name)} cannot be shared by {self.hosts} hosts: use a multiple.'
        )
    if self.augment.mixes and self.batch_size // self.hosts % 2 and self.hosts > 1:
      raise errors.UserError(
        f'Images are mixed in pairs: batch_size {self.batch_size} gives each of {self.hosts} '
        'hosts an odd number of them.'
      )


def make_dataset(splits: sources.Splits, pipeline: Pipeline, name: str = '') -> Dataset:
  """Builds the batches of a data set.

  Every batch is {'inputs': [b, s, s, 3], 'label': int32 [b], 'batch_mask': float32 [b], 'index':
  int32 [b]} and more where images are mixed, see `Loader.batch`. Training runs through one fresh
  permutation of the images per epoch; batches cross epoch borders, so none is dropped and a batch
  may be larger than the set. Evaluation batches are filled up with zeros at `batch_mask` 0.

  Args:
    splits: the images, of any size.
    pipeline: what becomes of them.
    name: name of the set.

  Returns:
    The data set. `meta_data` has num_classes, input_shape (-1, s, s, 3), input_dtype,
    num_train_examples, num_eval_examples (validation; 0 without), num_test_examples,
    target_is_onehot (False), class_names, metric, name, interpolation, central_crop and about.

  Raises:
    errors.UserError: for an empty training or test split.
  """
  for part, source in (('train', splits.train), ('test', splits.test)):
    if not len(source):
      raise errors.UserError(f"Dataset '{name}': the {part} split is empty.")
  bad_files = BadFiles()
  train_ds = Batches(_train_ds(splits.train, pipeline), bad_files, pipeline.workers)
  valid_ds = None
  if splits.valid is not None and len(splits.valid):
    valid_ds = Batches(_eval_ds(splits.valid, pipeline, 'valid'), bad_files)
  test_ds = Batches(_eval_ds(splits.test, pipeline, 'test'), bad_files)
  return Dataset(
    train_iter=iterate(train_ds),
    valid_iter=None if valid_ds is None else _forever(valid_ds),
    test_iter=_forever(test_ds),
    meta_data=_meta_data(splits, pipeline, name),
    train_ds=train_ds,
    valid_ds=valid_ds,
    test_ds=test_ds,
  )


def iterate(ds: Batches, start: int = 0, stop: int | None = None) -> Iterator[types.Batch]:
  """Yields `ds[start], ..., ds[stop - 1]`, prepared ahead of time.

  Threads or processes start with the first batch and end with the iterator; at most a few batches
  wait.

  Args:
    ds: training or evaluation batches of `Dataset`.
    start: position of the first batch, e.g. the step to resume from.
    stop: position after the last batch; None for the end of `ds`, which training never reaches.

  Yields:
    Batches in order, the same for any number of loader processes.

  Raises:
    errors.UserError: if too many images cannot be read.
  """
  yield from ds.iterate(start, stop)


def check_at_least(option: str, value: int, least: int) -> None:
  """Raises `UserError` unless `value` is an integer of at least `least`, naming the option."""
  if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
    raise errors.UserError(f'{option} must be an integer of at least {least}, not {value!r}.')


def _meta_data(splits: sources.Splits, pipeline: Pipeline, name: str) -> dict[str, Any]:
  size = pipeline.view.image_size
  return {
    'num_classes': len(splits.class_names),
    'input_shape': (-1, size, size, 3),
    'input_dtype': getattr(jnp, pipeline.dtype_str),
    'num_train_examples': len(splits.train),
    'num_eval_examples': 0 if splits.valid is None else len(splits.valid),
    'num_test_examples': len(splits.test),
    'target_is_onehot': False,
    'class_names': tuple(splits.class_names),
    'metric': pipeline.metric,
    'name': name,
    'interpolation': pipeline.view.interpolation,
    'central_crop': pipeline.view.central_crop,
    'about': splits.about,
  }


def _forever(ds: Batches) -> Iterator[types.Batch]:
  while True:
    yield from iterate(ds)


def _loader(source: sources.Source, pipeline: Pipeline, split: str, workers: int) -> Loader:
  return Loader(
    source,
    pipeline.view,
    augment=pipeline.augment if split == 'train' else None,
    seed=pipeline.shuffle_seed,
    split=split,
    max_bad_fraction=pipeline.max_bad_fraction,
    # Every process would keep images of its own.
    cache_bytes=0 if workers else int(pipeline.cache_gigabytes * 1e9),
  )


def _train_ds(source: sources.Source, pipeline: Pipeline) -> grain.MapDataset:
  loader = _loader(source, pipeline, 'train', pipeline.workers)
  count, size = len(source), pipeline.batch_size // pipeline.hosts
  mine = slice(pipeline.host * size, (pipeline.host + 1) * size)

  def batch(positions: np.ndarray) -> types.Batch:
    number, index = positions[mine].T
    return _converted(loader.batch(index, number // count), pipeline.dtype_str)

  order = grain.MapDataset.range(count).seed(pipeline.shuffle_seed).shuffle().repeat(None)
  numbered = order.map_with_index(lambda number, index: (number, index))
  return numbered.batch(pipeline.batch_size, batch_fn=np.asarray).map(batch)


def _eval_ds(source: sources.Source, pipeline: Pipeline, split: str) -> grain.MapDataset:
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
