"""Parameter trees: paths, counts, descriptions and hashes."""

import jax
import numpy as np

from losa_scenic.common_lib import trees

TREE = {'a': {'b': np.zeros((2, 3), np.float32)}, 'c': np.arange(4, dtype=np.int32)}


def test_flatten_and_back():
  flat = trees.flatten(TREE)
  assert list(flat) == ['a/b', 'c']
  assert trees.flatten(trees.unflatten(flat)).keys() == flat.keys()
  assert trees.unflatten(flat)['a']['b'] is TREE['a']['b']


def test_count_and_describe_need_no_data():
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), TREE)
  for tree in (TREE, shapes):
    assert trees.count(tree) == 10
    assert trees.describe(tree) == {'a/b': [[2, 3], 'float32'], 'c': [[4], 'int32']}


def test_differences():
  want = {'a': [[2], 'float32'], 'b': [[1], 'int32']}
  assert trees.differences(want, dict(want)) == []
  lines = trees.differences(want, {'a': [[3], 'float32'], 'c': [[1], 'int32']})
  assert [line.split(':')[0] for line in lines] == ['missing', 'unexpected', 'a']
  many = {str(i): [[i], 'int32'] for i in range(20)}
  assert trees.differences(many, {}, limit=3)[-1] == '... and 17 more'


def test_digest_covers_paths_shapes_types_and_bytes():
  same = {'c': TREE['c'].copy(), 'a': {'b': TREE['a']['b'].copy()}}  # Another order.
  assert trees.digest(same) == trees.digest(TREE)
  flipped = TREE['c'].copy()
  flipped.view(np.uint8)[5] ^= 1
  others = [
    TREE | {'c': flipped},
    TREE | {'c': TREE['c'].reshape(2, 2)},
    TREE | {'c': TREE['c'].astype(np.int64)},
    {'a': TREE['a'], 'd': TREE['c']},
  ]
  assert len({trees.digest(tree) for tree in [TREE, *others]}) == 5
