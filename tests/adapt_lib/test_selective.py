"""Which of the backbone's own parameters train."""

import jax.numpy as jnp
import numpy as np
import pytest

from losa_scenic.adapt_lib import methods
from losa_scenic.adapt_lib.method import partition, split_head
from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib import presets
from losa_scenic.model_lib.adapted import Adapted

BLOCK = {f'{name}/kernel' for name in ('query', 'key', 'value', 'out', 'fc1', 'fc2')}
BLOCK |= {path.replace('kernel', 'bias') for path in BLOCK}
BLOCK |= {f'{norm}/{leaf}' for norm in ('norm1', 'norm2') for leaf in ('scale', 'bias')}
MAP_HEAD = {path for path in BLOCK if 'norm' not in path} | {'norm/scale', 'norm/bias', 'probe'}


def trained(method, options=None, **changes):
  """Paths in an unrolled backbone of three blocks that train."""
  spec = presets.preset('test/8', **changes)
  built = methods.build(method, spec, options)
  trainable, _ = partition(Adapted(spec, built, 5).param_shapes(), built)
  rest, head = split_head(trainable)
  assert set(head['output_projection']) == {'kernel', 'bias'}
  return {path.removeprefix('backbone/') for path in trees.flatten(rest)}


def in_blocks(names, blocks=range(3)):
  return {f'encoder/layers_{i}/block/{name}' for i in blocks for name in names}


def test_bitfit_trains_every_bias_and_nothing_else():
  biases = {path for path in BLOCK if path.endswith('bias')}
  want = in_blocks(biases) | {'patch/proj/bias', 'norm/bias'}
  assert trained('bitfit') == want
  of_head = {f'map_head/{path}' for path in MAP_HEAD if path.endswith('bias')}
  assert len(of_head) == 7
  assert trained('bitfit', pool='map') == want | of_head


@pytest.mark.parametrize('k', [1, 2, 3])
def test_last_k_trains_the_last_blocks_and_the_map_head(k):
  want = in_blocks(BLOCK, range(3 - k, 3))
  assert trained('last_k', {'k': k}) == want
  assert trained('last_k', {'k': k}, pool='map') == want | {f'map_head/{p}' for p in MAP_HEAD}
  norm = {'norm/scale', 'norm/bias'}
  assert trained('last_k', {'k': k, 'final_norm': True}) == want | norm


def test_last_k_of_more_than_ten_blocks_counts_them_right():
  want = in_blocks(BLOCK, (11,))
  assert trained('last_k', depth=12) == want


@pytest.mark.parametrize(('k', 'first', 'cost'), [(1, 2, 'B'), (2, 1, 'B'), (3, 0, 'D')])
def test_last_k_says_where_gradients_stop(k, first, cost):
  method = methods.build('last_k', presets.preset('test/8'), {'k': k})
  assert (method.first, method.memory_class, method.unrolled) == (first, cost, k < 3)


@pytest.mark.parametrize(
  ('method', 'names'),
  [('mlp_only', {'fc1', 'fc2'}), ('attention_only', {'query', 'key', 'value', 'out'})],
)
def test_mlp_only_and_attention_only(method, names):
  leaves = {f'{name}/{leaf}' for name in names for leaf in ('kernel', 'bias')}
  head = {f'map_head/{leaf}' for leaf in leaves}
  for pool in ('cls', 'gap'):
    assert trained(method, pool=pool) == in_blocks(leaves)
  assert trained(method, pool='map') == in_blocks(leaves) | head
  assert trained(method, {'map_head': False}, pool='map') == in_blocks(leaves)


@pytest.mark.parametrize('method', ['bitfit', 'mlp_only', 'attention_only'])
def test_the_rule_is_the_same_for_stacked_layers(method):
  spec = presets.preset('test/8', pool='map')
  built = methods.build(method, spec)
  counts = [
    trees.count(partition(Adapted(spec, built, 5, scan=scan).param_shapes(), built)[0])
    for scan in (False, True)
  ]
  assert counts[0] == counts[1] > 0


@pytest.mark.parametrize('k', [0, 4, -1])
def test_last_k_out_of_range_is_a_user_error(k):
  with pytest.raises(errors.UserError, match=rf'last_k k must be in 1\.\.3, got {k}'):
    methods.build('last_k', presets.preset('test/8'), {'k': k})


def test_last_k_refuses_to_be_scanned():
  spec = presets.preset('test/8')
  model = Adapted(spec, methods.build('last_k', spec), 5, scan=True)
  with pytest.raises(errors.UserError, match='cannot be scanned'):
    model.apply({'params': {}}, jnp.asarray(np.zeros(model.input_shape(), np.float32)))
