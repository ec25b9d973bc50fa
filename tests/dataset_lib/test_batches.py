"""Batches of a whole data set: the view, augmentation, mixing, hosts and unreadable images."""

import numpy as np
import pytest

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import dataset_utils, loader, sources
from losa_scenic.dataset_lib.augment import Augment
from losa_scenic.dataset_lib.resize import View

KEYS = {'inputs', 'label', 'batch_mask', 'index'}
MIXED = {'partner_label', 'label_share'}


def pipeline(view: View, **options) -> dataset_utils.Pipeline:
  defaults = {'batch_size': 8, 'eval_batch_size': 4, 'shuffle_seed': 0, 'dtype_str': 'uint8'}
  return dataset_utils.Pipeline(view=view, **(defaults | options))


def numbered(count: int) -> sources.ArraySource:
  """Images whose every pixel is the image's number."""
  images = np.tile(np.arange(count, dtype=np.uint8)[:, None, None, None], (1, 4, 4, 3))
  return sources.ArraySource(images, np.arange(count) % 5, 'item', num_classes=5)


def build(**options) -> dataset_utils.Dataset:
  splits = sources.Splits(numbered(50), numbered(7), numbered(11), tuple('abcde'))
  return dataset_utils.make_dataset(splits, pipeline(View(4), **options))


def test_images_of_any_size_are_shown_through_the_view():
  images = [np.random.default_rng(i).integers(0, 256, (9 + i, 12, 3), np.uint8) for i in range(6)]
  source = sources.ArraySource(images, np.zeros(6, int), 'noise', num_classes=1)
  view = View(5, 'bilinear', central_crop=0.8)
  splits = sources.Splits(source, None, source, ('only',))
  dataset = dataset_utils.make_dataset(splits, pipeline(view, eval_batch_size=6))
  expected = loader.Loader(source, view).batch(np.arange(6), np.zeros(6, int))
  np.testing.assert_array_equal(dataset.test_ds[0]['inputs'], expected['inputs'])
  meta = dataset.meta_data
  assert (meta['interpolation'], meta['central_crop']) == ('bilinear', 0.8)
  assert meta['input_shape'] == (-1, 5, 5, 3)


def test_training_is_augmented_afresh_in_each_epoch_and_evaluation_never():
  source = sources.ArraySource(
    np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8),
    np.zeros(6, int),
    'noise',
    num_classes=1,
  )
  drawn = Augment(min_crop_area=0.4, flip=True, color_jitter=0.3)
  options = pipeline(View(8), batch_size=6, eval_batch_size=6, shuffle_seed=3, augment=drawn)
  splits = sources.Splits(source, source, source, ('only',))
  dataset = dataset_utils.make_dataset(splits, options)
  made = loader.Loader(source, View(8), augment=drawn, seed=3)
  seen = set()
  for epoch in range(3):
    batch = dataset.train_ds[epoch]
    expected = made.batch(batch['index'], np.full(6, epoch))
    np.testing.assert_array_equal(batch['inputs'], expected['inputs'])
    seen |= {image.tobytes() for image in batch['inputs']}
  assert len(seen) == 18
  for ds in (dataset.valid_ds, dataset.test_ds):
    np.testing.assert_array_equal(ds[0]['inputs'], source.images)


@pytest.mark.parametrize('dtype_str', ['uint8', 'float32'])
def test_mixed_batches_say_with_what_and_how_much(dtype_str):
  dataset = build(augment=Augment(mixup_alpha=1.0), dtype_str=dtype_str)
  batch = dataset.train_ds[2]
  assert set(batch) == KEYS | MIXED
  assert batch['partner_label'].dtype == np.int32 and batch['label_share'].dtype == np.float32
  # Neighbours are partners, and labels stay those of the image's own position.
  np.testing.assert_array_equal(batch['label'], batch['index'] % 5)
  partners = batch['index'].reshape(-1, 2)[:, ::-1].ravel()
  np.testing.assert_array_equal(batch['partner_label'], partners % 5)
  share, first = batch['label_share'], batch['inputs'][:, 0, 0, 0]
  assert 0 <= share.min() < share.max() <= 1
  mixed = share * batch['index'] + (1 - share) * partners
  if dtype_str == 'float32':
    first = (first + 1) * 127.5
  np.testing.assert_allclose(first, mixed, atol=0.51)
  assert set(dataset.test_ds[0]) == KEYS
  (iterated,) = dataset_utils.iterate(dataset.train_ds, 2, 3)
  for key in KEYS | MIXED:
    np.testing.assert_array_equal(iterated[key], batch[key])


