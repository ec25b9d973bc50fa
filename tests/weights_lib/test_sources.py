"""Checkpoint files: what is read, how little of it, and what is refused."""

import hashlib
import json
import pathlib
import re
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from flax import serialization
from safetensors import numpy as safetensors_numpy

from losa_scenic.common_lib import errors
from losa_scenic.weights_lib import sources, tensors

BF16 = np.dtype(ml_dtypes.bfloat16)


def arrays():
  rng = np.random.default_rng(0)
  return {
    'blocks.0.weight': rng.normal(size=(5, 4, 3)).astype(np.float32),
    'half': rng.normal(size=(7,)).astype(np.float16),
    'brain': rng.normal(size=(2, 6)).astype(BF16),
    'count': np.array(3, np.int64),
    'flags': np.array([True, False]),
    'nothing': np.zeros((0, 3), np.float32),
  }


def write_npz(path, named, compress=False):
  (np.savez_compressed if compress else np.savez)(path, **named)
  return path


def write_safetensors(path, named, metadata=None):
  safetensors_numpy.save_file(named, path, metadata)
  return path


def write(kind, folder, named):
  match kind:
    case 'safetensors':
      return write_safetensors(folder / 'a.safetensors', named)
    case 'npz' | 'npz compressed':
      return write_npz(folder / 'a.npz', named, kind != 'npz')
    case 'msgpack':
      path = folder / 'checkpoint_7'
      path.write_bytes(serialization.msgpack_serialize(dict(named)))
      return path


KINDS = ('safetensors', 'npz', 'npz compressed', 'msgpack')


@pytest.mark.parametrize('kind', KINDS)
def test_every_array_comes_back_with_its_dtype(kind, tmp_path):
  source = sources.open_source(write(kind, tmp_path, arrays()))
  assert set(source.tensors) == set(arrays())
  for name, array in arrays().items():
    tensor = source.tensors[name]
    read = tensor.read()
    assert (tensor.shape, tensor.dtype) == (array.shape, array.dtype) == (read.shape, read.dtype)
    assert read.tobytes() == array.tobytes()
    assert read.flags.c_contiguous


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
  'index',
  [
    (2,),
    (-1,),
    (slice(1, 3),),
    (slice(None), 1),
    (slice(None), slice(None), 2),
    (slice(4, 0, -2), slice(None), slice(None, None, 2)),
    (slice(3, 3),),
    (4, 3, 2),
  ],
)
def test_parts_are_those_that_numpy_gives(kind, index, tmp_path):
  tensor = sources.open_source(write(kind, tmp_path, arrays())).tensors['blocks.0.weight']
  expected = arrays()['blocks.0.weight'][index]
  np.testing.assert_array_equal(tensor.read(index), expected)
  assert tensor.read(index).shape == expected.shape
  assert tensor.read(index).flags.c_contiguous


@pytest.mark.parametrize('index', [(5,), (-6,), (0, 0, 0, 0), (0, 4)])
def test_an_index_outside_is_an_error(index, tmp_path):
  source = sources.open_source(write('safetensors', tmp_path, arrays()))
  with pytest.raises(IndexError):
    source.tensors['blocks.0.weight'].read(index)


def test_large_parts_with_gaps_are_gathered_exactly(tmp_path):
  array = np.arange(2**22, dtype=np.int32).reshape(64, 256, 256)  # 16 MiB, four blocks.
  source = sources.open_source(write_safetensors(tmp_path / 'a.safetensors', {'x': array}))
  for index in [(slice(None), 3), (slice(None, None, -3), slice(5, 250, 7), slice(1, None))]:
    np.testing.assert_array_equal(source.tensors['x'].read(index), array[index])


@pytest.mark.parametrize('order', ['C', 'F'])
def test_fortran_order_is_undone(order, tmp_path):
  array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
  path = write_npz(tmp_path / 'a.npz', {'x': np.asarray(array, order=order)})
  tensor = sources.open_source(path).tensors['x']
  np.testing.assert_array_equal(tensor.read(), array)
  np.testing.assert_array_equal(tensor.read((1, slice(None), 2)), array[1, :, 2])
  assert tensor.read().flags.c_contiguous


