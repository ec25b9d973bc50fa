"""`python -m losa_scenic.data`: what check finds, what show draws, and the exit codes."""

import csv
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from losa_scenic import data
from losa_scenic.dataset_lib import contact_sheet, dataset_utils, datasets, sprites

SIZE = (40, 30)  # width, height
CLASSES = ('cat', 'dog')


def noise(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
  return Image.fromarray(
    np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
  )


@pytest.fixture
def root(tmp_path) -> pathlib.Path:
  """12 training, 4 validation and 4 test images of two classes; nothing is wrong with them."""
  folder = tmp_path / 'photos'
  for part, count in (('train', 6), ('val', 2), ('test', 2)):
    for label, name in enumerate(CLASSES):
      where = folder / part / name
      where.mkdir(parents=True)
      for i in range(count):
        noise(100 * len(part) + 10 * label + i).save(where / f'{i}.png')
  return folder


def copy(source: pathlib.Path, target: pathlib.Path) -> None:
  target.write_bytes(source.read_bytes())


def run(capsys, *arguments: object) -> tuple[int, str, str]:
  code = data.main([str(argument) for argument in arguments])
  return code, *capsys.readouterr()


def report(capsys, *arguments: object) -> dict:
  return json.loads(run(capsys, 'check', *arguments, '--json')[1])


def test_a_good_set_is_fine(root, capsys):
  code, out, _ = run(capsys, 'check', root, '--jobs=2', '--image-size=32')
  assert code == 0
  assert out.splitlines()[-1] == 'fine: 20 images, nothing to mend'
  assert 'all images are 40 x 30 pixels' in out
  assert 'PNG RGB  20' in out
  found = report(capsys, root)
  assert {name: part['images'] for name, part in found['parts'].items()} == {
    'train': 12,
    'valid': 4,
    'test': 4,
  }
  assert found['parts']['train']['class_counts'] == [6, 6]
  stored = sum(file.stat().st_size for file in root.rglob('*.png'))
  assert sum(part['bytes'] for part in found['parts'].values()) == stored
  assert found['troubles'] == []
  assert found['reading']['images_per_second'] > 0
  assert found['reading']['decoded_bytes'] == 12 * 224 * 224 * 3


def test_progress_is_told_in_lines(root, capsys, monkeypatch):
  monkeypatch.setattr(data, '_SECONDS_BETWEEN_LINES', 0.0)
  lines = run(capsys, 'check', root, '--jobs=1')[2].splitlines()
  assert [line.split(' images')[0] for line in lines] == ['12 of 20', '16 of 20', '20 of 20']


def test_broken_files_are_listed(root, capsys, tmp_path):
  noise(1, (300, 300)).save(root / 'train' / 'cat' / 'cut.jpg')
  whole = (root / 'train' / 'cat' / 'cut.jpg').read_bytes()
  (root / 'train' / 'cat' / 'cut.jpg').write_bytes(whole[: len(whole) // 2])
  (root / 'test' / 'dog' / 'empty.png').write_bytes(b'')
  (root / 'val' / 'dog' / 'page.jpg').write_text('<html>not found</html>')
  code, out, _ = run(capsys, 'check', root, f'--csv={tmp_path / "bad.csv"}')
  assert code == 1
  assert out.splitlines()[-1] == 'trouble: 3 images cannot be read'
  assert f'{root}/test/dog/empty.png: the file is empty' in out
  with (tmp_path / 'bad.csv').open(newline='') as file:
    rows = list(csv.DictReader(file))
  names = [(row['problem'], row['split'], pathlib.Path(row['id']).name) for row in rows]
  assert names == [
    ('broken', 'train', 'cut.jpg'),
    ('broken', 'valid', 'page.jpg'),
    ('broken', 'test', 'empty.png'),
  ]


def test_a_leak_between_train_and_test_is_found(root, capsys, tmp_path):
  copy(root / 'train' / 'cat' / '2.png', root / 'test' / 'cat' / 'same.png')
  code, out, _ = run(capsys, 'check', root, f'--csv={tmp_path / "leak.csv"}')
  assert code == 1
  assert out.splitlines()[-1] == 'trouble: 1 image of test also in train'
  assert f'test {root}/test/cat/same.png = train {root}/train/cat/2.png' in out
  (row,) = csv.DictReader((tmp_path / 'leak.csv').open(newline=''))
  assert (row['problem'], row['id']) == ('leak', f'{root}/test/cat/same.png')
  # Training on both parts, the same image in train and valid is a duplicate, no leak.
  copy(root / 'train' / 'dog' / '1.png', root / 'val' / 'dog' / 'same.png')
  (root / 'test' / 'cat' / 'same.png').unlink()
  assert report(capsys, root)['leaks'] == {'train/valid': 1}
  both = report(capsys, root, '--set', 'train_split=trainval')
  assert (both['leaks'], both['parts']['train']['duplicates']) == ({}, 1)


def test_duplicates_are_no_trouble_but_two_labels_are(root, capsys):
  copy(root / 'train' / 'cat' / '0.png', root / 'train' / 'cat' / 'again.png')
  code, out, _ = run(capsys, 'check', root)
  assert code == 0
  assert 'images that repeat one of their own split: 1 in train' in out
  copy(root / 'train' / 'cat' / '0.png', root / 'train' / 'dog' / 'wrong.png')
  code, out, _ = run(capsys, 'check', root)
  assert code == 1
  assert out.splitlines()[-1] == 'trouble: 1 image repeated with another label'
  assert f'{root}/train/dog/wrong.png (dog) = train {root}/train/cat/0.png (cat)' in out


def opened(path: pathlib.Path) -> np.ndarray:
  with Image.open(path) as image:
    assert image.format == 'PNG'
    return np.asarray(image)


def test_show_draws_what_training_sees(root, capsys, tmp_path):
  output = tmp_path / 'sheet.png'
  arguments = ('show', root, '--image-size=150', '--count=6', f'--output={output}')
  augment = ('--augment', 'min_crop_area=0.3', '--augment', 'mixup_alpha=1')
  code, out, _ = run(capsys, *arguments, *augment, '--epoch=1', '--seed=3')
  picture = opened(output)
  assert code == 0
  assert f'{picture.shape[1]} x {picture.shape[0]} pixels' in out
  assert picture.shape == (20 + 154 + contact_sheet.caption_height(), 6 * 154, 3)
  ds = datasets.build_dataset(
    'image_folder',
    batch_size=4,
    eval_batch_size=4,
    image_size=150,
    shuffle_seed=3,
    dataset_configs={'root': str(root)},
    augment={'min_crop_area': 0.3, 'mixup_alpha': 1.0},
  ).train_ds
  batches = list(dataset_utils.iterate(ds, 3, 5))  # 12 images an epoch.
  shown = np.concatenate([batch['inputs'] for batch in batches])[:6]
  for i in range(6):
    x = i * 154 + 2
    np.testing.assert_array_equal(picture[22 : 22 + 150, x : x + 150], shown[i])
  run(capsys, *arguments, *augment, '--seed=3')
  assert not np.array_equal(opened(output), picture)  # Epoch 0.


def test_epochs_stand_side_by_side(root, capsys, tmp_path):
  output = tmp_path / 'epochs.png'
  arguments = ('show', root, '--image-size=16', f'--output={output}', '--epochs=3', '--count=3')
  cell = 112 + 4
  run(capsys, *arguments, '--augment', 'min_crop_area=0.2')
  picture = opened(output)
  height = cell + contact_sheet.caption_height()
  assert picture.shape == (40 + 3 * height, 3 * cell, 3)
  cells = picture[40 : 40 + cell].reshape(cell, 3, cell, 3).swapaxes(0, 1)
  assert not np.array_equal(cells[0], cells[1])
  assert not np.array_equal(cells[1], cells[2])
  run(capsys, *arguments)  # Nothing is random.
  cells = opened(output)[40 : 40 + cell].reshape(cell, 3, cell, 3).swapaxes(0, 1)
  np.testing.assert_array_equal(cells[0], cells[1])


def test_a_config_file_says_what_is_shown(root, capsys, tmp_path):
  output = tmp_path / 'run.png'
  config = pathlib.Path(__file__).parents[2] / 'configs' / 'quickstart.py'
  arguments = ('show', config, '--split=test', '--count=2', f'--output={output}')
  code, _, err = run(capsys, *arguments)
  assert (code, err) == (0, '')
  # The backbone reads 64 x 64 pixels; they are shown twice as large.
  assert opened(output).shape == (20 + 132 + contact_sheet.caption_height(), 2 * 132, 3)
  overrides = ('--config.dataset_name=auto', f'--config.dataset_configs.root={root}')
  found = report(capsys, config, *overrides)
  assert found['name'] == f'image_folder {root}'
  assert found['image_size'] == 64


@pytest.mark.parametrize(
  ('arguments', 'said'),
  [
    ('check digit', "Did you mean 'digits'?"),
    ('check ROOT/trian', "Did you mean 'ROOT/train'?"),
    ('check ROOT/config.py', 'is neither a file or folder nor the name of a data set'),
    ('check digits --set foo=1', "Unknown option of dataset 'digits' 'foo'"),
    ('check digits --set central_crop=x', 'central_crop must be of type float'),
    ('check vtab', '--set task='),
    ('check digits --set metric', "--set takes KEY=VALUE, not 'metric'"),
    ('check digits --set metric=accuracy --set metric=per_class', '--set metric is given twice'),
    ('check digits --set max_bad_fraction=7', 'max_bad_fraction must be in [0, 1)'),
    ('check digits --set normalisation=imagnet', "Did you mean 'imagenet'?"),
    ('check digits --set metric=foo', "Unknown metric 'foo'"),
    ('check digits --set cache_gigabytes=-1', 'cache_gigabytes must be at least 0'),
    ('check digits --set image_size=0', 'image_size must be an integer of at least 1'),
    ('show digits --output=ROOT/a.png --set max_bad_fraction=7', 'max_bad_fraction must be in'),
    ('check CONFIG --config.dataset_configs.metric=foo', "Unknown metric 'foo'"),
    (f'check {"x" * 300}', 'is neither a file or folder'),
    (f'check ROOT/{"x" * 300}/a', 'is neither a file or folder'),
    (f'check {"x" * 300}.py', 'is neither a file or folder'),
    (f'check digits --csv={"x" * 300}/a.csv', 'there is no such folder'),
    ('check ~nobody-of-that-name/photos', 'is neither a file or folder'),
    ('check digits --jobs=0', '--jobs must be at least 1'),
    ('check digits --csv=ROOT/nowhere/a.csv', 'there is no such folder'),
    ('check digits --config.batch_size=3', 'goes with a config file alone'),
    ('check CONFIG --image-size=32', 'use --config.backbone_configs.image_size=VALUE'),
    ('check CONFIG --config.batch_sise=32', "Did you mean 'batch_size'?"),
    ('show digits --output=a.jpg', 'must be a .png file'),
    ('show digits --output=ROOT/a.png --augment flipp=true', "Did you mean 'flip'?"),
    ('show digits --output=ROOT/a.png --augment flip=true --split=test', 'is of training'),
    ('show digits --output=ROOT/a.png --split=test --epochs=2', 'never change'),
    ('show digits --output=ROOT/a.png --count=0', '--count must be'),
  ],
)
def test_wrong_usage_ends_with_2(root, capsys, arguments, said):
  config = pathlib.Path(__file__).parents[2] / 'configs' / 'quickstart.py'
  places = {'ROOT': str(root), 'CONFIG': str(config)}
  for name, place in places.items():
    arguments, said = arguments.replace(name, place), said.replace(name, place)
  code, out, err = run(capsys, *arguments.split())
  assert (code, out) == (2, '')
  assert err.startswith('error: ')
  assert said in err


def test_names_that_are_no_text_are_shown_and_listed(root, tmp_path):
  # Names of files are bytes: this one is Latin-1.
  broken, again = (os.fsencode(root / 'train' / 'cat') + name for name in (b'/caf\xe9', b'/r\xe9'))
  pathlib.Path(os.fsdecode(broken + b'.jpg')).write_text('no image')
  copy(root / 'train' / 'cat' / '0.png', pathlib.Path(os.fsdecode(again + b'.png')))
  done = subprocess.run(
    [sys.executable, '-m', 'losa_scenic.data', 'check', root, f'--csv={tmp_path / "bad.csv"}'],
    env={**os.environ, 'PYTHONIOENCODING': 'utf-8', 'PYTHONUTF8': '0'},
    capture_output=True,
  )
  assert done.returncode == 1, done.stderr
  assert rb'train/cat/caf\udce9.jpg' in done.stdout
  assert done.stdout.endswith(b'trouble: 1 image cannot be read\n')
  listed = (tmp_path / 'bad.csv').read_bytes()
  assert broken in listed and again in listed


def test_sprites_that_look_the_same_are_expected(capsys):
  counts = ('--set', 'num_train=2000', '--set', 'num_val=0', '--set', 'num_test=2000')
  arguments = ('sprites', '--set', 'label=orientation', *counts, '--image-size=16')
  code, out, _ = run(capsys, 'check', *arguments)
  *_, leaks, labels, verdict = out.splitlines()
  assert code == 0
  assert re.fullmatch(r'note: \d+ images? of test also in train \(symmetric shapes .*\)', leaks)
  assert re.fullmatch(r'note: \d+ images? repeated with another label \(symm.*\)', labels)
  assert verdict == 'fine: 4,000 images, nothing to mend'
  # The reason is true: they are squares and ellipses that differ by a turn alone.
  for repeat in report(capsys, *arguments)['repeats']:
    numbers = [int(repeat[which]['id'][8:-1]) for which in ('again', 'first')]
    again, first = sprites.factors(np.array(numbers))
    assert sprites.SHAPES[again[0]] in ('square', 'ellipse')
    assert (again != first).nonzero()[0].tolist() == [sprites.LABELS['orientation']]


def test_unknown_flags_end_with_2(capsys):
  with pytest.raises(SystemExit) as end:
    data.main(['check', 'digits', '--imagesize=3'])
  assert end.value.code == 2
  assert '--imagesize=3' in capsys.readouterr().err


def test_a_path_wins_only_if_it_exists(root, capsys, monkeypatch):
  monkeypatch.chdir(root.parent)
  assert report(capsys, 'digits')['name'] == 'digits'
  root.rename(root.parent / 'digits')
  assert report(capsys, 'digits')['name'] == 'image_folder digits'


@pytest.mark.parametrize(
  ('partner', 'share', 'caption'),
  [
    (None, 1.0, ('cat',)),
    (0, 0.4, ('cat',)),
    (1, 0.7, ('cat 70 %', '+ dog 30 %')),
    (1, 0.999, ('cat',)),
    (1, 0.001, ('dog',)),
  ],
)
def test_captions_of_mixed_images(partner, share, caption):
  assert contact_sheet.mixed_caption(CLASSES, 0, partner, share) == caption
