"""A folder is recognised by the names in it."""

import os
import pathlib
import re

import pytest

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import datasets, detect

SHARED = pathlib.Path(
  os.environ.get('LOSA_SHARED_DATA', pathlib.Path(__file__).parents[3] / 'shared' / 'data')
)
SOMETHING = ('labels', 'train', 'validation')
CASES = [
  ('image_pack', ['x.npz'], 'x.npz'),
  ('image_list', ['some.csv'], 'some.csv'),
  ('image_list', ['train800.txt', 'val200.txt', 'test.txt', 'images/train/0.jpg'], ''),
  ('image_list', ['labels.tsv', 'README.md', 'images/0.jpg'], ''),
  ('image_list', ['train.csv', 'test.csv', 'cat/0.jpg', 'dog/0.jpg'], ''),
  ('coco', ['train2018.json', 'val2018.json', 'train_val2018/Aves/3/x.jpg'], ''),
  ('coco', ['train.json', 'val.json', 'train/00000_A/x.jpg', 'val/00000_A/x.jpg'], ''),
  ('coco', ['train_mini.json', 'val.json'], ''),
  ('tar_shards', ['train-000.tar', 'val-000.tar'], ''),
  ('tar_shards', ['train/000.tar', 'classes.txt'], ''),
  ('tar_shards', ['x.tar.gz'], 'x.tar.gz'),
  ('hugging_face', ['dataset_dict.json', 'train/state.json', 'train/data-0.arrow'], ''),
  ('hugging_face', ['state.json', 'dataset_info.json', 'data-0.arrow'], ''),
  ('hugging_face', ['README.md', 'data/train-00000-of-00001.parquet'], ''),
  ('tfds', ['dataset_info.json', 'features.json', 'x-test.array_record-0-of-1'], ''),
  ('tfds', ['dataset_info.json', 'features.json', 'x-test.parquet-0-of-1.parquet'], ''),
  ('tfds', ['1.0.0/dataset_info.json', '1.0.0/features.json'], ''),
  ('tfds', ['config/1.0.0/dataset_info.json', 'config/1.0.0/features.json'], ''),
  ('image_folder', ['train/cat/0.jpg', 'train/dog/0.jpg', 'test/cat/1.jpg'], ''),
  ('image_folder', ['cat/0.JPEG', 'dog/0.png', 'README.md'], ''),
  ('clip_folder', ['train/run/0.mp4', 'train/jump/0.avi', 'test/run/1.mp4'], ''),
  ('clip_folder', ['run/0.MP4', 'jump/0.webm', 'README.md'], ''),
  ('image_folder', ['cat/0.gif', 'dog/0.gif'], ''),
  ('clip_list', ['train.csv', 'test.csv', 'clips/0.mp4'], ''),
  ('clip_list', ['train.txt', 'a/b/c/0.mkv'], ''),
  ('clip_list', ['labels.tsv', 'clips/0.mp4'], ''),
  ('clip_list', ['some.csv', 'clips/0.mp4'], 'some.csv'),
  ('clip_list', ['clips.csv', 'run/0.mp4', 'jump/0.mp4'], ''),
  ('clip_list', ['clips.csv', 'notes.csv', 'run/0.mp4', 'run/0.jpg'], ''),
  ('image_list', ['clips.csv', 'images/0.jpg'], ''),
  ('image_list', ['train800.txt', 'clips/0.gif'], ''),
  ('kinetics', ['annotations/train.csv', 'annotations/val.csv', 'train/run/a.mp4'], ''),
  ('kinetics', ['train.csv', 'validate.csv', 'test.csv', 'train/run/a.mp4'], ''),
  ('kinetics', ['kinetics_train.csv', 'kinetics_val.csv', 'a.mp4'], ''),
  ('something_v2', ['labels.json', 'train.json', 'validation.json', 'test.json', 'v/1.webm'], ''),
  ('something_v2', [f'labels/{name}.json' for name in ('labels', 'train', 'validation')], ''),
  ('something_v2', [f'something-something-v2-{x}.json' for x in SOMETHING], ''),
]


def make(root: pathlib.Path, names) -> None:
  for name in names:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).touch()


@pytest.mark.parametrize(('expected', 'names', 'at'), CASES)
def test_what_it_is(tmp_path, expected, names, at):
  make(tmp_path, names)
  assert detect.detect(str(tmp_path / at)) == expected


