"""A user's folder: layouts, splits, and errors that name the file or folder."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import dataset_utils, datasets, image_folder


def write(folder: pathlib.Path, names, colour: int) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  for name in names:
    kind = pathlib.Path(name).suffix.lower().lstrip('.').replace('jpg', 'jpeg')
    Image.new('RGB', (10, 6), (colour,) * 3).save(folder / name, kind)


@pytest.fixture
def root(tmp_path) -> pathlib.Path:
  """train/, val/ and test/ with classes 'cat' (dark) and 'dog' (bright)."""
  for part, count in (('train', 6), ('val', 2), ('test', 3)):
    for name, colour in (('cat', 20), ('dog', 200)):
      write(tmp_path / part / name, [f'{part}{i}.png' for i in range(count)], colour)
  return tmp_path


@pytest.fixture
def flat(tmp_path) -> pathlib.Path:
  for name, colour, count in (('cat', 20, 20), ('dog', 200, 10)):
    write(tmp_path / name, [f'{i}.png' for i in range(count)], colour)
  return tmp_path


def load(path, **options):
  return image_folder.splits(image_size=8, path=str(path), **options)


def test_split_folders(root):
  write(root / 'train' / 'cat', ['a.JPG', 'b.jpeg', 'c.WebP'], 20)
  for junk in ('.DS_Store', '.hidden.png', 'Thumbs.db'):
    (root / 'train' / 'cat' / junk).write_bytes(b'junk')
  (root / 'train' / '.cache').mkdir()
  (root / 'README.md').write_text('about')
  splits = load(root)
  assert splits.class_names == ('cat', 'dog')
  assert [len(s) for s in (splits.train, splits.valid, splits.test)] == [15, 4, 6]
  images, labels = splits.train.fetch(np.arange(15))
  assert images.shape == (15, 8, 8, 3)
  np.testing.assert_allclose(images.mean((1, 2, 3)), np.where(labels, 200, 20), atol=3)
  assert labels.tolist() == [0] * 9 + [1] * 6
  assert list(splits.train.ids) == sorted(splits.train.ids)
  assert pathlib.Path(splits.test.ids[0]) == root / 'test' / 'cat' / 'test0.png'


def test_missing_parts_are_split_off_train(root):
  for part in ('val', 'test'):
    for file in (root / part).rglob('*.png'):
      file.unlink()
    for name in ('cat', 'dog'):
      (root / part / name).rmdir()
    (root / part).rmdir()
  splits = load(root, val_fraction=0.17, test_fraction=0.34)
  assert [len(s) for s in (splits.train, splits.valid, splits.test)] == [6, 2, 4]
  assert load(root, val_fraction=0).valid is None


def test_flat_split_is_stratified_disjoint_and_deterministic(flat):
  (flat / 'notes.txt').write_text('beside the class folders')
  splits = load(flat)
  parts = (splits.train, splits.valid, splits.test)
  counts = [np.bincount(part.fetch(np.arange(len(part)))[1]).tolist() for part in parts]
  assert counts == [[14, 7], [2, 1], [4, 2]]
  names = [name for part in parts for name in part.ids]
  assert len(set(names)) == 30
  assert load(flat).train.ids == splits.train.ids
  assert load(flat, split_seed=1).train.ids != splits.train.ids
  # Another class does not move the images of these.
  write(flat / 'ant', [f'{i}.png' for i in range(5)], 0)
  assert set(splits.test.ids) < set(load(flat).test.ids)


def test_a_class_may_be_called_train(flat):
  write(flat / 'train', [f'{i}.png' for i in range(10)], 90)
  assert load(flat).class_names == ('cat', 'dog', 'train')


def test_runs_through_build_dataset(flat):
  dataset = datasets.build_dataset(
    'image_folder',
    batch_size=4,
    eval_batch_size=4,
    image_size=8,
    dataset_configs={'path': str(flat), 'train_split': 'trainval'},
  )
  assert dataset.meta_data['num_train_examples'] == 24
  batches = list(dataset_utils.iterate(dataset.test_ds))
  assert sum(batch['batch_mask'].sum() for batch in batches) == 6
  for batch in batches:
    real = batch['batch_mask'] > 0
    bright = batch['inputs'][real].mean((1, 2, 3)) > 100
    np.testing.assert_array_equal(bright, batch['label'][real])


def test_path_is_required_and_must_exist(tmp_path):
  for path in (None, ''):
    with pytest.raises(errors.UserError, match=r'--config\.dataset_configs\.path=DIR'):
      image_folder.splits(image_size=8, path=path)
  with pytest.raises(errors.UserError, match='nowhere: there is no such folder'):
    load(tmp_path / 'nowhere')
  with pytest.raises(errors.UserError, match='no class folders'):
    load(tmp_path)


def check(root, message, **options):
  with pytest.raises(errors.UserError, match=message):
    load(root, **options)


def test_wrong_folders(root):
  (root / 'valid').mkdir()
  check(root, "'valid'. Did you mean 'val'")
  (root / 'valid').rmdir()
  write(root / 'test' / 'dgo', ['x.png'], 0)
  check(root, r"test/dgo \(not in train\): 'dgo'. Did you mean 'dog'")
  (root / 'test' / 'dgo' / 'x.png').unlink()
  check(root, 'test/dgo: the class folder is empty')
  (root / 'test' / 'dgo').rmdir()
  (root / 'train' / 'cat' / 'more').mkdir()
  check(root, 'train/cat/more: a folder inside')
  (root / 'train' / 'cat' / 'more').rmdir()
  write(root / 'train', ['stray.png'], 0)
  check(root, r'train/stray\.png: an image outside')
  (root / 'train' / 'stray.png').unlink()
  (root / 'train').rename(root / 'train_')
  check(root, "'train_'. Did you mean 'train'")
  (root / 'train_').rename(root.parent / f'{root.name}_elsewhere')
  check(root, "there is 'test/' but no 'train/'")


def test_wrong_fractions(root, tmp_path_factory):
  check(root, 'val_fraction is given, but .*val exists', val_fraction=0.1)
  small = tmp_path_factory.mktemp('small')
  write(small / 'cat', ['1.png', '2.png'], 0)
  check(small, 'cat: 2 images are too few')
  check(small, r'test_fraction must be a number in \[0, 1\)', test_fraction=1)
  check(small, r'val_fraction must be a number in \[0, 1\)', val_fraction=-0.1)
  check(small, 'no test images', test_fraction=0)


@pytest.mark.parametrize(
  ('name', 'body'),
  [('x.png', b''), ('x.jpg', b'<html>404</html>'), ('x.txt', b'hello'), ('x', b''), ('x.gif', b'')],
)
def test_files_that_are_not_images(root, name, body):
  (root / 'val' / 'dog' / name).write_bytes(body)
  check(root, f'val/dog/{name}: ')


def test_a_truncated_image_is_named_when_fetched(root):
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
  file = root / 'train' / 'cat' / 'zz.jpg'
  Image.fromarray(noise).save(file)
  file.write_bytes(file.read_bytes()[:1500])
  dataset = datasets.build_dataset(
    'image_folder',
    batch_size=16,
    eval_batch_size=4,
    image_size=8,
    dataset_configs={'path': str(root)},
  )
  with pytest.raises(errors.UserError, match=r'train/cat/zz\.jpg'):
    list(dataset_utils.iterate(dataset.train_ds, 0, 2))
