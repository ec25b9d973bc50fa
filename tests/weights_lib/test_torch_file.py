"""PyTorch checkpoints, written here by hand: what is read, and that nothing in them runs."""

import collections
import dataclasses
import os
import pickle
import re
import struct
import tracemalloc
import zipfile
import zlib

import ml_dtypes
import numpy as np
import pytest

from losa_scenic.common_lib import errors
from losa_scenic.weights_lib import sources, torch_pickle

BF16 = np.dtype(ml_dtypes.bfloat16)
STORAGE_NAMES = {dtype: name.split('.')[1] for name, dtype in torch_pickle.STORAGES.items()}


@dataclasses.dataclass
class T:
  """A tensor to write: a strided view (in elements) of a storage."""

  storage: np.ndarray
  shape: tuple[int, ...] | None = None
  strides: tuple[int, ...] | None = None
  offset: int = 0
  parameter: bool = False
  numel: int | None = None


@dataclasses.dataclass
class Raw:
  """Opcodes to write as they are."""

  code: bytes


class Writer:
  """Writes what torch.save writes: protocol 2, tensors by function, storages by persistent id."""

  def __init__(self):
    self.storages = []

  def pickle(self, value):
    return b'\x80\x02' + self.code(value) + b'.'

  def code(self, value):
    match value:
      case Raw():
        return value.code
      case T():
        return self.tensor(value)
      case None | bool():
        return {None: b'N', True: b'\x88', False: b'\x89'}[value]
      case int():
        return b'J' + struct.pack('<i', value)
      case float():
        return b'G' + struct.pack('>d', value)
      case str():
        return b'X' + struct.pack('<I', len(value.encode())) + value.encode()
      case tuple():
        return b'(' + b''.join(map(self.code, value)) + b't'
      case list():
        return b'](' + b''.join(map(self.code, value)) + b'e'
      case dict():
        ordered = isinstance(value, collections.OrderedDict)
        items = b''.join(self.code(k) + self.code(v) for k, v in value.items())
        start = b'ccollections\nOrderedDict\n)R' if ordered else b'}'
        # As of a module's state dict: an attribute with versions.
        end = b'}' + self.code('_metadata') + b'}sb' if ordered else b''
        return start + b'(' + items + b'u' + end
    raise TypeError(value)

  def tensor(self, t):
    if not any(storage is t.storage for storage in self.storages):
      self.storages.append(t.storage)
    key = next(str(n) for n, storage in enumerate(self.storages) if storage is t.storage)
    shape = t.storage.shape if t.shape is None else t.shape
    strides = t.strides
    if strides is None:
      strides = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
    kind = b'ctorch\n' + STORAGE_NAMES[t.storage.dtype].encode() + b'\n'
    numel = t.storage.size if t.numel is None else t.numel
    identity = (self.code(x) for x in ('storage', Raw(kind), key, 'cpu', numel))
    storage = b'(' + b''.join(identity) + b'tQ'
    hooks = b'ccollections\nOrderedDict\n)R'
    rest = b''.join(map(self.code, (t.offset, shape, strides, False)))
    made = b'ctorch._utils\n_rebuild_tensor_v2\n(' + storage + rest + hooks + b'tR'
    if t.parameter:
      made = b'ctorch._utils\n_rebuild_parameter\n(' + made + b'\x88' + hooks + b'tR'
    return made


def save(path, value, extra=None, drop=(), pickled=None):
  writer = Writer()
  members = {'data.pkl': writer.pickle(value) if pickled is None else pickled}
  members |= {'byteorder': b'little', 'version': b'3\n'}
  members |= {f'data/{n}': s.tobytes() for n, s in enumerate(writer.storages)} | (extra or {})
  with zipfile.ZipFile(path, 'w') as archive:
    for name, data in members.items():
      if name not in drop:
        archive.writestr(f'archive/{name}', data)
  return path


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'pytorch_model.bin'


def load(path):
  return {name: tensor.read() for name, tensor in sources.open_source(path).tensors.items()}


X = np.arange(24, dtype=np.float32).reshape(4, 6)


@pytest.mark.parametrize('dtype', torch_pickle.STORAGES.values(), ids=str)
def test_every_dtype(dtype, path):
  array = X.astype(dtype)
  save(path, {'w': T(array), 'b': T(array[0].copy(), parameter=True), 'n': T(array[0, 0].copy())})
  read = load(path)
  assert list(read) == ['w', 'b', 'n']
  np.testing.assert_array_equal(read['w'], array)
  np.testing.assert_array_equal(read['b'], array[0])
  assert read['n'].shape == ()
  assert {a.dtype for a in read.values()} == {dtype}


