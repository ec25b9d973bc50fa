"""A user's folder: layouts, splits, and errors that name the file or folder."""

import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import dataset_utils, datasets, decode, image_folder, sources

# Of the folder `flat`: the test images, by class.
PINNED = ['10.png', '17.png', '3.png', '5.png', '1.png', '2.png']


def write(folder: pathlib.Path, names, colour: int) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  for name in names:
    Image.new('RGB', (10, 6), (colour,) * 3).save(
      folder / name, Image.registered_extensions()[pathlib.Path(name).suffix.lower()]
    )


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


def load(root, **options):
  return image_folder.splits(root=str(root), **options)


def ids(source) -> list[str]:
  return [source[i].id for i in range(len(source))]


def labels(source) -> list[int]:
  return [source[i].label for i in range(len(source))]


def test_split_folders(root):
  others = ['a.JPG', 'b.jpeg', 'c.WebP', 'd.gif', 'e.bmp', 'f.tif', 'g.TIFF']
  write(root / 'train' / 'cat', others, 20)
  for junk in ('.DS_Store', '.hidden.png', 'Thumbs.db', 'desktop.ini'):
    (root / 'train' / 'cat' / junk).write_bytes(b'junk')
  (root / 'train' / '.cache').mkdir()
  (root / 'README.md').write_text('about')
  splits = load(root)
  assert splits.class_names == ('cat', 'dog')
  assert [len(s) for s in (splits.train, splits.valid, splits.test)] == [19, 4, 6]
  for record in (splits.train[i] for i in range(19)):
    decoded = decode.decode(record.image, record.id)
    assert decoded.shape == (6, 10, 3)
    np.testing.assert_allclose(decoded, (20, 200)[record.label], atol=3)
    assert pathlib.Path(record.id).parent == root / 'train' / ('cat', 'dog')[record.label]
  assert labels(splits.train) == [0] * 13 + [1] * 6
  assert ids(splits.train) == sorted(ids(splits.train))
  assert pathlib.Path(splits.test[0].id) == root / 'test' / 'cat' / 'test0.png'
  assert splits.about == (
    f'train: 19 images in {root}/train',
    f'val: 4 images in {root}/val',
    f'test: 6 images in {root}/test',
  )


def test_missing_parts_are_split_off_train(root):
  for part in ('val', 'test'):
    for file in (root / part).rglob('*.png'):
      file.unlink()
    for name in ('cat', 'dog'):
      (root / part / name).rmdir()
    (root / part).rmdir()
  splits = load(root, val_fraction=0.17, test_fraction=0.34)
  assert [len(s) for s in (splits.train, splits.valid, splits.test)] == [6, 2, 4]
  assert splits.about == (
    f'train: 12 images in {root}/train',
    'test: 4 images split off train (test_fraction 0.34, split_seed 0)',
    'val: 2 images split off train (val_fraction 0.17, split_seed 0)',
  )
  assert load(root, val_fraction=0).valid is None


def test_flat_split_is_stratified_disjoint_and_deterministic(flat):
  (flat / 'notes.txt').write_text('beside the class folders')
  splits = load(flat)
  parts = (splits.train, splits.valid, splits.test)
  assert [np.bincount(labels(part)).tolist() for part in parts] == [[14, 7], [2, 1], [4, 2]]
  names = [name for part in parts for name in ids(part)]
  assert len(set(names)) == 30
  assert ids(load(flat).train) == ids(splits.train)
  assert ids(load(flat, split_seed=1).train) != ids(splits.train)
  # Pins the split: a change here changes everybody's numbers.
  assert [pathlib.Path(name).name for name in ids(splits.test)] == PINNED
  # Another class does not move the images of these.
  write(flat / 'ant', [f'{i}.png' for i in range(5)], 0)
  assert set(ids(splits.test)) < set(ids(load(flat).test))


def test_a_class_may_be_called_train(flat):
  write(flat / 'train', [f'{i}.png' for i in range(10)], 90)
  assert load(flat).class_names == ('cat', 'dog', 'train')


def test_runs_through_build_dataset(flat):
  dataset = datasets.build_dataset(
    'image_folder',
    batch_size=4,
    eval_batch_size=4,
    image_size=8,
    dataset_configs={'root': str(flat), 'train_split': 'trainval'},
  )
  assert dataset.meta_data['num_train_examples'] == 24
  batches = list(dataset_utils.iterate(dataset.test_ds))
  assert sum(batch['batch_mask'].sum() for batch in batches) == 6
  for batch in batches:
    real = batch['batch_mask'] > 0
    bright = batch['inputs'][real].mean((1, 2, 3)) > 100
    np.testing.assert_array_equal(bright, batch['label'][real])