@pytest.mark.parametrize('kind', ['safetensors', 'npz'])
def test_a_layer_is_read_alone(kind, tmp_path, monkeypatch):
  named = {'a': np.ones((8, 64, 64), np.float32), 'b': np.ones((1000, 1000), np.float32)}
  tensor = sources.open_source(write(kind, tmp_path, named)).tensors['a']
  read = []
  fill = tensors.File.fill
  monkeypatch.setattr(
    tensors.File,
    'fill',
    lambda self, start, buffer: (read.append(buffer.size), fill(self, start, buffer)),
  )
  tensor.read((3,))
  assert read == [64 * 64 * 4]


@pytest.mark.parametrize('kind', ['safetensors', 'npz', 'npz compressed'])
def test_reading_by_layers_holds_one_layer(kind, tmp_path):
  layers, side = 16, 512  # 1 MiB per layer.
  rng = np.random.default_rng(0)
  named = {'x': rng.integers(0, 255, (layers, side, 4 * side)).astype(np.uint8)}
  source = sources.open_source(write(kind, tmp_path, named))
  mapped = _file_pages()
  tracemalloc.start()
  try:
    for layer in range(layers):
      assert source.tensors['x'].read((layer,))[0, 0] == named['x'][layer, 0, 0]
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert peak < 4.5 * 2**20  # zipfile itself needs a few blocks.
  assert _file_pages() - mapped < 4 * 2**20


def _file_pages():
  status = pathlib.Path('/proc/self/status')
  if not status.exists():
    return 0
  return int(re.findall(r'RssFile:\s*(\d+)', status.read_text())[0]) * 1024


def test_what_changes_after_opening_is_an_error(tmp_path):
  path = write('safetensors', tmp_path, arrays())
  source = sources.open_source(path)
  path.write_bytes(path.read_bytes() + b' ')
  with pytest.raises(errors.UserError, match='changed while'):
    source.tensors['half'].read()
  path.unlink()
  with pytest.raises(errors.UserError, match='cannot be read'):
    source.tensors['half'].read()