def test_views_of_a_shared_storage(path):
  state = collections.OrderedDict(
    whole=T(X),
    transposed=T(X, (6, 4), (1, 6)),
    column=T(X, (4,), (6,), 2),
    row=T(X, (6,), (1,), 6),
    steps=T(X, (2, 3), (12, 2), 1),
    expanded=T(X, (3, 6), (0, 1), 18),
    empty=T(X, (0, 6), (6, 1)),
  )
  save(path, state)
  read = load(path)
  expected = {
    'whole': X,
    'transposed': X.T,
    'column': X[:, 2],
    'row': X[1],
    'steps': X[::2, 1::2],
    'expanded': np.broadcast_to(X[3], (3, 6)),
    'empty': X[:0],
  }
  for name, array in expected.items():
    np.testing.assert_array_equal(read[name], array, err_msg=name)
    assert read[name].flags.c_contiguous
  transposed = sources.open_source(path).tensors['transposed']
  np.testing.assert_array_equal(transposed.read((slice(1, 3), -1)), X.T[1:3, -1])


NAMESPACE = Raw(b'cargparse\nNamespace\n)\x81}X\x02\x00\x00\x00lrK\x01sb')
STATE = {'w': T(X)}


@pytest.mark.parametrize('key', ['model', 'state_dict', 'teacher', 'module', 'model_ema'])
def test_the_state_dict_is_found(key, path):
  optimizer = {'state': {0: {'exp_avg': T(X + 1)}}, 'param_groups': [{'lr': 0.1}]}
  save(
    path, {'epoch': 3, key: {**STATE, 'note': 'text'}, 'optimizer': optimizer, 'args': NAMESPACE}
  )
  source = sources.open_source(path)
  assert list(source.tensors) == ['w']
  assert source.metadata == {'taken': key, 'other': ['args', 'epoch', 'note', 'optimizer']}


def test_several_state_dicts_are_the_users_choice(path):
  save(path, {'model': {'w': T(X)}, 'model_ema': {'w': T(X + 1)}, 'epoch': 1})
  with pytest.raises(errors.UserError, match='several state dicts: model, model_ema'):
    sources.open_source(path)
  source = sources.open_source(f'{path}:model_ema')
  np.testing.assert_array_equal(source.tensors['w'].read(), X + 1)
  assert source.metadata == {'taken': 'model_ema', 'other': ['epoch', 'model']}
  with pytest.raises(errors.UserError, match=r"'modell'\. Did you mean 'model'"):
    sources.open_source(f'{path}:modell')


def test_a_known_name_is_preferred_and_an_unknown_one_can_be_the_only_one(path):
  save(path, {'student': {'w': T(X)}, 'teacher': {'w': T(X + 1)}})
  assert sources.open_source(path).metadata['taken'] == 'teacher'
  save(path, {'net': {'w': T(X)}})
  assert sources.open_source(path).metadata['taken'] == 'net'
  save(path, {'best': T(X), 'model': {'w': T(X)}})
  assert sources.open_source(path).metadata['taken'] == 'model'


@pytest.mark.parametrize('value', [[T(X)], {'epoch': 1}, 5, {}])
def test_without_a_state_dict(value, path):
  save(path, value)
  with pytest.raises(errors.UserError, match='holds no'):
    sources.open_source(path)


# Nothing runs.


class Canary:
  def __init__(self, command):
    self.command = command

  def __reduce__(self):
    return (os.system, (self.command,))


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_code_in_a_pickle_is_named_and_not_run(protocol, path, tmp_path):
  canary = tmp_path / 'canary'
  pickled = pickle.dumps({'w': Canary(f'echo > {canary}')}, protocol)
  save(path, None, pickled=pickled)
  with pytest.raises(errors.UserError, match=r"refers to '(posix|nt)\.system'"):
    sources.open_source(path)
  assert not canary.exists()
  pickle.loads(pickled)
  assert canary.exists()  # The pickle would really have run.