def test_no_file_is_opened_before_it_is_asked_for(flat):
  for file in flat.rglob('*.png'):
    file.write_bytes(b'')
  assert len(load(flat).train) == 21


def test_root_is_required_and_must_be_a_folder(tmp_path):
  for root in (None, ''):
    with pytest.raises(errors.UserError, match=r'--config\.dataset_configs\.root=PATH'):
      image_folder.splits(root=root)
  with pytest.raises(errors.UserError, match='nowhere: there is no such file or folder'):
    load(tmp_path / 'nowhere')
  (tmp_path / 'file').write_text('x')
  with pytest.raises(errors.UserError, match='file: not a folder'):
    load(tmp_path / 'file')
  (tmp_path / 'file').unlink()
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
  check(root, 'val_fraction is given, but the set has its own val images', val_fraction=0.1)
  check(root, 'test_fraction is given, but the set has its own test images', test_fraction=0.1)
  small = tmp_path_factory.mktemp('small')
  write(small / 'cat', ['1.png', '2.png'], 0)
  check(small, "Class 'cat': 2 images are too few")
  check(small, r'test_fraction must be a number in \[0, 1\)', test_fraction=1)
  check(small, r'val_fraction must be a number in \[0, 1\)', val_fraction=-0.1)
  check(small, 'no test images', test_fraction=0)


@pytest.mark.parametrize('name', ['x.txt', 'x', 'x.jpg.bak', 'x.svg', 'x.heic'])
def test_files_that_are_not_named_as_images(root, name):
  (root / 'val' / 'dog' / name).write_bytes(b'hello')
  check(root, rf'val/dog/{name}: not an image; class folders may hold \.jpg, .*\.tiff\.$')


def test_files_that_are_no_images_are_replaced_and_listed(root):
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
  file = root / 'train' / 'cat' / 'zz.jpg'
  Image.fromarray(noise).save(file)
  file.write_bytes(file.read_bytes()[:1500])
  (root / 'train' / 'dog' / 'page.png').write_bytes(b'<html>404</html>')
  (root / 'test' / 'dog' / 'empty.gif').write_bytes(b'')
  options = {'batch_size': 14, 'eval_batch_size': 4, 'image_size': 8}

  def build(fraction: float):
    configs = {'root': str(root), 'max_bad_fraction': fraction}
    return datasets.build_dataset('image_folder', **options, dataset_configs=configs)

  dataset = build(0.2)
  (batch,) = dataset_utils.iterate(dataset.train_ds, 0, 1)
  assert sorted(batch['index']) == list(range(14)) and batch['batch_mask'].all()
  bright = batch['inputs'].mean((1, 2, 3)) > 100
  np.testing.assert_array_equal(bright, batch['label'])
  tested = list(dataset_utils.iterate(dataset.test_ds))
  assert sum(batch['batch_mask'].sum() for batch in tested) == 6
  problems = dataset.train_ds.bad_files.problems.values()
  assert {(p.split, pathlib.Path(p.id).name, p.reason) for p in problems} == {
    ('train', 'zz.jpg', 'the image is truncated or corrupt'),
    ('train', 'page.png', 'not a JPEG, PNG, WebP, GIF, BMP or TIFF image'),
    ('test', 'empty.gif', 'the file is empty'),
  }
  # Two of fourteen are too many unless the user allows them.
  with pytest.raises(errors.UserError, match=r'train/(cat/zz\.jpg|dog/page\.png): .*at most 0'):
    list(dataset_utils.iterate(build(0.01).train_ds, 0, 1))


def test_what_is_no_file_is_refused_and_links_are_followed(root):
  folder = root / 'val' / 'dog'
  (folder / 'link.png').symlink_to(root / 'val' / 'cat' / 'val0.png')
  (folder / 'nowhere.png').symlink_to('gone.png')
  (folder / 'round.png').symlink_to('round.png')
  valid = load(root).valid
  assert [pathlib.Path(file).name for file in valid.files[2:]] == [
    'link.png',
    'nowhere.png',
    'round.png',
    'val0.png',
    'val1.png',
  ]
  assert valid[2].image == (root / 'val' / 'cat' / 'val0.png').read_bytes()
  for dangling in (3, 4):
    with pytest.raises(sources.BadImage, match='cannot be read'):
      valid[dangling]
  os.mkfifo(folder / 'pipe.png')
  check(root, r'val/dog/pipe\.png: neither a file nor a link to one')
  (folder / 'pipe.png').rename(root / 'pipe')
  (folder / 'to_pipe.png').symlink_to(root / 'pipe')
  check(root, r'val/dog/to_pipe\.png: neither a file nor a link to one')


def test_a_root_of_a_very_long_name_is_not_there():
  check('x' * 5000, 'there is no such file or folder')