def test_hosts_share_the_batches_of_one():
  augment = Augment(flip=True, color_jitter=0.3, cutmix_alpha=1.0)
  alone = build(augment=augment)
  parts = [build(augment=augment, host=host, hosts=2) for host in range(2)]
  for name in ('train_ds', 'valid_ds', 'test_ds'):
    whole, halves = getattr(alone, name), [getattr(part, name) for part in parts]
    steps = (0, 6, 41) if name == 'train_ds' else range(len(whole))
    for step in steps:
      for key, expected in whole[step].items():
        together = np.concatenate([half[step][key] for half in halves])
        np.testing.assert_array_equal(together, expected, err_msg=f'{name} {step} {key}')
    assert len(halves[0]) == len(halves[1]) == len(whole)


class Holed:
  """Images of one colour; some cannot be read."""

  def __init__(self, count: int, gone: set[int]) -> None:
    self.count, self.gone, self.fails = count, gone, False

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> sources.Record:
    if self.fails:
      raise errors.UserError('shard 3: the disk is gone')
    if index in self.gone:
      raise sources.BadImage(f'cats/{index}.jpg', 'truncated')
    return sources.Record(np.full((4, 4, 3), index, np.uint8), 0, f'cats/{index}.jpg')


def holed(train: set[int], test: set[int], **options) -> tuple[dataset_utils.Dataset, Holed]:
  source = Holed(30, train)
  splits = sources.Splits(source, None, Holed(10, test), ('only',))
  return dataset_utils.make_dataset(splits, pipeline(View(4), **options)), source


def test_unreadable_images_are_listed_once_and_not_in_the_batches(capsys, tmp_path):
  dataset, _ = holed({3, 17}, {8}, max_bad_fraction=0.1)
  listed = dataset.train_ds.bad_files
  assert dataset.test_ds.bad_files is listed and not listed.problems
  listed.keep_in(tmp_path / 'bad.csv')
  batches = list(dataset_utils.iterate(dataset.train_ds, 0, 12))
  batches.append(dataset.train_ds[1])
  for batch in batches:
    assert set(batch) == KEYS
    stand_ins = [i + 1 if i in (3, 17) else i for i in batch['index'].tolist()]
    assert batch['inputs'][:, 0, 0, 0].tolist() == stand_ins and batch['batch_mask'].all()
  tested = list(dataset_utils.iterate(dataset.test_ds))
  assert sum(batch['batch_mask'].sum() for batch in tested) == 9
  assert all(set(batch) == KEYS for batch in tested)
  places = {('train', 3), ('train', 17), ('test', 8)}
  assert {(p.split, p.index) for p in listed.problems.values()} == places
  assert (tmp_path / 'bad.csv').read_text().count('cats/') == 3
  printed = capsys.readouterr().err.splitlines()
  assert sorted(printed) == [
    'bad image (test): cats/8.jpg: truncated',
    'bad image (train): cats/17.jpg: truncated',
    'bad image (train): cats/3.jpg: truncated',
  ]


def test_names_of_the_images_of_a_batch():
  dataset = build(dtype_str='float32')
  assert dataset.train_ds.names(np.array([3, -1, 49])) == ['item[3]', '', 'item[49]']
  assert dataset.test_ds.names([]) == []
  # Where a source has to be read for it, also of those that cannot be.
  dataset, _ = holed({3, 17}, {8}, max_bad_fraction=0.1)
  assert dataset.train_ds.names([17, 2, -1]) == ['cats/17.jpg', 'cats/2.jpg', '']
  assert not dataset.train_ds.bad_files.problems


def test_errors_of_a_source_reach_the_consumer_of_iterate():
  dataset, _ = holed({3, 17}, set(), max_bad_fraction=0.05)
  with pytest.raises(errors.UserError, match=r'cats/\d+\.jpg: truncated\. .*at most 1 are allowed'):
    list(dataset_utils.iterate(dataset.train_ds, 0, 12))
  dataset, source = holed(set(), set())
  source.fails = True
  with pytest.raises(errors.UserError) as caught:
    next(dataset_utils.iterate(dataset.train_ds))
  assert str(caught.value) == 'shard 3: the disk is gone'
