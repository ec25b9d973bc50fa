"""Batches: a pure function of seed and step, exact epochs, exact evaluation counts."""

import dataclasses
import itertools
import json
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import dataset_utils, sources
from losa_scenic.dataset_lib.augment import Augment
from losa_scenic.dataset_lib.fingerprint import fingerprint
from losa_scenic.dataset_lib.resize import View

KEYS = {'inputs', 'label', 'batch_mask', 'index'}


def numbered(count: int) -> sources.ArraySource:
  """Images whose first pixel holds the image's number."""
  images = np.zeros((count, 4, 4, 3), np.uint8)
  images[:, 0, 0, 0] = np.arange(count)
  return sources.ArraySource(images, np.arange(count) % 5, 'item', num_classes=5)


def pipeline(size=4, **options) -> dataset_utils.Pipeline:
  defaults = {'batch_size': 8, 'eval_batch_size': 4, 'shuffle_seed': 0, 'dtype_str': 'uint8'}
  return dataset_utils.Pipeline(view=View(size), **(defaults | options))


def build(train=50, valid=7, test=11, name='', **options) -> dataset_utils.Dataset:
  splits = sources.Splits(
    numbered(train),
    None if valid is None else numbered(valid),
    numbered(test),
    ('a', 'b', 'c', 'd', 'e'),
    ('made here',),
  )
  return dataset_utils.make_dataset(splits, pipeline(**options), name)


def ids(batch) -> list[int]:
  return batch['inputs'][:, 0, 0, 0].tolist()


def assert_same(ours, theirs):
  assert set(ours) == set(theirs) == KEYS
  for key in ours:
    np.testing.assert_array_equal(ours[key], theirs[key])
    assert ours[key].dtype == theirs[key].dtype


def test_fields_are_scenics():
  names = [field.name for field in dataclasses.fields(dataset_utils.Dataset)]
  parts = ('train', 'valid', 'test')
  assert names == [
    *(f'{part}_iter' for part in parts),
    'meta_data',
    *(f'{part}_ds' for part in parts),
    *(f'{part}_multi_iter' for part in parts),
    *(f'{part}_multi_ds' for part in parts),
  ]
  with pytest.raises(dataclasses.FrozenInstanceError):
    build().train_ds = None


def test_train_batch_is_a_pure_function_of_seed_and_step():
  one, other, reseeded = build(), build(), build(shuffle_seed=1)
  for step in (17, 3, 1000, 3, 0):
    assert_same(one.train_ds[step], other.train_ds[step])
  assert any(ids(one.train_ds[i]) != ids(reseeded.train_ds[i]) for i in range(3))
  batch = one.train_ds[5]
  assert batch['inputs'].shape == (8, 4, 4, 3) and batch['inputs'].dtype == np.uint8
  assert batch['label'].dtype == np.int32 and batch['batch_mask'].dtype == np.float32
  assert batch['batch_mask'].tolist() == [1.0] * 8
  assert batch['index'].dtype == np.int32 and batch['index'].tolist() == ids(batch)
  np.testing.assert_array_equal(batch['label'], np.array(ids(batch)) % 5)