def test_the_shared_clips_are_a_list():
  folder = SHARED / 'video' / 'fight'
  if not folder.is_dir():
    pytest.skip(f'no clips in {folder}')
  assert detect.detect(str(folder)) == detect.detect(str(folder / 'clips.csv')) == 'clip_list'


def test_every_answer_is_a_data_set():
  assert {expected for expected, *_ in CASES} == set(detect.SIGNS) <= set(datasets.DATASETS)


@pytest.mark.parametrize(
  ('names', 'message'),
  [
    (
      ['train.txt', 'train-0.tar'],
      r"looks like 'image_list' \(train\.txt\) and 'tar_shards' \(train-0\.tar\): choose with "
      r'--config\.dataset_name=image_list',
    ),
    (
      ['notes.csv', 'cat/0.jpg', 'dog/0.jpg'],
      r"'image_list' \(notes\.csv\) and 'image_folder' \(cat/ and dog/ with images\)",
    ),
    (
      ['notes.csv', 'run/0.mp4', 'jump/0.mp4'],
      r"'clip_list' \(notes\.csv\) and 'clip_folder' \(jump/ and run/ with clips\)",
    ),
    (
      ['train.csv', 'images/0.jpg', 'clips/0.mp4'],
      r"'image_list' \(train\.csv\) and 'clip_list' \(train\.csv\)",
    ),
    (
      ['train/a/0.jpg', 'train/b/0.mp4'],
      r"'image_folder' \(train/ with folders\) and 'clip_folder' \(train/ with folders of clips\)",
    ),
    (
      # Kinetics' own tables, or lists of paths that another project made of it.
      ['train.csv', 'val.csv', 'train/-_AbCdEfGhI_000010_000020.mp4'],
      r"'clip_list' \(train\.csv\) and 'kinetics' \(train\.csv\): choose with",
    ),
    (['1.npz', 'README'], r'is no data set that is known\. There is 1\.npz, README\. Looked for:'),
    (['images/0.jpg'], r'There is images/\.'),
    ([], 'There is nothing'),
  ],
)
def test_none_or_several(tmp_path, names, message):
  make(tmp_path, names)
  with pytest.raises(errors.UserError, match=message) as caught:
    detect.detect(str(tmp_path))
  if 'no data set' in str(caught.value):
    assert set(re.findall(r'\n  (\w+): ', str(caught.value))) == set(detect.SIGNS)


def test_roots_that_are_not(tmp_path):
  make(tmp_path, ['x.jpg'])
  with pytest.raises(errors.UserError, match=r'x\.jpg is no data set'):
    detect.detect(str(tmp_path / 'x.jpg'))
  with pytest.raises(errors.UserError, match='no such file or folder'):
    detect.detect(str(tmp_path / 'nowhere'))
  with pytest.raises(errors.UserError, match=r'dataset_configs\.root=PATH'):
    detect.detect(None)


class _Scan(list):
  """What `os.scandir` gives."""

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass


@pytest.mark.parametrize('last_first', [False, True])
@pytest.mark.parametrize(
  ('expected', 'extra'),
  [
    ('hugging_face', 'train.parquet'),
    ('hugging_face', 'class000/a.parquet'),
    ('tfds', 'class000/1.0.0/dataset_info.json'),
    ('image_folder', 'class199/z.parquet'),
  ],
)
def test_the_order_of_the_file_system_does_not_matter(
  tmp_path, monkeypatch, last_first, expected, extra
):
  make(tmp_path, [f'class{i:03}/0.jpg' for i in range(200)])
  make(tmp_path, [f'class{i:03}/b{k}.jpg' for i in (0, 199) for k in range(100)])
  make(tmp_path, [extra, extra.replace('dataset_info', 'features')])
  scandir = os.scandir
  seen = []

  def ordered(path):
    seen.append(str(path))
    with scandir(path) as scan:
      return _Scan(sorted(scan, key=lambda entry: entry.name, reverse=last_first))

  monkeypatch.setattr(os, 'scandir', ordered)
  assert detect.detect(str(tmp_path)) == expected
  assert len(seen) == len(set(seen)) <= 65 + 64


def test_a_root_of_a_very_long_name_is_not_there():
  with pytest.raises(errors.UserError, match='there is no such file or folder'):
    detect.detect('x' * 5000)


def test_a_link_to_itself_is_no_folder(tmp_path):
  make(tmp_path, ['cat/0.jpg', 'dog/0.jpg'])
  (tmp_path / 'a').symlink_to('a')
  assert detect.detect(str(tmp_path)) == 'image_folder'
