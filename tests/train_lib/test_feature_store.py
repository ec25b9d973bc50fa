"""Rows on disk: whole or not there, whoever is killed and whoever else writes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from losa_scenic.common_lib import errors
from losa_scenic.train_lib.feature_store import Store, check_room

COUNT, SIZE = 40, 192
META = {'weights': 'abc', 'taps': [1, 2]}


def row(i: int) -> np.ndarray:
  return np.random.default_rng(i).integers(0, 256, SIZE, np.uint8)


def opened(folder, meta=META, count=COUNT) -> Store:
  return Store(folder, meta, count, SIZE)


def read(store, rows):
  out = np.zeros((len(rows), SIZE), np.uint8)
  return store.read(np.asarray(rows), list(out)), out


def test_rows_come_once_and_stay(tmp_path):
  store = opened(tmp_path)
  assert store.have == 0 and not store.whole(np.arange(COUNT)).any()
  for i in (3, 39, 0):
    store.write(i, row(i), 7 + i)
  store.write(3, row(99), 1)  # The first one stays.
  other = opened(tmp_path)  # Another run, at the same time.
  for one in (store, other):
    assert one.have == 3 and one.whole(np.array([0, 1, 3, 39])).tolist() == [1, 0, 1, 1]
    good, rows = read(one, [39, 3, 3, 0])
    assert good and (rows == [row(39), row(3), row(3), row(0)]).all()
    assert one.labels(np.array([39, 0])).tolist() == [46, 7]
  store.write(5, row(5), 5)
  assert other.whole(np.array([5])).all() and read(other, [5])[0]


def test_rows_that_never_came_take_no_room(tmp_path):
  store = Store(tmp_path, META, 1000, 1 << 20)
  store.write(500, np.ones(1 << 20, np.uint8), 0)
  assert os.stat(store.path / 'rows.bin').st_blocks * 512 < 3 << 20


@pytest.mark.parametrize('where', ['row', 'label', 'cut'])
def test_damage_is_noticed_at_the_first_reading(where, tmp_path, capsys):
  store = opened(tmp_path)
  for i in range(COUNT):
    store.write(i, row(i), i)
  name, at = {'row': ('rows.bin', 4 * SIZE + 100), 'label': ('marks.bin', 4 * 16 + 8)}.get(
    where, ('rows.bin', 0)
  )
  path = store.path / name
  if where == 'cut':
    os.truncate(path, 4 * SIZE + 9)
  else:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
  later = opened(tmp_path)
  assert later.have == COUNT
  good, rows = read(later, [2, 4])
  assert not good and (rows[0] == row(2)).all()
  assert 'row 4 is damaged and will be made again' in capsys.readouterr().err
  assert not later.whole(np.array([4])).any() and later.whole(np.array([2])).all()
  later.write(4, row(4), 4)
  assert read(later, [4])[0] and (read(later, [4])[1] == row(4)).all()


def test_a_mark_without_its_row_is_damage(tmp_path):
  """As after a power cut: the file system may have kept the later write alone."""
  store = opened(tmp_path)
  store.write(1, row(1), 1)
  with (store.path / 'rows.bin').open('r+b') as file:
    file.truncate(0)
    file.truncate(COUNT * SIZE)
  assert not read(opened(tmp_path), [1])[0]


def test_anything_else_is_another_folder(tmp_path):
  stores = [
    opened(tmp_path),
    opened(tmp_path, META | {'taps': [1, 3]}),
    opened(tmp_path, META | {'weights': 'abd'}),
    opened(tmp_path, count=COUNT + 1),
    Store(tmp_path, META, COUNT, SIZE + 64),
  ]
  stores[0].write(0, row(0), 0)
  assert [store.have for store in stores] == [1, 0, 0, 0, 0]
  assert len({store.path for store in stores}) == 5
  assert opened(tmp_path).path == stores[0].path
  content = json.loads((stores[0].path / 'meta.json').read_text())
  assert content == META | {'count': COUNT, 'row_bytes': SIZE}


@pytest.mark.parametrize('text', ['{"weights": "other"}', '{"weights'])
def test_a_folder_of_other_features_is_refused(text, tmp_path):
  path = opened(tmp_path).path
  (path / 'meta.json').write_text(text)
  with pytest.raises(errors.UserError, match=f'{path}/meta.json is damaged or'):
    opened(tmp_path)


def test_a_folder_that_cannot_be_used(tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(errors.UserError, match=r'feature_cache.dir: cannot use'):
    opened(tmp_path / 'file')
  check_room(tmp_path, 1, 'the features')
  with pytest.raises(errors.UserError, match=r"will take 1,000,000,000,000.00 GB more.*'int8'"):
    check_room(tmp_path, 10**21, 'the features')


WRITER = """
import sys
sys.path.insert(0, {tests!r})
import numpy as np
from test_feature_store import COUNT, opened, row
store = opened(sys.argv[1])
print(store.have, flush=True)
sys.stdin.read(1)
for _ in range(20):
  for i in np.random.default_rng(int(sys.argv[2])).permutation(COUNT).tolist():
    store.write(i, row(i), i)
    values = np.zeros((1, row(i).size), np.uint8)
    assert store.read(np.array([i]), list(values)) and (values == row(i)).all()
"""


def test_processes_share_a_folder(tmp_path):
  code = WRITER.format(tests=os.path.dirname(__file__))
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', code, str(tmp_path), str(i)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
    )
    for i in range(2)
  ]
  for process in processes:
    assert process.stdout.readline() == b'0\n'
  for process in processes:
    process.stdin.write(b'.')
    process.stdin.close()
  assert [process.wait(60) for process in processes] == [0, 0]
  store = opened(tmp_path)
  assert store.have == COUNT
  good, rows = read(store, range(COUNT))
  assert good and (rows == [row(i) for i in range(COUNT)]).all()