@pytest.mark.parametrize('batch_size', [8, 50, 130])
def test_each_epoch_is_a_fresh_permutation(batch_size):
  ds = build(batch_size=batch_size).train_ds
  stream = list(itertools.chain.from_iterable(ids(ds[step]) for step in range(400 // batch_size)))
  epochs = [stream[i : i + 50] for i in range(0, len(stream) - 49, 50)]
  assert len(epochs) >= 7
  for epoch in epochs:
    assert sorted(epoch) == list(range(50))
  assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


@pytest.mark.parametrize('start', [0, 1, 13, 4000])
def test_iterate_resumes_exactly(start):
  ds = build().train_ds
  batches = list(dataset_utils.iterate(ds, start, start + 9))
  assert len(batches) == 9
  for offset, batch in enumerate(batches):
    assert_same(batch, ds[start + offset])


def test_iterate_edges():
  dataset = build()
  assert list(dataset_utils.iterate(dataset.train_ds, 5, 5)) == []
  endless = dataset_utils.iterate(dataset.train_ds, start=6)
  assert_same(next(endless), dataset.train_ds[6])
  endless.close()
  assert_same(next(dataset.train_iter), dataset.train_ds[0])
  assert_same(next(dataset.train_iter), dataset.train_ds[1])
  dataset.train_iter.close()


def test_threads_end_with_the_iterator():
  def others() -> int:  # The pool that decodes serves all iterators and stays.
    return sum(not thread.name.startswith('decode') for thread in threading.enumerate())

  before = others()
  for _ in range(3):
    iterator = dataset_utils.iterate(build().train_ds)
    next(iterator)
    iterator.close()
  deadline = time.monotonic() + 5
  while others() > before and time.monotonic() < deadline:
    time.sleep(0.05)
  assert others() <= before


@pytest.mark.parametrize('dtype_str', ['uint8', 'float32'])
@pytest.mark.parametrize(('test', 'batch_size'), [(11, 4), (12, 4), (3, 4), (1, 1)])
def test_evaluation_counts_every_image_once_in_order(test, batch_size, dtype_str):
  dataset = build(test=test, eval_batch_size=batch_size, dtype_str=dtype_str)
  batches = [dataset.test_ds[i] for i in range(len(dataset.test_ds))]
  assert len(batches) == -(-test // batch_size)
  assert all(batch['inputs'].shape == (batch_size, 4, 4, 3) for batch in batches)
  mask = np.concatenate([batch['batch_mask'] for batch in batches])
  assert mask.tolist() == [1.0] * test + [0.0] * (len(mask) - test)
  inputs = np.concatenate([batch['inputs'] for batch in batches])
  assert not inputs[test:].any()
  numbers = inputs[:test, 0, 0, 0]
  if dtype_str == 'float32':
    numbers = np.round((numbers + 1) * 127.5)
  assert numbers.tolist() == list(range(test))
  labels = np.concatenate([batch['label'] for batch in batches])
  assert labels.dtype == np.int32
  assert labels.tolist() == [i % 5 for i in range(test)] + [0] * (len(mask) - test)
  index = np.concatenate([batch['index'] for batch in batches])
  assert index.dtype == np.int32
  assert index.tolist() == [*range(test)] + [-1] * (len(mask) - test)
  for batch, iterated in zip(batches, dataset_utils.iterate(dataset.test_ds), strict=True):
    assert_same(batch, iterated)


def test_evaluation_iterators_start_over():
  dataset = build(valid=7)
  twice = [ids(batch) for batch in itertools.islice(dataset.valid_iter, 4)]
  assert twice == [[0, 1, 2, 3], [4, 5, 6, 0]] * 2
  assert len(dataset.valid_ds) == 2 and dataset.meta_data['num_eval_examples'] == 7


def test_meta_data():
  dataset = build(metric='per_class', name='numbers')
  assert dataset.meta_data == {
    'num_classes': 5,
    'input_shape': (-1, 4, 4, 3),
    'input_dtype': jnp.uint8,
    'num_train_examples': 50,
    'num_eval_examples': 7,
    'num_test_examples': 11,
    'target_is_onehot': False,
    'class_names': ('a', 'b', 'c', 'd', 'e'),
    'metric': 'per_class',
    'name': 'numbers',
    'interpolation': 'bicubic',
    'central_crop': None,
    'about': ('made here',),
    'train_crops': None,
    'clips': None,
    'fingerprints': {
      part: fingerprint(numbered(count))
      for part, count in (('train', 50), ('valid', 7), ('test', 11))
    },
  }
  meta = build(valid=None, dtype_str='float32').meta_data
  assert meta['input_dtype'] is jnp.float32 and meta['num_eval_examples'] == 0
  json.dumps({key: value for key, value in meta.items() if key != 'input_dtype'})


@pytest.mark.parametrize('valid', [None, 0])
def test_without_validation(valid):
  dataset = build(valid=valid)
  assert dataset.valid_ds is None and dataset.valid_iter is None


def test_float32_is_scaled_to_minus_one_to_one():
  images = np.arange(256, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 1, 3), np.uint8)
  source = sources.ArraySource(images, np.zeros(256, int), 'grey', num_classes=1)
  dataset = dataset_utils.make_dataset(
    sources.Splits(source, None, source, ('only',)),
    pipeline(1, batch_size=1, eval_batch_size=256, dtype_str='float32'),
  )
  scaled = dataset.test_ds[0]['inputs']
  assert scaled.dtype == np.float32 and scaled.min() == -1.0 and scaled.max() == 1.0
  np.testing.assert_allclose(scaled[:, 0, 0, 0], np.arange(256) / 127.5 - 1, atol=1e-6)


def test_bad_options():
  mixing = Augment(mixup_alpha=0.2)
  for options, message in (
    ({'dtype_str': 'bfloat16'}, "dtype_str 'bfloat16'"),
    ({'metric': 'f1'}, "metric 'f1'"),
    ({'batch_size': 0}, 'batch_size'),
    ({'batch_size': 2.5}, 'batch_size'),
    ({'eval_batch_size': -1}, 'eval_batch_size'),
    ({'shuffle_seed': -1}, 'shuffle_seed'),
    ({'workers': -1}, 'workers'),
    ({'size': 0}, 'image_size'),
    ({'size': True}, 'image_size'),
    ({'max_bad_fraction': 1.0}, r'max_bad_fraction must be in \[0, 1\), not 1'),
    ({'max_bad_fraction': -0.1}, 'max_bad_fraction'),
    ({'cache_gigabytes': -1.0}, 'cache_gigabytes must be at least 0'),
    ({'hosts': 3}, 'batch_size 8 cannot be shared by 3 hosts'),
    ({'hosts': 8}, 'eval_batch_size 4 cannot be shared by 8 hosts'),
    ({'batch_size': 6, 'hosts': 2, 'augment': mixing}, 'mixed in pairs: .* odd number'),
    ({'train': 0}, "Dataset 'mine': the train split is empty"),
    ({'test': 0}, "Dataset 'mine': the test split is empty"),
  ):
    with pytest.raises(errors.UserError, match=message):
      build(name='mine', **options)
  assert 'label_share' in build(batch_size=7, augment=mixing).train_ds[0]
