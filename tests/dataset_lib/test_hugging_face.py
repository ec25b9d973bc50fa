"""Folders of Hugging Face's `datasets`."""

import io
import itertools
import pickle
import socket
import sys

import numpy as np
import pytest
from PIL import Image

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import hugging_face, sources

hf = pytest.importorskip('datasets', reason='the extra [hf] is not installed')


@pytest.fixture(autouse=True)
def _no_network_and_no_progress(monkeypatch):
  def refuse(*_):
    raise AssertionError('network')

  monkeypatch.setattr(socket.socket, 'connect', refuse)
  hf.disable_progress_bars()


def png(value: int) -> bytes:
  file = io.BytesIO()
  Image.new('RGB', (3, 2), (value,) * 3).save(file, 'PNG')
  return file.getvalue()


def table(start: int, count: int, names=('ant', 'bee'), **columns) -> 'hf.Dataset':
  """Image i is of value i and class i % 2."""
  values = range(start, start + count)
  data = {
    'img': [{'bytes': png(i), 'path': f'{i}.png'} for i in values],
    'label': [i % 2 for i in values],
    **columns,
  }
  features = hf.Features(
    {
      'img': hf.Image(),
      'label': hf.ClassLabel(names=list(names)),
      **(hf.Dataset.from_dict(columns).features if columns else {}),
    }
  )
  return hf.Dataset.from_dict(data, features=features)


def load(root, **options) -> sources.Splits:
  return hugging_face.splits(root=str(root), **options)


def contents(source: sources.Source) -> list[tuple[bytes, int]]:
  return [(source[i].image, source[i].label) for i in range(len(source))]


def test_saved_splits(tmp_path):
  parts = {'train': table(0, 5), 'validation': table(5, 2), 'test': table(7, 3)}
  hf.DatasetDict(parts).save_to_disk(tmp_path)
  splits = load(tmp_path)
  assert splits.class_names == ('ant', 'bee')
  assert contents(splits.train) == [(png(i), i % 2) for i in range(5)]
  assert contents(splits.valid) == [(png(i), i % 2) for i in (5, 6)]
  assert contents(splits.test) == [(png(i), i % 2) for i in (7, 8, 9)]
  assert splits.test[1].id == f'{tmp_path}/test[1]'
  assert "test: 3 images in split 'test', column 'img'" in splits.about
  assert contents(pickle.loads(pickle.dumps(splits.train))) == contents(splits.train)
  splits = load(tmp_path, test_name='validation')
  assert splits.valid is None and len(splits.test) == 2
  with pytest.raises(errors.UserError, match=r"split \(val_name\) .*'vali'.*'validation'"):
    load(tmp_path, val_name='vali')
  with pytest.raises(errors.UserError, match="split 'train' is named for two parts"):
    load(tmp_path, test_name='train')


def test_one_saved_table_is_split(tmp_path):
  table(0, 30).select(range(29, -1, -1)).save_to_disk(tmp_path)
  splits = load(tmp_path)
  parts = [contents(part) for part in (splits.train, splits.valid, splits.test)]
  assert [len(part) for part in parts] == [20, 4, 6]
  assert sorted(itertools.chain(*parts)) == sorted((png(i), i % 2) for i in range(30))


def test_parquet_without_metadata(tmp_path):
  root = tmp_path / 'set'
  import pyarrow as pa
  import pyarrow.parquet as pq

  (root / 'files').mkdir(parents=True)
  (root / 'files/3.png').write_bytes(png(3))
  for split, values in (('train', range(4)), ('test', range(4, 6))):
    pq.write_table(
      pa.table(
        {
          'image': [
            {'bytes': None if i == 3 else png(i), 'path': f'files/{i}.png'} for i in values
          ],
          'kind': [('wasp', 'bee')[i % 2] for i in values],
          'label': [i % 3 for i in values],
        }
      ),
      root / f'{split}-00000-of-00001.parquet',
    )
  options = {'cache_dir': str(tmp_path / 'cache')}
  splits = load(root, **options)
  assert splits.class_names == ('0', '1', '2') and splits.valid is None
  assert contents(splits.train) == [(png(i), i % 3) for i in range(4)]
  splits = load(root, label_column='kind', **options)
  assert splits.class_names == ('bee', 'wasp')
  assert [label for _, label in contents(splits.test)] == [1, 0]
  (root / 'files/3.png').unlink()
  with pytest.raises(sources.BadImage, match=r'train\[3\] .*files/3\.png.*cannot be read'):
    splits.train[3]


