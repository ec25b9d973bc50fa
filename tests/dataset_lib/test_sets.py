"""The table of data sets, `build_dataset`, and the two sets that need no files."""

import importlib

import ml_collections
import numpy as np
import pytest
from PIL import Image
from sklearn import datasets as sklearn_datasets

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import dataset_utils, datasets, digits, resize, sprites


def build(name='digits', **options):
  defaults = {'batch_size': 8, 'eval_batch_size': 100, 'image_size': 8}
  return datasets.build_dataset(name, **(defaults | options))


def images_of(source) -> tuple[np.ndarray, np.ndarray]:
  """Images [n, h, w, 3] and labels [n]."""
  records = [source[i] for i in range(len(source))]
  return np.stack([r.image for r in records]), np.array([r.label for r in records])


def ids(source) -> list[str]:
  return [source[i].id for i in range(len(source))]


def test_every_row_of_the_table_is_a_function():
  for name in datasets.DATASETS:
    assert callable(datasets.get_dataset(name))
  assert list(datasets.DATASETS) == sorted(datasets.DATASETS)
  assert importlib.import_module('losa_scenic.dataset_lib.digits').splits is datasets.get_dataset(
    'digits'
  )
  with pytest.raises(errors.UserError, match=r"Unknown dataset 'digit'. Did you mean 'digits'"):
    build('digit')


def test_build_by_name_with_config_dict():
  configs = ml_collections.ConfigDict({'train_split': 'trainval', 'metric': 'per_class'})
  configs.root = ml_collections.config_dict.placeholder(str)  # None: not given.
  dataset = build(dataset_configs=configs, dtype_str='float32')
  meta = dataset.meta_data
  assert (meta['num_train_examples'], meta['num_eval_examples']) == (1000, 0)
  assert meta['num_test_examples'] == 797 and meta['metric'] == 'per_class'
  assert meta['name'] == 'digits' and meta['num_classes'] == 10
  assert dataset.valid_ds is None and dataset.valid_iter is None
  batch = next(dataset_utils.iterate(dataset.train_ds, 2, 3))
  assert batch['inputs'].shape == (8, 8, 8, 3) and batch['inputs'].dtype == np.float32
  total = sum(batch['batch_mask'].sum() for batch in dataset_utils.iterate(dataset.test_ds))
  assert total == 797


def test_trainval_trains_on_both_parts():
  dataset = build(dataset_configs={'train_split': 'trainval'}, batch_size=1000)
  parts = digits.splits()
  both = np.concatenate([images_of(parts.train)[0], images_of(parts.valid)[0]])
  delivered = dataset.train_ds[0]['inputs']
  assert sorted(x.tobytes() for x in both) == sorted(x.tobytes() for x in delivered)


def test_common_options_come_before_the_arguments():
  dataset = build(dataset_configs={'image_size': 12, 'interpolation': 'area', 'central_crop': 0.5})
  meta = dataset.meta_data
  assert meta['input_shape'] == (-1, 12, 12, 3)
  assert (meta['interpolation'], meta['central_crop']) == ('area', 0.5)
  shown = dataset.test_ds[0]['inputs'][0]
  assert shown.shape == (12, 12, 3)
  expected = resize.resize(digits.splits().test[0].image, 12, 'area', resize.Box(2, 2, 4, 4))
  np.testing.assert_array_equal(shown, expected)
  assert build(interpolation='lanczos').meta_data['interpolation'] == 'lanczos'
  drawn = build('sprites', dataset_configs={'image_size': 24, 'num_train': 4, 'num_test': 4})
  np.testing.assert_array_equal(
    drawn.test_ds[0]['inputs'][:4],
    images_of(sprites.splits(image_size=24, num_train=4, num_test=4).test)[0],
  )


def test_augmentation_workers_and_hosts_reach_the_pipeline():
  plain, flipped = build(), build(augment={'flip': True, 'mixup_alpha': 0.5})
  assert 'label_share' in flipped.train_ds[0] and 'label_share' not in plain.train_ds[0]
  assert build(workers=3).train_ds.workers == 3 and plain.train_ds.workers == 0
  half = build(host=1, hosts=2).train_ds[0]
  np.testing.assert_array_equal(half['index'], plain.train_ds[0]['index'][4:])


def test_every_option_has_one_type():
  types = datasets.option_types()
  assert types['root'] is str and types['central_crop'] is float and types['split_seed'] is int
  assert set(types) >= set(datasets.COMMON_OPTIONS)
  assert set(types.values()) <= {str, int, float, bool}


def test_options_of_one_name_and_two_types_are_a_mistake_of_ours(monkeypatch):
  def splits(*, seed: str | None = None):
    raise NotImplementedError

  monkeypatch.setattr(digits, 'splits', splits)
  with pytest.raises(TypeError, match='seed of dataset'):
    datasets.option_types()


