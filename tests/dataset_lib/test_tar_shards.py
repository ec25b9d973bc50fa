"""Tar shards: records, random access, and damage that must not pass for the end."""

import concurrent.futures
import io
import itertools
import json
import os
import pathlib
import pickle
import tarfile

import pytest

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import sources, tar_index, tar_shards


def write(path: pathlib.Path, members, mode: str = 'w') -> None:
  """members: pairs of name and bytes; None for a folder."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, mode) as tar:
    for name, data in members:
      info = tarfile.TarInfo(name)
      info.type, info.size = (tarfile.DIRTYPE, 0) if data is None else (tarfile.REGTYPE, len(data))
      tar.addfile(info, io.BytesIO(data or b''))


def records(numbers, num_classes: int = 2):
  for i in numbers:
    yield f'{i:03}.jpg', b'image %d' % i * (i + 1)
    yield f'{i:03}.cls', b'%d\n' % (i % num_classes)


def contents(source: sources.Source) -> list[tuple[bytes, int]]:
  return [(source[i].image, source[i].label) for i in range(len(source))]


def load(root, **options) -> sources.Splits:
  return tar_shards.splits(root=str(root), **options)


@pytest.mark.parametrize(
  'names',
  [
    ('train-0.tar', 'train-1.tar', 'val-0.tar', 'test-0.tar'),
    ('train/a.tar', 'train/b.tar', 'validation/a.tar', 'test/a.tar'),
  ],
)
def test_shards_are_found_and_read_at_random(tmp_path, names):
  for k, name in enumerate(names):
    write(tmp_path / name, records(range(4 * k, 4 * k + 4)))
  splits = load(tmp_path)
  expected = [(b'image %d' % i * (i + 1), i % 2) for i in range(16)]
  assert contents(splits.train) == expected[:8] and splits.class_names == ('0', '1')
  assert contents(splits.valid) == expected[8:12] and contents(splits.test) == expected[12:]
  assert 'train: 8 images in 2 tar files' in splits.about
  assert splits.train[5].id == f'{tmp_path / names[1]}: 005.jpg'
  again = pickle.loads(pickle.dumps(splits.train))
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    order = [7, 0, 3, 5] * 20
    assert [r.image for r in pool.map(again.__getitem__, order)] == [expected[i][0] for i in order]


def test_records_of_all_kinds(tmp_path):
  long = 'folder/' + 'x' * 120
  members = [
    ('folder', None),
    ('folder/._a.jpg', b'left by macOS'),
    # Members of a record need not be neighbours.
    ('folder/a.cls', b' 1 '),
    ('b.PNG', b'B'),
    (f'{long}.tiff', b'C'),
    ('folder/a.seg.png', b'mask'),
    ('folder/a.jpeg', b'A'),
    ('b.json', json.dumps({'label': 2, 'cls': 'other'}).encode()),
    (f'{long}.json', json.dumps({'cls': 0, 'text': 'ü'}).encode()),
    ('b.txt', b'caption'),
  ]
  write(tmp_path / 'train.tar', members)
  write(tmp_path / 'test.tar', records([0]))
  (tmp_path / 'classes.txt').write_text('zero\none\ntwo\nthree\n')
  splits = load(tmp_path)
  assert contents(splits.train) == [(b'A', 1), (b'B', 2), (b'C', 0)]
  assert splits.class_names == ('zero', 'one', 'two', 'three') and splits.valid is None
  assert splits.train[2].id.endswith(f'{long}.tiff')


def test_missing_parts_are_split_off_and_patterns_choose_shards(tmp_path):
  for k in range(3):
    write(tmp_path / f'part-{k}.tar', records(range(10 * k, 10 * k + 10)))
  splits = load(tmp_path, train_shards='part-*.tar')
  parts = [contents(part) for part in (splits.train, splits.valid, splits.test)]
  assert [len(part) for part in parts] == [20, 4, 6]
  assert len(set(itertools.chain(*parts))) == 30
  splits = load(tmp_path, train_shards='part-[01].tar', test_shards='part-2.tar', val_fraction=0.1)
  assert [len(p) for p in (splits.train, splits.valid, splits.test)] == [18, 2, 10]
  assert len(load(tmp_path / 'part-0.tar').test) == 2
  with pytest.raises(errors.UserError, match=r'part-2\.tar: this shard is in two parts'):
    load(tmp_path, train_shards='*.tar', test_shards='part-2.tar')
  with pytest.raises(errors.UserError, match=r"no file fits val_shards = 'v\*'"):
    load(tmp_path, train_shards='*.tar', val_shards='v*')
  with pytest.raises(errors.UserError, match=r'Looked for train-\*\.tar .* there are part-0\.tar'):
    load(tmp_path)


@pytest.mark.parametrize(
  ('members', 'message'),
  [
    ([('a.jpg', b'A')], r'a\.jpg has no label: a\.cls or a\.json'),
    ([('a.cls', b'1')], r'record a \(a\.cls\) has no image'),
    ([('a.jpg', b'A'), ('a.png', b'A')], r'a\.jpg and a\.png belong to one record'),
    ([('a.jpg', b'A'), ('a.cls', b'cat')], r"a\.cls holds no label: .* but b'cat'"),
    ([('a.jpg', b'A'), ('a.cls', b'-1')], r'a\.cls holds no label'),
    ([('a.jpg', b'A'), ('a.json', b'{"label": true}')], r"a\.json holds no label: .*'label' or"),
    ([('a.jpg', b'A'), ('a.json', b'[1')], r'a\.json holds no label'),
    ([('a.jpg', b'A'), ('a.cls', b'9')], r'a\.jpg has label 9, but there are only 2 images'),
    ([], r'there are no images in it'),
  ],
)
def test_wrong_records_name_shard_and_member(tmp_path, members, message):
  write(tmp_path / 'train-0.tar', members)
  write(tmp_path / 'test-0.tar', records([0]))
  with pytest.raises(errors.UserError, match=r'train-0\.tar: ' + message):
    load(tmp_path)


def test_damaged_cut_joined_and_compressed_shards_are_refused(tmp_path):
  path = tmp_path / 'train-0.tar'
  write(path, records(range(3)))
  whole = path.read_bytes()
  damaged = bytearray(whole)
  damaged[4 * 512 + 100] ^= 1  # In the header of the third member.
  cases = (
    (whole[:700], r'cut off|cannot be read as a plain tar'),
    (whole[:1024], 'the mark of its end is missing'),
    (bytes(damaged), 'damaged, or two tar files in one: nothing can be read from byte 2048'),
    (whole + whole, 'two tar files in one'),
    (b'', 'cannot be read as a plain tar'),
    (b'no tar' * 200, 'cannot be read as a plain tar'),
  )
  for data, message in cases:
    path.write_bytes(data)
    with pytest.raises(errors.UserError, match=r'train-0\.tar: .*' + message):
      load(tmp_path)
  path.unlink()
  write(tmp_path / 'train-0.tar.gz', records(range(3)), 'w:gz')
  with pytest.raises(errors.UserError, match=r'train-0\.tar\.gz: compressed .* Unpack it'):
    load(tmp_path)
  with tarfile.open(path, 'w') as tar:
    info = tarfile.TarInfo('a.jpg')
    info.type, info.linkname = tarfile.SYMTYPE, '/etc/passwd'
    tar.addfile(info)
  with pytest.raises(errors.UserError, match=r'a\.jpg is no plain file but a link'):
    tar_index.index_shard(path)


def test_shards_that_go_or_change_after_the_start_are_bad_images(tmp_path):
  for k in range(3):
    write(tmp_path / f'train-{k}.tar', records([2 * k, 2 * k + 1]))
  write(tmp_path / 'test.tar', records([0]))
  train = load(tmp_path).train
  (tmp_path / 'train-0.tar').unlink()
  write(tmp_path / 'train-1.tar', records(range(30)))
  for i, message in ((0, r'train-0\.tar: 000\.jpg: cannot be read'), (2, 'the shard has changed')):
    with pytest.raises(sources.BadImage, match=message):
      train[i]
  assert train[4].image == b'image 4' * 5


def test_more_shards_than_files_that_stay_open(tmp_path, monkeypatch):
  opened = []
  open_file = tar_index.OpenShard.__init__
  monkeypatch.setattr(
    tar_index.OpenShard,
    '__init__',
    lambda self, path: (opened.append(path), open_file(self, path))[1],
  )
  for k in range(tar_index._OPEN_SHARDS + 20):
    write(tmp_path / f'train-{k:03}.tar', records([k]))
  write(tmp_path / 'test.tar', records([0]))
  train = load(tmp_path).train
  before = len(os.listdir('/proc/self/fd'))
  for _ in range(2):
    assert len(contents(train)) == tar_index._OPEN_SHARDS + 20
  assert len(opened) >= len(train)
  assert len(os.listdir('/proc/self/fd')) <= before + tar_index._OPEN_SHARDS