GLOBAL = b'ctorch\nfloat32\n'
NESTED = b']' + b'q\x00' + b'h\x00h\x00\x86q\x00' * 60  # A tuple that prints as 2**60 brackets.
BAD_PICKLES = {
  'builtin': (b'cbuiltins\neval\n(X\x01\x00\x00\x001tR', "'builtins.eval'"),
  'attribute path': (b'\x8c\x05torch\x8c\x10_utils.os.system\x93', "'torch._utils.os.system'"),
  'allowed name elsewhere': (b'cos\nOrderedDict\n', "'os.OrderedDict'"),
  'line break in a name': (b'\x8c\x0btorch.float\x8c\x0332\n\x93', 'refers to'),
  'name that is a list': (b']]\x93', 'no text'),
  'name that is endless': (NESTED + b'h\x00\x93', 'no text'),
  'class that is endless': (NESTED + b')\x81', 'no class'),
  'instance': (b'(ios\nsystem\n', 'INST'),
  'old object': (b'(cargparse\nNamespace\no', 'OBJ'),
  'extension': (b'\x82\x01', 'EXT1'),
  'buffer': (b'\x97', 'NEXT_BUFFER'),
  'huge bytearray': (b'\x96' + struct.pack('<Q', 2**40), 'damaged'),
  'huge text': (b'\x8d' + struct.pack('<Q', 2**60), 'damaged'),
  'huge integer': (b'\x8b' + struct.pack('<i', 8000) + b'\1' * 8000, 'LONG4'),
  'dtype called': (GLOBAL + b')R', 'a call of torch.float32'),
  'result called': (b'})R', 'no function'),
  'many items': (b']' * (3 * 2**20), 'more than 2,097,152 items'),
  'many arguments': (b'ctorch\nSize\n(' + b'N' * 9 + b'tR', 'a call with 9 arguments'),
  'attributes of a class': (b'cargparse\nNamespace\n}X\x01\x00\x00\x00aK\x01sb', 'attributes'),
  'object of a class': (b'ccollections\nOrderedDict\n)\x81', 'an object of'),
  'nested key': (b'}' + b')' + b'\x85' * 300_000 + b'K\x01s', 'a dict key of type tuple'),
  'doubled key': (b'}(K\x01NK\x01Nu', "'1' stands twice"),
  'memo of nothing': (b'h\x07', 'damaged'),
  'empty stack': (b'0', 'damaged'),
  'mark of nothing': (b't', 'damaged'),
  'wrong persistent id': (b'X\x01\x00\x00\x00aQ', 'damaged'),
  'text instead of storage': (
    b'ctorch._utils\n_rebuild_tensor_v2\n(NK\x00))\x89NtR',
    'without a storage',
  ),
}


@pytest.mark.parametrize('case', BAD_PICKLES)
def test_bad_pickles_are_refused(case, path):
  code, message = BAD_PICKLES[case]
  save(path, None, pickled=b'\x80\x02' + code + b'.')
  with pytest.raises(errors.UserError, match=re.escape(message)) as error:
    sources.open_source(path)
  assert str(path) in str(error.value)
  assert len(str(error.value)) < 1000


def test_endless_nesting_and_a_huge_memo_index_are_harmless(path):
  nested = b']' * 200_000 + b'a' * 199_999
  memo = b'Nr' + struct.pack('<I', 2**32 - 1)
  save(path, {'w': T(X), 'deep': Raw(nested), 'memo': Raw(memo)})
  source = sources.open_source(path)
  assert list(source.tensors) == ['w']
  assert source.metadata['other'] == ['deep', 'memo']


@pytest.mark.parametrize('item', [b'N', b'K\x01', b'\x8a\xff' + b'\x01' * 255])
@pytest.mark.parametrize('call', [b'h\x01h\x00\x85R', b'h\x02(h\x03K\x00h\x00h\x00tR'])
def test_a_long_list_is_not_copied_again_and_again(call, item):
  long = b']q\x00(' + item + b'q\x04' + b'h\x04' * 200_000 + b'e'
  functions = b'ctorch\nSize\nq\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02'
  storage = b'(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000NK\x01tQq\x03'
  tracemalloc.start()
  with pytest.raises(errors.UserError, match='its shape is'):
    torch_pickle.load(long + functions + storage + b'](' + call * 2000 + b'e.', 'x')
  assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
  tracemalloc.stop()


def test_sizes_may_be_tuples_or_short_lists():
  for size in (b'(K\x02K\x03t', b'](K\x02K\x03e'):
    assert torch_pickle.load(b'ctorch\nSize\n' + size + b'\x85R.', 'x') == (2, 3)