def test_auto_is_whatever_is_found(tmp_path):
  for name in ('cat', 'dog'):
    (tmp_path / name).mkdir()
    for i in range(5):
      Image.new('RGB', (8, 8)).save(tmp_path / name / f'{i}.png')
  dataset = build('auto', dataset_configs={'root': str(tmp_path)})
  assert dataset.meta_data['name'] == 'image_folder'
  assert dataset.meta_data['class_names'] == ('cat', 'dog')
  with pytest.raises(errors.UserError, match="option of dataset 'image_folder' 'num_train'"):
    build('auto', dataset_configs={'root': str(tmp_path), 'num_train': 9})
  for configs in ({}, {'root': str(tmp_path / 'nowhere')}):
    with pytest.raises(errors.UserError, match=r'--?config\.dataset_configs\.root'):
      build('auto', dataset_configs=configs)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'dataset_configs': {'train_spilt': 'train'}}, "'train_spilt'. Did you mean 'train_split'"),
    ({'dataset_configs': {'label': 'x_position'}}, "option of dataset 'digits' 'label'"),
    ({'dataset_configs': {'train_split': 'all'}}, "Unknown train_split 'all'"),
    ({'dataset_configs': {'metric': 'auc'}}, "Unknown metric 'auc'"),
    ({'dataset_configs': {'image_size': 0}}, 'image_size must be'),
    ({'dataset_configs': {'path': 'x'}}, "option of dataset 'digits' 'path'"),
    ({'dataset_configs': {'root': 'x'}}, "option of dataset 'digits' 'root'"),
    ({'dataset_configs': {'interpolation': 'cubic'}}, "'cubic'. Did you mean 'bicubic'"),
    ({'dataset_configs': {'central_crop': 1.5}}, r'central_crop must be in \(0, 1\], not 1\.5'),
    ({'dataset_configs': {'max_bad_fraction': 1.5}}, 'max_bad_fraction must be'),
    ({'dataset_configs': {'cache_gigabytes': -1.0}}, 'cache_gigabytes must be'),
    ({'dataset_configs': {'normalisation': 'imagnet'}}, "'imagnet'. Did you mean 'imagenet'"),
    ({'augment': {'flp': True}}, "option of augment 'flp'. Did you mean 'flip'"),
    ({'augment': {'flip': 'yes'}}, 'flip of augment must be of type bool'),
    ({'augment': {'min_crop_area': 0.0}}, r'augment\.min_crop_area'),
    ({'workers': -1}, 'workers must be'),
    ({'batch_size': 9, 'num_shards': 2}, 'batch_size 9 cannot be shared by 2'),
    ({'eval_batch_size': 9, 'num_shards': 2}, 'eval_batch_size 9 cannot be shared by 2'),
    ({'num_shards': 0}, 'num_shards must be'),
    ({'dtype_str': 'int8'}, "Unknown dtype_str 'int8'"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(errors.UserError, match=message):
    build(**options)


def test_trainval_without_validation_is_an_error():
  configs = {'train_split': 'trainval', 'num_val': 0, 'num_train': 4, 'num_test': 4}
  with pytest.raises(errors.UserError, match='no validation images'):
    build('sprites', dataset_configs=configs)


def test_digits_are_the_real_ones_split_once_and_evenly():
  parts = digits.splits()
  sizes = [len(part) for part in (parts.train, parts.valid, parts.test)]
  assert sizes == [800, 200, 797]
  names = [*ids(parts.train), *ids(parts.valid), *ids(parts.test)]
  assert sorted(names) == sorted(f'digits[{i}]' for i in range(1797))
  original = sklearn_datasets.load_digits()
  for part in (parts.train, parts.valid, parts.test):
    images, labels = images_of(part)
    indices = [int(name[7:-1]) for name in ids(part)]
    np.testing.assert_array_equal(labels, original.target[indices])
    np.testing.assert_allclose(images[..., 1], original.images[indices] * (255 / 16), atol=0.5)
    share = np.bincount(labels, minlength=10) / len(part)
    np.testing.assert_allclose(share, np.bincount(original.target) / 1797, atol=0.006)
  again = digits.splits()
  assert ids(again.train) == ids(parts.train) and ids(again.test) == ids(parts.test)
  # Pins the published split: a change here changes everybody's numbers.
  assert ids(parts.train)[:3] == ['digits[347]', 'digits[303]', 'digits[1266]']


def centre_of_mass(image: np.ndarray) -> np.ndarray:
  """(x, y) in image sides, as the centre of pixel i lies at (i + 1/2) / size."""
  weight = image[..., 0].astype(float)
  places = (np.arange(len(image)) + 0.5) / len(image)
  return np.array([weight.sum(0) @ places, weight.sum(1) @ places]) / weight.sum()


def test_sprites_x_position_determines_the_centre_of_mass():
  parts = sprites.splits(image_size=64, num_train=200, num_val=0, num_test=1)
  images, labels = images_of(parts.train)
  x = np.array([centre_of_mass(image)[0] for image in images])
  values = np.round((x - 0.25) / 0.5 * 31)
  np.testing.assert_allclose(x, 0.25 + 0.5 * values / 31, atol=0.004)  # A quarter pixel.
  np.testing.assert_array_equal(labels, values // 2)
  assert set(labels) == set(range(16)) and parts.class_names[3] == 'x_position_3'


def test_sprites_y_position_and_margins():
  rows = np.array(
    [[shape, 5, turn, 0, y] for shape in range(3) for turn in (0, 5) for y in (0, 31)]
  )
  images = sprites.render(rows, 64)
  for row, image in zip(rows, images, strict=True):
    np.testing.assert_allclose(centre_of_mass(image), [0.25, 0.75 if row[4] else 0.25], atol=0.004)
  border = np.concatenate([images[:, [0, -1]].ravel(), images[:, :, [0, -1]].ravel()])
  assert not border.any()


def test_sprites_orientation_turns_the_shape():
  rows = np.array([[1, 5, turn, 16, 16] for turn in range(40)])  # An ellipse, lying at turn 0.
  for turn, image in enumerate(sprites.render(rows, 64)):
    weight = image[..., 0] / image[..., 0].sum()
    places = (np.arange(64) + 0.5) / 64
    x, y = places - centre_of_mass(image)[0], places - centre_of_mass(image)[1]
    spread_x, spread_y = weight.sum(0) @ x**2, weight.sum(1) @ y**2
    angle = 0.5 * np.arctan2(2 * y @ weight @ x, spread_x - spread_y)
    difference = (angle - 2 * np.pi * turn / 40 + np.pi / 2) % np.pi - np.pi / 2
    assert abs(difference) < 0.02
  hearts = sprites.render(rows * [0, 1, 1, 1, 1] + [2, 0, 0, 0, 0], 32)
  assert len({heart.tobytes() for heart in hearts}) == 40


def test_sprites_symmetries_are_those_of_dsprites():
  def same(shape, one, other):
    images = sprites.render(np.array([[shape, 5, t, 16, 16] for t in (one, other)]), 64)
    return np.abs(images[0].astype(int) - images[1]).mean() < 0.5

  assert same(0, 3, 13) and not same(0, 3, 8)
  assert same(1, 3, 23) and not same(1, 3, 13)
  assert not same(2, 3, 23) and not same(2, 3, 13)


def test_sprites_scale_changes_the_area():
  images = sprites.render(np.array([[0, scale, 3, 16, 16] for scale in range(6)]), 64)
  area = images[..., 0].sum((1, 2)) / 255
  expected = (0.22**2 * 2 * 64**2) * np.linspace(0.5, 1, 6) ** 2
  np.testing.assert_allclose(area, expected, rtol=0.07)  # Outlines are drawn 1/8 pixel too wide.
  edges = np.unique(sprites.render(np.array([[1, 5, 3, 16, 16]]), 64))
  assert len(edges) > 10  # Antialiased: more than black and white.


def test_sprites_labels_follow_vtab():
  orientation = sprites.bins(np.arange(40), 40)
  assert orientation[[0, 2, 3, 39]].tolist() == [0, 0, 1, 15]
  np.testing.assert_array_equal(orientation, np.floor(np.arange(40) / 2.5))
  np.testing.assert_array_equal(sprites.bins(np.arange(32), 32), np.arange(32) // 2)


def test_sprites_are_deterministic_and_do_not_overlap():
  counts = {'num_train': 60, 'num_val': 20, 'num_test': 40}
  for label in sprites.LABELS:
    one = sprites.splits(image_size=16, label=label, **counts)
    other = sprites.splits(image_size=16, label=label, **counts)
    names = [*ids(one.train), *ids(one.valid), *ids(one.test)]
    assert len(set(names)) == len(names) == 120
    for part in ('train', 'valid', 'test'):
      for ours, theirs in zip(
        images_of(getattr(one, part)), images_of(getattr(other, part)), strict=True
      ):
        np.testing.assert_array_equal(ours, theirs)
    rows = sprites.factors(np.array([int(name[8:-1]) for name in ids(one.train)]))
    column = sprites.LABELS[label]
    expected = sprites.bins(rows[:, column], sprites.FACTOR_SIZES[column])
    np.testing.assert_array_equal(images_of(one.train)[1], expected)
  reseeded = sprites.splits(image_size=16, seed=1, **counts)
  assert ids(reseeded.train) != ids(one.train)
  assert len(np.unique(sprites.factors(np.arange(sprites.NUM_IMAGES)), axis=0)) == 737_280


def test_sprites_options():
  for options, message in (
    ({'label': 'y_position'}, "Unknown label of dataset 'sprites' 'y_position'"),
    ({'num_train': -1}, 'num_train must be'),
    ({'num_test': 737_280}, 'more than the 737,280'),
    ({'num_train': 0}, 'train split is empty'),
    ({'num_test': 0}, 'test split is empty'),
  ):
    with pytest.raises(errors.UserError, match=message):
      build('sprites', dataset_configs={'num_train': 4, 'num_val': 0, 'num_test': 4} | options)
