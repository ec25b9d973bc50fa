"""Batches of labelled images as Grain pipelines, in the `Dataset` record of Scenic.

Batch `step` of training is a pure function of (seed, step): `train_ds[step]` needs no state, so a
run resumes exactly with `iterate(train_ds, start=step)`, whatever stopped it. Shuffling works on
positions; images are fetched for a whole batch at once.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np

from losa_scenic.common_lib import errors, types
from losa_scenic.dataset_lib import sources

DTYPES = ('uint8', 'float32')
METRICS = ('accuracy', 'per_class')
# Two threads keep one batch in the making while another is handed over; more only fight for the
# interpreter lock, since sources of files decode in threads of their own.
_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


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


def make_dataset(
  splits: sources.Splits,
  *,
  batch_size: int,
  eval_batch_size: int,
  shuffle_seed: int,
  dtype_str: str,
  image_size: int,
  metric: str = 'accuracy',
  name: str = '',
  interpolation: str = '',
) -> Dataset:
  """Builds the pipelines of a data set.

  Every batch is {'inputs': [b, s, s, 3], 'label': int32 [b], 'batch_mask': float32 [b]}. Training
  runs through one fresh permutation of the images per epoch; batches cross epoch borders, so none
  is dropped and a batch may be larger than the set. Evaluation batches are filled up with zeros at
  `batch_mask` 0.

  Args:
    splits: the images; all of size `image_size`.
    batch_size: training images per batch.
    eval_batch_size: validation and test images per batch.
    shuffle_seed: seed of the training order, at least 0.
    dtype_str: 'uint8' (0..255 as stored) or 'float32' (scaled to [-1, 1]).
    image_size: side s of the images in pixels.
    metric: 'accuracy' (over images) or 'per_class' (mean of the classes' accuracies).
    name: name of the set.
    interpolation: how the images were resized, '' if they were not.

  Returns:
    The data set. `meta_data` has num_classes, input_shape (-1, s, s, 3), input_dtype,
    num_train_examples, num_eval_examples (validation; 0 without), num_test_examples,
    target_is_onehot (False), class_names, metric, name and interpolation.

  Raises:
    errors.UserError: for an empty training or test split and for options out of range.
    ValueError: if the images are not of size `image_size`.
  """
  errors.one_of('dtype_str', dtype_str, DTYPES)
  errors.one_of('metric', metric, METRICS)
  check_at_least('batch_size', batch_size, 1)
  check_at_least('eval_batch_size', eval_batch_size, 1)
  check_at_least('shuffle_seed', shuffle_seed, 0)
  _check_splits(splits, name, image_size)
  train_ds = _train_ds(splits.train, batch_size, shuffle_seed, dtype_str)
  valid_ds = None
  if splits.valid is not None and len(splits.valid):
    valid_ds = _eval_ds(splits.valid, eval_batch_size, dtype_str)
  test_ds = _eval_ds(splits.test, eval_batch_size, dtype_str)
  return Dataset(
    train_iter=iterate(train_ds),
    valid_iter=None if valid_ds is None else _forever(valid_ds),
    test_iter=_forever(test_ds),
    meta_data=_meta_data(splits, dtype_str, image_size)
    | {'metric': metric, 'name': name, 'interpolation': interpolation},
    train_ds=train_ds,
    valid_ds=valid_ds,
    test_ds=test_ds,
  )


def iterate(ds: grain.MapDataset, start: int = 0, stop: int | None = None) -> Iterator[types.Batch]:
  """Yields `ds[start], ..., ds[stop - 1]`, prepared ahead of time in background threads.

  The threads start with the first batch and end with the iterator; at most a few batches wait.

  Args:
    ds: a training or evaluation pipeline of `Dataset`.
    start: position of the first batch, e.g. the step to resume from.
    stop: position after the last batch; None for the end of `ds`, which training never reaches.

  Yields:
    Batches in order.
  """
  batches = iter(ds[start:stop].to_iter_dataset(_READ_OPTIONS))
  try:
    yield from batches
  finally:
    batches.close()


def check_at_least(option: str, value: int, least: int) -> None:
  """Raises `UserError` unless `value` is an integer of at least `least`, naming the option."""
  if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
    raise errors.UserError(f'{option} must be an integer of at least {least}, not {value!r}.')


def _meta_data(splits: sources.Splits, dtype_str: str, image_size: int) -> dict[str, Any]:
  return {
    'num_classes': len(splits.class_names),
    'input_shape': (-1, image_size, image_size, 3),
    'input_dtype': getattr(jnp, dtype_str),
    'num_train_examples': len(splits.train),
    'num_eval_examples': 0 if splits.valid is None else len(splits.valid),
    'num_test_examples': len(splits.test),
    'target_is_onehot': False,
    'class_names': tuple(splits.class_names),
  }


def _forever(ds: grain.MapDataset) -> Iterator[types.Batch]:
  while True:
    yield from iterate(ds)


def _train_ds(
  source: sources.Source, batch_size: int, seed: int, dtype_str: str
) -> grain.MapDataset:
  def batch(indices: np.ndarray) -> types.Batch:
    images, labels = source.fetch(indices)
    mask = np.ones(len(labels), np.float32)
    return {'inputs': _convert(images, dtype_str), 'label': labels, 'batch_mask': mask}

  order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(None)
  return order.batch(batch_size, batch_fn=np.asarray).map(batch)


def _eval_ds(source: sources.Source, batch_size: int, dtype_str: str) -> grain.MapDataset:
  def batch(number: int) -> types.Batch:
    start = number * batch_size
    images, labels = source.fetch(np.arange(start, min(start + batch_size, len(source))))
    arrays = {
      'inputs': _convert(images, dtype_str),
      'label': labels,
      'batch_mask': np.ones(len(labels), np.float32),
    }
    return {key: _pad(array, batch_size) for key, array in arrays.items()}

  return grain.MapDataset.range(-(-len(source) // batch_size)).map(batch)


def _convert(images: np.ndarray, dtype_str: str) -> np.ndarray:
  if dtype_str == 'uint8':
    return images
  scaled = images.astype(np.float32)
  scaled /= 127.5
  scaled -= 1.0
  return scaled


def _pad(array: np.ndarray, count: int) -> np.ndarray:
  if len(array) == count:
    return array
  padded = np.zeros((count, *array.shape[1:]), array.dtype)
  padded[: len(array)] = array
  return padded


def _check_splits(splits: sources.Splits, name: str, image_size: int) -> None:
  for part, source in (('train', splits.train), ('test', splits.test)):
    if not len(source):
      raise errors.UserError(f"Dataset '{name}': the {part} split is empty.")
    shape = source.fetch(np.zeros(1, np.int64))[0].shape[1:]
    if shape != (image_size, image_size, 3):
      raise ValueError(f"Dataset '{name}': {part} images are {shape}, not size {image_size}.")
