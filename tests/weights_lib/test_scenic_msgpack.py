"""Checkpoints of Scenic and Flax: which subtree is taken, and damage."""

import ml_dtypes
import numpy as np
import pytest
from flax import serialization

from losa_scenic.common_lib import errors
from losa_scenic.weights_lib import sources

BF16 = np.dtype(ml_dtypes.bfloat16)


def one(value):
  return np.full((2,), value, np.float32)


@pytest.mark.parametrize(
  'wrap',
  [
    lambda tree: {'params': tree, 'opt_state': {'0': {'mu': tree}}, 'global_step': 7},
    lambda tree: {'optimizer': {'target': tree, 'state': {'step': 7, 'mu': tree}}},
    lambda tree: tree,
  ],
)
def test_scenic_checkpoints(wrap, tmp_path):
  tree = {'Transformer': {'encoderblock_0': {'scale': one(3).astype(BF16)}}, 'cls': one(4)}
  path = tmp_path / 'checkpoint_7'
  path.write_bytes(serialization.msgpack_serialize(wrap(tree)))
  source = sources.open_source(tmp_path)
  assert source.files == (path,)
  read = {name: tensor.read() for name, tensor in source.tensors.items()}
  assert list(read) == ['Transformer/encoderblock_0/scale', 'cls']
  assert read['Transformer/encoderblock_0/scale'].dtype == BF16
  assert read['cls'][0] == 4
  other = {'params': ['global_step', 'opt_state'], 'optimizer/target': ['optimizer/state']}
  taken = source.metadata.get('taken')
  assert source.metadata.get('other') == other.get(taken)


def test_damaged_msgpack_is_refused(tmp_path):
  path = tmp_path / 'checkpoint_7'
  whole = serialization.msgpack_serialize({'params': {'a': one(1)}})
  for data in (b'\x81' * 100_000, whole.replace(b'float32', b'objects'), b'\x81\xa1ax'):
    path.write_bytes(data)
    with pytest.raises(errors.UserError, match=r'not a readable msgpack|holds no weights'):
      sources.open_source(path)