def test_truncated_pickles_are_refused(path):
  whole = Writer().pickle({'model': {'w': T(X), 'b': T(X, parameter=True)}, 'epoch': 1})
  for length in range(len(whole)):
    with pytest.raises(errors.UserError):
      torch_pickle.load(whole[:length], 'x')


@pytest.mark.filterwarnings('ignore:invalid escape')
def test_random_damage_is_an_error_or_harmless():
  whole = Writer().pickle(collections.OrderedDict(w=T(X), b=T(X, (6, 4), (1, 6))))
  rng = np.random.default_rng(0)
  refused = 0
  for _ in range(2000):
    damaged = bytearray(whole)
    for _ in range(rng.integers(1, 4)):
      damaged[rng.integers(len(damaged))] = rng.integers(256)
    try:
      torch_pickle.load(bytes(damaged), 'x')
    except errors.UserError:
      refused += 1
  assert refused > 1000


@pytest.mark.parametrize(
  ('tensor', 'message'),
  [
    (T(X, (4, 7)), 'beyond its storage'),
    (T(X, (24,), offset=1), 'beyond its storage'),
    (T(X, (2,), (2**30,)), 'beyond its storage'),
    (T(X, (2**30, 2**30), (0, 0)), 'too large'),
    (T(X, (2**30,), (0,)), 'repeats its 96 stored bytes'),
    (T(X, (-1,), (1,)), 'no list of integers'),
    (T(X, (6,), (-1,), 10), 'no list of integers'),
    (T(X, (6,), (1,), -1), 'without a storage'),
    (T(X, (4, 6), (1,)), 'damaged'),
    (T(X, numel=25), 'its storage has 96 bytes'),
    (T(X, numel=2**30), 'its storage has 96 bytes'),
    (T(X, (1,) * 40, (1,) * 40), 'too large'),
  ],
)
def test_tensors_must_lie_in_their_storage(tensor, message, path):
  save(path, {'w': tensor})
  with pytest.raises(errors.UserError, match=re.escape(message)):
    sources.open_source(path)


# The archive.


def test_the_archive_is_checked(path):
  save(path, STATE, extra={'byteorder': b'big'})
  with pytest.raises(errors.UserError, match=r"byte order is b'big'"):
    sources.open_source(path)
  save(path, STATE, drop=('byteorder',))  # Before PyTorch 2.1.
  np.testing.assert_array_equal(load(path)['w'], X)
  data = path.read_bytes()
  crc = struct.pack('<I', zlib.crc32(X.tobytes()))
  assert data.count(crc) == 2
  path.write_bytes(data.replace(crc, b'none'))  # PyTorch told to compute none.
  np.testing.assert_array_equal(load(path)['w'], X)
  save(path, STATE, drop=('data/0',))
  with pytest.raises(errors.UserError, match="lacks its storage 'archive/data/0'"):
    sources.open_source(path)
  for program in ('constants.pkl', 'code/__torch__.py'):
    save(path, STATE, extra={program: b''})
    with pytest.raises(errors.UserError, match=r'TorchScript.*torch\.jit\.load'):
      sources.open_source(path)
  save(path, STATE)
  path.write_bytes(path.read_bytes()[:-30])
  with pytest.raises(errors.UserError, match='cut off'):
    sources.open_source(path)


def test_a_storage_outside_of_the_archive_is_not_looked_for(path):
  (path.parent / '0').write_bytes(X.tobytes())
  pickled = Writer().pickle(STATE)
  key = b'X\x01\x00\x00\x000'
  assert pickled.count(key) == 1
  for name in ('../../../0', str(path.parent / '0')):
    outside = b'X' + struct.pack('<I', len(name)) + name.encode()
    save(path, None, pickled=pickled.replace(key, outside))
    with pytest.raises(errors.UserError, match='lacks its storage'):
      sources.open_source(path)


def test_a_pickle_too_large_is_not_unpacked(path):
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('archive/data.pkl', b']' * (17 * 2**20))
  with pytest.raises(errors.UserError, match='at most 16,777,216 are read'):
    sources.open_source(path)


def test_shards_of_pickles(path):
  save(path.parent / 'one.bin', {'a': T(X)})
  save(path.parent / 'two.bin', {'b': T(X + 1)})
  index = path.parent / 'pytorch_model.bin.index.json'
  index.write_text('{"weight_map": {"a": "one.bin", "b": "two.bin"}}')
  np.testing.assert_array_equal(load(index)['b'], X + 1)
  with pytest.raises(errors.UserError, match='has no parts'):
    sources.open_source(f'{index}:model')