@pytest.mark.parametrize('kind', KINDS)
def test_a_truncated_file_is_an_error(kind, tmp_path):
  whole = write(kind, tmp_path, arrays()).read_bytes()
  cut = tmp_path / 'cut'
  for length in (0, 1, 7, 9, 40, len(whole) // 2, len(whole) - 1):
    cut.write_bytes(whole[:length])
    with pytest.raises(errors.UserError, match='cut'):
      sources.open_source(cut)


# Shards.


def write_shards(folder, shards, weight_map):
  for name, named in shards.items():
    write_safetensors(folder / name, named)
  index = folder / 'model.safetensors.index.json'
  index.write_text(json.dumps({'metadata': {'total_size': 1}, 'weight_map': weight_map}))
  return index


def one(value):
  return np.full((2,), value, np.float32)


def test_shards_are_one_source(tmp_path):
  index = write_shards(tmp_path, {'1': {'a': one(1)}, '2': {'b': one(2)}}, {'a': '1', 'b': '2'})
  source = sources.open_source(index)
  assert source.files == (tmp_path / '1', tmp_path / '2')
  assert {n: t.read()[0] for n, t in source.tensors.items()} == {'a': 1, 'b': 2}
  assert sources.open_source(tmp_path).files == source.files


@pytest.mark.parametrize(
  ('shards', 'weight_map', 'message'),
  [
    ({'1': {'a': one(1)}}, {'a': '1', 'b': '1'}, "1 lacks 'b'"),
    ({'1': {'a': one(1), 'b': one(1)}}, {'a': '1'}, "1 also holds 'b'"),
    ({'1': {'a': one(1)}, '2': {'a': one(1), 'b': one(2)}}, {'a': '1', 'b': '2'}, "holds 'a'"),
    ({'1': {'a': one(1)}}, {'a': '1', 'b': '2'}, 'missing beside it: 2'),
    ({'1': {'a': one(1)}}, {'a': '../1'}, 'no plain file name'),
    ({'1': {'a': one(1)}}, {'a': '/etc/passwd'}, 'no plain file name'),
    ({'1': {'a': one(1)}}, {'a': 5}, 'no plain file name'),
    ({}, {}, "needs a 'weight_map'"),
    ({}, {'a': 'model.safetensors.index.json'}, 'is an index'),
  ],
)
def test_an_index_must_fit_its_shards(shards, weight_map, message, tmp_path):
  with pytest.raises(errors.UserError, match=re.escape(message)):
    sources.open_source(write_shards(tmp_path, shards, weight_map))


def test_an_index_with_a_doubled_name_is_refused(tmp_path):
  index = write_shards(tmp_path, {'1': {'a': one(1)}}, {'a': '1'})
  index.write_text('{"weight_map": {"a": "1", "a": "1"}}')
  with pytest.raises(errors.UserError, match="'a' stands twice"):
    sources.open_source(index)


# Which file, and of which kind.


def test_the_kind_is_told_by_content(tmp_path):
  path = write_npz(tmp_path / 'a.npz', {'x': one(1)}).rename(tmp_path / 'model.safetensors')
  assert sources.open_source(path).tensors['x'].read()[0] == 1


@pytest.mark.parametrize(
  ('data', 'message'),
  [
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n', 'Git LFS pointer'),
    (b'\n<!DOCTYPE html><html>Not found</html>', 'a web page'),
    (b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02', "PyTorch's old format"),
    (b'\x89HDF\r\n', 'HDF5'),
    (b'\x93NUMPY\1\0', 'a single NumPy array'),
    (b'\x1f\x8b\x08', 'gzip'),
    (b'hello, world', 'no checkpoint of a known kind'),
    (b'{"hidden_size": 5}', "needs a 'weight_map'"),
    (b'', 'empty'),
  ],
)
def test_what_is_no_checkpoint_is_named(data, message, tmp_path):
  path = tmp_path / 'model.safetensors'
  path.write_bytes(data)
  with pytest.raises(errors.UserError, match=re.escape(message)):
    sources.open_source(path)


def test_folders(tmp_path):
  with pytest.raises(errors.UserError, match=r'holds no weights.*nothing'):
    sources.open_source(tmp_path)
  write_npz(tmp_path / 'b.npz', {'x': one(1)})
  assert sources.open_source(tmp_path).files == (tmp_path / 'b.npz',)
  write_safetensors(tmp_path / 'c.safetensors', {'x': one(2)})
  with pytest.raises(errors.UserError, match=r'several checkpoints, name one: b\.npz, c\.safeten'):
    sources.open_source(tmp_path)
  for name in reversed(('model.safetensors', 'open_clip_model.safetensors', 'pytorch_model.bin')):
    write_safetensors(tmp_path / name, {'x': one(2)})
    assert sources.open_source(tmp_path).files == (tmp_path / name,)


def test_files_beside_the_weights_are_metadata(tmp_path):
  path = write_safetensors(tmp_path / 'model.safetensors', {'x': one(2)})
  (tmp_path / 'config.json').write_text('{"hidden_size": 8}')
  (tmp_path / 'preprocessor_config.json').write_text('{"size": 224}')
  metadata = sources.open_source(path).metadata
  assert metadata['config.json'] == {'hidden_size': 8}
  assert metadata['preprocessor_config.json'] == {'size': 224}
  (tmp_path / 'config.json').write_text('{"hidden_size": ')
  with pytest.raises(errors.UserError, match=r'config\.json: not valid JSON'):
    sources.open_source(path)


def test_a_missing_file_and_a_part_of_what_has_none(tmp_path):
  path = write_safetensors(tmp_path / 'model.safetensors', {'x': one(2)})
  with pytest.raises(errors.UserError, match=r"Did you mean 'model\.safetensors'"):
    sources.open_source(tmp_path / 'model.safetensor')
  with pytest.raises(errors.UserError, match='no file or folder'):
    sources.open_source(tmp_path / 'no' / 'model.npz:img')
  with pytest.raises(errors.UserError, match='has no parts'):
    sources.open_source(f'{path}:img')


def test_the_hash_is_of_the_bytes_and_not_of_names(tmp_path):
  path = write_safetensors(tmp_path / 'a.safetensors', {'x': one(2)})
  expected = hashlib.sha256(path.read_bytes()).hexdigest()
  assert sources.open_source(path).sha256() == expected
  assert sources.open_source(path.rename(tmp_path / 'b')).sha256() == expected
  hashes = set()
  for number, (first, second) in enumerate((('1', '2'), ('2', '1'), ('x', 'y'))):
    folder = tmp_path / f'{number}'
    folder.mkdir()
    shards = {first: {'a': one(1)}, second: {'b': one(2)}}
    index = write_shards(folder, shards, {'a': first, 'b': second})
    hashes.add(sources.open_source(index).sha256())
  assert len(hashes) == 1