def test_image_folder_layout(tmp_path):
  for part in ('train', 'test'):
    for name, value in (('ant', 1), ('bee', 2)):
      folder = tmp_path / 'set' / part / name
      folder.mkdir(parents=True)
      (folder / 'x.png').write_bytes(png(value))
  splits = load(tmp_path / 'set', cache_dir=str(tmp_path / 'cache'))
  assert splits.class_names == ('ant', 'bee')
  assert contents(splits.test) == [(png(1), 0), (png(2), 1)]


@pytest.mark.parametrize(
  ('columns', 'options', 'message'),
  [
    ({}, {'image_column': 'imh'}, r"column \(image_column\) .*'imh'.*'img'"),
    ({}, {'image_column': 'label'}, "column 'label' holds no images: ClassLabel"),
    ({}, {'label_column': 'nothing'}, r"column \(label_column\) .*'nothing'"),
    ({'score': [0.5] * 4}, {'label_column': 'score'}, "column 'score' holds no labels"),
    ({'raw': [None, 1, 2, 3]}, {'label_column': 'raw'}, r"train: 1 rows have no 'raw'"),
    ({'raw': [-1, 1, 2, 3]}, {'label_column': 'raw'}, r'labels below 0.*train_name=NAME'),
    ({'raw': [0, 1, 2, 300]}, {'label_column': 'raw'}, r"'raw' holds 300, but there are only 4"),
  ],
)
def test_wrong_columns_are_named(tmp_path, columns, options, message):
  table(0, 4, **columns).save_to_disk(tmp_path)
  with pytest.raises(errors.UserError, match=message):
    load(tmp_path, **options)


def test_a_choice_that_only_the_user_can_make(tmp_path):
  ambiguous = table(0, 4).remove_columns('label')
  for name in ('width', 'height'):
    ambiguous = ambiguous.add_column(name, np.arange(4))
  ambiguous.save_to_disk(tmp_path / 'a')
  with pytest.raises(
    errors.UserError, match=r'label_column=NAME, one of width \(integer\), height'
  ):
    load(tmp_path / 'a')
  other = hf.DatasetDict({'train': table(0, 4), 'test': table(0, 2, names=('bee', 'ant'))})
  other.save_to_disk(tmp_path / 'b')
  with pytest.raises(errors.UserError, match=r"b/test: the class names of 'label' are not those"):
    load(tmp_path / 'b')
  texts = {
    part: table(0, 2, kind=kinds).remove_columns('label')
    for part, kinds in (('train', ['wasp', 'ant']), ('test', ['ant', 'wsap']))
  }
  hf.DatasetDict(texts).save_to_disk(tmp_path / 'c')
  with pytest.raises(errors.UserError, match=r"c/test\[1\] .*'wsap'\. Did you mean 'wasp'"):
    load(tmp_path / 'c')


def test_folders_that_cannot_be_loaded(tmp_path, monkeypatch):
  broken = tmp_path / 'broken'
  broken.mkdir()
  (broken / 'train.parquet').write_bytes(b'PAR1junk')
  with pytest.raises(errors.UserError, match=r'datasets cannot load this folder \(.*[Pp]arquet'):
    load(broken, cache_dir=str(tmp_path / 'cache'))
  with pytest.raises(errors.UserError, match=r'cache_dir .*/cache must lie outside of'):
    load(broken, cache_dir=str(broken / 'cache'))
  empty = hf.Dataset.from_dict({'img': [None], 'label': [0]}, features=table(0, 1).features)
  hf.DatasetDict({'train': empty, 'test': empty}).save_to_disk(tmp_path / 'none')
  with pytest.raises(sources.BadImage, match=r'train\[0\]: there is no image'):
    load(tmp_path / 'none').train[0]
  monkeypatch.setitem(sys.modules, 'datasets', None)
  with pytest.raises(errors.UserError, match=r'pip install losa_scenic\[hf\]'):
    load(broken)
