"""npz archives: prefixes, submodels, and what is refused before it is unpacked or run."""

import re
import struct
import zipfile

import numpy as np
import pytest

from losa_scenic.common_lib import errors
from losa_scenic.weights_lib import sources

F = b'\0' * 64


def write_npz(path, named, compress=False):
  (np.savez_compressed if compress else np.savez)(path, **named)
  return path


def one(value):
  return np.full((2,), value, np.float32)


def test_npz_names_keep_their_slashes_and_lose_their_prefix(tmp_path):
  kernel = 'Transformer/encoderblock_0/LayerNorm_0/scale'
  for prefix in ('params', 'opt/target'):
    named = {f'{prefix}/{kernel}': one(1), 'opt/state/step': one(2), 'chrono': np.array('text')}
    source = sources.open_source(write_npz(tmp_path / 'a.npz', named))
    assert list(source.tensors) == [kernel]
    assert source.metadata['taken'] == prefix
  assert source.metadata['other'] == ['chrono.npy', 'opt/state']


def test_a_submodel_of_an_npz(tmp_path):
  named = {'params/img/embedding/kernel': one(1), 'params/txt/bias': one(2), 'params/t': one(3)}
  path = write_npz(tmp_path / 'a.npz', named)
  assert list(sources.open_source(path).tensors) == ['img/embedding/kernel', 'txt/bias', 't']
  source = sources.open_source(f'{path}:img')
  assert list(source.tensors) == ['embedding/kernel']
  assert source.tensors['embedding/kernel'].read()[0] == 1
  assert source.metadata == {'taken': 'params/img', 'other': ['t', 'txt']}
  with pytest.raises(errors.UserError, match=r"'image'. Did you mean 'img'\? Known: img, txt"):
    sources.open_source(f'{path}:image')


class Canary:
  """Unpickling it would make a file."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return (open, (str(self.path), 'w'))


def test_python_objects_in_an_npz_are_refused_and_not_run(tmp_path):
  canary = tmp_path / 'canary'
  objects = np.array([Canary(canary)], object)
  path = write_npz(tmp_path / 'a.npz', {'good': one(1), 'bad': objects})
  with pytest.raises(errors.UserError, match="array 'bad' holds Python objects"):
    sources.open_source(path)
  assert not canary.exists()
  np.load(path, allow_pickle=True)['bad']
  assert canary.exists()  # The file would really have run code.


def npy(header, data=b''):
  header = header.encode() + b'\n'
  return b'\x93NUMPY\x01\x00' + struct.pack('<H', len(header)) + header + data


@pytest.mark.parametrize(
  ('descr', 'shape', 'message'),
  [
    ('<f4', '(1000, 1000, 10000)', 'the archive has 64 for it'),
    ('<f4', '(15,)', 'the archive has 64 for it'),
    ('<f4', '(-16,)', 'no list of integers'),
    ('<f4', '(9999999999999999,)', 'too large'),
    ('<f4', '(16, __import__("os"))', 'damaged header'),
    ('>f4', '(16,)', 'big-endian'),
    ('|V4', '(16,)', "unknown raw dtype '|V4'"),
    ('|O', '(16,)', 'Python objects'),
    ('nonsense', '(16,)', 'damaged header'),
  ],
)
def test_bad_npy_headers_are_refused(descr, shape, message, tmp_path):
  path = tmp_path / 'a.npz'
  header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}"
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('x.npy', npy(header, F))
  with pytest.raises(errors.UserError, match=re.escape(message)):
    sources.open_source(path)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
  path = tmp_path / 'a.npz'
  bytes_claimed = 3 * 2**30
  header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({bytes_claimed},)}}"
  start = npy(header)
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('x.npy', start + b'\0' * 1000)
  packed = path.read_bytes()
  small, big = struct.pack('<I', len(start) + 1000), struct.pack('<I', len(start) + bytes_claimed)
  assert packed.count(small) == 2  # In the member's own header and in the table.
  path.write_bytes(packed.replace(small, big))
  with pytest.raises(errors.UserError, match='packed bytes cannot hold'):
    sources.open_source(path)


def test_a_member_longer_or_shorter_than_it_claims_is_an_error(tmp_path):
  header = "{'descr': '|u1', 'fortran_order': False, 'shape': (%d,)}"
  for claimed in (5000, 20_000):
    path = tmp_path / f'{claimed}.npz'
    start = npy(header % claimed)
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
      archive.writestr('x.npy', start + b'\1' * 9999)
    true, false = struct.pack('<I', len(start) + 9999), struct.pack('<I', len(start) + claimed)
    path.write_bytes(path.read_bytes().replace(true, false))
    with pytest.raises(errors.UserError, match='not a readable archive'):
      sources.open_source(path).tensors['x'].read()


def test_a_flipped_bit_in_an_npz_is_found_when_all_is_read(tmp_path):
  for compress in (False, True):
    path = write_npz(tmp_path / 'a.npz', {'x': np.arange(5000, dtype=np.int32)}, compress)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(errors.UserError, match=r'damaged|not a readable archive'):
      sources.open_source(path).tensors['x'].read()


@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_a_doubled_member_is_refused(tmp_path):
  path = tmp_path / 'a.npz'
  with zipfile.ZipFile(path, 'w') as archive:
    for _ in range(2):
      archive.writestr('x.npy', npy("{'descr': '<f4', 'fortran_order': False, 'shape': (16,)}", F))
  with pytest.raises(errors.UserError, match=r"'x\.npy' stands twice"):
    sources.open_source(path)


def test_a_name_that_leaves_the_folder_is_only_a_name(tmp_path):
  folder = tmp_path / 'folder'
  folder.mkdir()
  source = sources.open_source(write_npz(folder / 'a.npz', {'../../x': one(4)}))
  assert source.tensors['../../x'].read()[0] == 4
  assert [p.name for p in tmp_path.rglob('*')] == ['folder', 'a.npz']


def test_a_member_that_lies_elsewhere_is_an_error(tmp_path):
  path = write_npz(tmp_path / 'a.npz', {'x': one(1)})
  data = path.read_bytes()
  assert data.startswith(b'PK\x03\x04')
  path.write_bytes(b'PKxx' + data[4:])
  with pytest.raises(errors.UserError, match='not a readable archive'):
    sources.open_source(path).tensors['x'].read()
