"""A run on a user's folder in which one file in a hundred is broken."""

import csv
import json
import pathlib

import numpy as np
import pytest
from PIL import Image
from reference import broken_images

TRAIN, TEST = 800, 100


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
  """Dark and bright images; eight kinds of broken files to train on, one to test with."""
  root, rng = tmp_path / 'pets', np.random.default_rng(0)
  for part, count in (('train', TRAIN), ('test', TEST)):
    for i in range(count):
      file = root / part / ('cat', 'dog')[i % 2] / f'{i:03}.png'
      file.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(rng.integers(0, 60, (9, 9, 3), np.uint8) + np.uint8(i % 2 * 180)).save(file)
  for k, body in enumerate(broken_images.kinds().values()):
    file = root / 'train' / 'cat' / f'{100 * k:03}.png'
    file.unlink()
    file.symlink_to('nowhere') if body is None else file.write_bytes(body)
  (root / 'test' / 'dog' / '001.png').write_bytes(b'')
  return root


def test_the_run_finishes_and_lists_each_broken_file_once(folder, cli, tmp_path):
  run = (
    '--config.dataset_name=auto',
    f'--config.dataset_configs.root={folder}',
    '--config.dataset_configs.val_fraction=0.0',
    '--config.augment.flip=True',
  )
  workdir = tmp_path / 'run'
  status, printed = cli(*run, '--config.num_training_steps=70', workdir=workdir)
  assert status == 0, printed
  assert 'data: train: 800 images in' in printed and 'data: 2 classes (cat, dog)' in printed
  with (workdir / 'bad_files.csv').open(newline='') as file:
    rows = list(csv.DictReader(file))
  trained = [f'{folder}/train/cat/{100 * k:03}.png' for k in range(8)]
  assert sorted(row['id'] for row in rows) == sorted([*trained, f'{folder}/test/dog/001.png'])
  reasons = {row['id']: row['reason'] for row in rows}
  assert reasons[trained[0]] == 'cannot be read (No such file or directory)'
  assert {row['split'] for row in rows} == {'train', 'test'}
  summary = json.loads((workdir / 'summary.json').read_text())
  assert summary['bad_images'] == 9 and summary['num_train_examples'] == TRAIN
  assert 'bad images' in printed and '9, see bad_files.csv' in printed
  # Of 99 readable test images, each counts once.
  hits = summary['test_accuracy'] * 99
  assert hits == pytest.approx(round(hits), abs=1e-3)
  status, _ = cli(*run, '--config.num_training_steps=70', workdir=workdir)
  assert status == 0 and (workdir / 'bad_files.csv').read_text().count('\n') == 10


def test_more_than_the_allowed_share_ends_the_run(folder, cli, tmp_path):
  status, printed = cli(
    '--config.dataset_name=auto',
    f'--config.dataset_configs.root={folder}',
    '--config.dataset_configs.max_bad_fraction=0.005',
    '--config.num_training_steps=60',
    workdir=tmp_path / 'run',
  )
  assert status == 1 and 'unreadable image' in printed and 'max_bad_fraction = 0.005' in printed
  assert 'Traceback' not in printed
