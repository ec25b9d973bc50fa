"""LoRA in a whole model, against the same model with its increments added to the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from losa_scenic.adapt_lib import inserts, methods
from losa_scenic.adapt_lib.method import partition, split_head
from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib import presets
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.sites import Ctx
from losa_scenic.model_lib.vit import ViT


def adapted(options, **changes):
  spec = presets.preset('test/8', **changes)
  return Adapted(spec, methods.build('lora', spec, options), 5)


def own_shapes(model):
  """{path in the backbone: shape} of what trains beside the classifier."""
  trainable = split_head(partition(model.param_shapes(), model.method)[0])[0]
  flat = trees.flatten(trainable)
  return {path.removeprefix('backbone/'): leaf.shape for path, leaf in flat.items()}


@pytest.mark.parametrize(
  ('options', 'scale'),
  [
    ({'rank': 2, 'alpha': 3.0}, 1.5),
    ({'rank': 2, 'targets': 'query,key,value,out,fc1,fc2'}, 1.0),
    ({'rank': 2, 'targets': 'qkv', 'shared_down': True}, 1.0),
    ({'rank': 2, 'targets': 'qkv,out', 'map_head': True, 'alpha': 1.0}, 0.5),
    ({'rank': 2, 'targets': 'qkv', 'shared_down': True, 'map_head': True}, 1.0),
    ({'rank': 2, 'targets': 'query,value', 'shared_down': True, 'map_head': True}, 1.0),
  ],
)
def test_features_are_those_of_merged_weights(options, scale, random_like, make_batch):
  model = adapted(options, pool='map')
  params = random_like(model.param_shapes())
  merged = trees.flatten(params['backbone'])
  added = [path for path in merged if path.endswith('/a')]
  for path in added:
    parts = path.split('/')
    names = parts[-2].removeprefix('insert_').split('+')
    a = merged.pop(path)
    for name in names:
      b = merged.pop(path[:-1] + (f'b_{name}' if len(names) > 1 else 'b'))
      layer = [*parts[:-2], 'block'] if len(parts) > 2 else ['map_head']
      kernel = '/'.join([*layer, name.removeprefix('pool_'), 'kernel'])
      merged[kernel] = merged[kernel] + scale * a.astype(np.float64) @ b
  assert added and not [path for path in merged if 'insert_' in path]
  images = make_batch(2)['inputs']
  have = model.apply({'params': params}, images, method=model.features)
  plain = ViT(model.spec, {}).apply({'params': trees.unflatten(merged)}, images)
  np.testing.assert_allclose(have, plain, rtol=2e-4, atol=2e-4)
  frozen = ViT(model.spec, {}).apply({'params': params['backbone']}, images)
  assert np.abs(have - frozen).max() > 0.02


def test_mlp_is_one_linear_path_around_the_whole_mlp(random_like):
  model = adapted({'rank': 2, 'targets': 'mlp', 'alpha': 4.0})
  make = model.method.inserts['mlp']
  x = np.random.default_rng(0).standard_normal((2, 5, 32)).astype(np.float32)
  call = (np.tanh, x, Ctx(grid=(1, 1, 5)))
  p = random_like(jax.eval_shape(lambda: make().init(jax.random.key(0), jnp.tanh, *call[1:])))
  want = np.tanh(x) + 2.0 * x @ p['params']['a'] @ p['params']['b']
  np.testing.assert_allclose(make().apply(p, *call), want, rtol=1e-5, atol=1e-6)
  assert set(own_shapes(model)) == {
    f'encoder/layers_{i}/insert_mlp/{leaf}' for i in range(3) for leaf in 'ab'
  }


def test_shared_down_has_one_a_and_a_b_for_each_target():
  shapes = own_shapes(adapted({'rank': 2, 'targets': 'value,query', 'shared_down': True}))
  want = {'a': (32, 2), 'b_query': (2, 32), 'b_value': (2, 32)}
  assert shapes == {
    f'encoder/layers_{i}/insert_query+value/{leaf}': shape
    for i in range(3)
    for leaf, shape in want.items()
  }


def test_in_the_map_head_the_query_has_another_input_and_an_a_of_its_own():
  options = {'rank': 2, 'targets': 'qkv', 'shared_down': True, 'map_head': True}
  shapes = own_shapes(adapted(options, pool='map'))
  assert {path for path in shapes if 'pool' in path} == {
    'insert_pool_query/a',
    'insert_pool_query/b',
    'insert_pool_key+pool_value/a',
    'insert_pool_key+pool_value/b_pool_key',
    'insert_pool_key+pool_value/b_pool_value',
  }


def test_shared_down_of_one_target_is_plain_lora():
  options = {'targets': 'query'}
  assert own_shapes(adapted(options | {'shared_down': True})) == own_shapes(adapted(options))


def test_map_head_has_no_effect_without_one():
  options = {'targets': 'query,fc1'}
  assert own_shapes(adapted(options | {'map_head': True})) == own_shapes(adapted(options))


def test_a_starts_as_in_the_release_and_b_at_zero():
  model = adapted({'rank': 64})
  flat = trees.flatten(model.init_trainable(jax.random.key(0))['backbone'])
  a = np.stack([leaf for path, leaf in flat.items() if path.endswith('/a')])
  bound = 32**-0.5
  assert bound * 0.98 < np.abs(a).max() <= bound
  assert abs(a.std() - bound / 3**0.5) < 0.01 * bound
  assert not any(np.any(leaf) for path, leaf in flat.items() if path.endswith('/b'))


def test_dropout_thins_out_the_input_in_training_only():
  module = inserts.LowRank(rank=1, dropout=0.5)
  x, p = np.ones((1, 1, 4000), np.float32), {'a': np.ones((4000, 1)), 'b': np.ones((1, 1))}

  def call(train):
    ctx, rngs = Ctx(grid=(1, 1, 1), train=train), {'dropout': jax.random.key(0)}
    return module.apply({'params': p}, lambda u: 0 * u[..., :1], x, ctx, rngs=rngs)

  assert call(False) == 4000
  assert call(True) != 4000 and abs(call(True) - 4000) < 400  # Six standard deviations.


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'rank': 0}, 'LoRA rank must be at least 1, got 0'),
    ({'alpha': 0.0}, r'LoRA alpha must be positive, got 0\.0'),
    ({'dropout': 1.0}, r'LoRA dropout must be in \[0, 1\), got 1\.0'),
    ({'targets': 'query,valu'}, "Unknown LoRA target 'valu'. Did you mean 'value'"),
    ({'targets': ''}, "Unknown LoRA target ''"),
    ({'targets': 'qkv,key'}, "'qkv,key' name a site twice"),
    ({'targets': 'qkv,out', 'shared_down': True}, "among query, key and value; given: 'qkv,out'"),
    ({'targets': 'query,fc1', 'map_head': True}, 'no targets fc1, fc2 and gate, only mlp'),
  ],
)
def test_a_bad_option_is_a_user_error(options, message):
  with pytest.raises(errors.UserError, match=message):
    methods.build('lora', presets.preset('test/8', pool='map'), options)


def test_targets_come_in_one_order():
  assert inserts.targets('X', 'fc1, qkv', ('query', 'key', 'value', 'fc1')) == (
    'query',
    'key',
    'value',
    'fc1',
  )
