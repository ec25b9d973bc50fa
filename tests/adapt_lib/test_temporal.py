"""The temporal encoder: how it starts, what it counts, sees, refuses, and goes together with.

Features and gradients against NumPy: `test_against_reference`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from losa_scenic.adapt_lib import methods
from losa_scenic.adapt_lib.method import combine, partition, split_head
from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib import presets
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.sites import Ctx

D, M, TIMES = 32, 64, 3
BLOCK = 4 * D * D + 9 * D + 2 * D * M + M


def of(pool='cls', **more):
  fields = {'frames': 2 * TIMES, 'tubelet': 2, 'factorised': True, 'depth': 2, 'image_size': 16}
  return presets.preset('test/8', pool=pool, **fields | more)


def counts(name, spec, options=None):
  built = methods.build(name, spec, options)
  return trees.count(split_head(partition(Adapted(spec, built, 5).param_shapes(), built)[0])[0])


@pytest.mark.parametrize('depth', [1, 4])
@pytest.mark.parametrize('residual', [True, False])
def test_number_of_parameters(depth, residual):
  options = {'depth': depth, 'residual': residual}
  assert counts('temporal', of(), options) == depth * BLOCK + TIMES * D + 2 * D
  assert counts('last_k', of(), {'k': 1}) == BLOCK


def test_blocks_are_plain_whatever_the_backbones_are():
  spec = of(gated=True, norm='rms', layer_scale=True, qkv_bias='none', rope='eva', registers=2)
  assert counts('temporal', spec) == 4 * BLOCK + TIMES * D + 2 * D


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_starts_as_the_mean_over_time_in_every_dtype(dtype):
  method = methods.build('temporal', of(), {'depth': 1})
  x = jnp.asarray(np.random.default_rng(0).standard_normal((2, TIMES, D)), dtype)
  module = method.inserts['time']()
  f, ctx = (lambda x: x.mean(axis=1)), Ctx(grid=(1, 2, 2))
  params = module.init(jax.random.key(0), f, x, ctx)
  have = module.apply(params, f, x, ctx)
  assert method.memory_class == 'A' and method.exact_at_init
  assert have.dtype == dtype and np.array_equal(have, f(x))
  start = {path: np.asarray(leaf) for path, leaf in trees.flatten(params['params']).items()}
  assert all(leaf.dtype == np.float32 for leaf in start.values())
  assert np.any(start['pos_embedding']) and not np.any(start['norm/scale'])


def test_without_the_residual_nothing_of_the_mean_is_left(call_insert):
  method = methods.build('temporal', of(), {'depth': 1, 'residual': False})
  x = np.random.default_rng(0).standard_normal((2, TIMES, D)).astype(np.float32)
  ctx = Ctx(grid=(1, 2, 2))
  one, _ = call_insert(method, 'time', lambda x: x.mean(axis=1), x, ctx)
  two, _ = call_insert(method, 'time', lambda x: 100 + x.mean(axis=1), x, ctx)
  np.testing.assert_array_equal(one, two)
  assert not method.exact_at_init


def test_it_sees_the_order_of_the_times(call_insert):
  x = np.random.default_rng(0).standard_normal((2, TIMES, D)).astype(np.float32)

  def run(x, change=dict):
    method = methods.build('temporal', of(), {'depth': 1})
    call = (method, 'time', lambda x: x.mean(axis=1), x, Ctx(grid=(1, 2, 2)))
    return call_insert(*call, change=change)[0]

  assert np.abs(run(x) - run(x[:, ::-1])).max() > 1e-2
  without = lambda flat: {**flat, 'pos_embedding': 0 * flat['pos_embedding']}  # noqa: E731
  np.testing.assert_allclose(run(x, without), run(x[:, ::-1], without), rtol=1e-4, atol=1e-5)


def test_it_learns_which_way_a_pattern_moves():
  # Forth and back have the same features, of which only the order differs.
  rng = np.random.default_rng(0)
  states = rng.standard_normal((8, D)).astype(np.float32)

  def batch(size):
    first, forth = rng.integers(0, 8, size), rng.integers(0, 2, size)
    x = states[(first[:, None] + (2 * forth[:, None] - 1) * np.arange(8)) % 8]
    return x + 0.3 * rng.standard_normal(x.shape).astype(np.float32), forth

  mean, ctx = (lambda x: x.mean(axis=1)), Ctx(grid=(1, 2, 2))
  module = methods.build('temporal', of(), {'depth': 1}).inserts['time']()
  params = module.init(jax.random.key(0), mean, batch(2)[0], ctx), jnp.zeros((D, 2))
  tx = optax.adamw(5e-3)
  state = tx.init(params)

  @jax.jit
  def step(params, state, x, y):
    def loss(params):
      logits = module.apply(params[0], mean, x, ctx) @ params[1]
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
      return losses.mean(), (logits.argmax(-1) == y).mean()

    gradients, accuracy = jax.grad(loss, has_aux=True)(params)
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, accuracy

  accuracies = []
  for _ in range(250):
    params, state, accuracy = step(params, state, *batch(32))
    accuracies.append(accuracy)
  assert np.mean(accuracies[:5]) < 0.8 and np.mean(accuracies[-20:]) > 0.95


@pytest.mark.parametrize(
  ('name', 'memory_class'),
  [
    ('losa+temporal', 'A'),
    ('full+temporal', 'D'),
    ('lora+temporal', 'C'),
    ('st_adapter+temporal', 'C'),
    ('vpt_deep+temporal', 'C'),
  ],
)
def test_together_with_methods_of_the_spatial_encoder(name, memory_class):
  spec, options = of('map', depth=1), {'temporal': {'depth': 1}}
  assert methods.build(name, spec, options).memory_class == memory_class
  own = BLOCK + TIMES * D + 2 * D
  assert counts(name, spec, options) == counts(methods.parts(name)[0], spec) + own


def test_beside_a_side_network_it_starts_as_the_frozen_model_and_then_sees_time(random_like):
  spec = of('map', depth=1)
  method = methods.build('losa+temporal', spec, {'temporal': {'depth': 1}})
  model, plain = Adapted(spec, method, 5), Adapted(spec, methods.build('linear', spec), 5)
  frozen = random_like(plain.param_shapes())
  own = trees.flatten(model.init_trainable(jax.random.key(0)))
  own = {path: leaf for path, leaf in own.items() if not path.startswith('output')}
  x = np.random.default_rng(0).standard_normal(model.input_shape(2)).astype(np.float32)
  run = jax.jit(lambda p, x: model.apply({'params': p}, x, method='features'))
  have = run(combine(trees.unflatten(own), frozen), x)
  want = plain.apply({'params': frozen}, x, method='features')
  np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-6)
  params = combine(random_like(trees.unflatten(own)), frozen)
  assert np.abs(run(params, x) - run(params, x[:, [4, 5, 2, 3, 0, 1]])).max() > 1e-3


@pytest.mark.parametrize(
  ('spec', 'options', 'message'),
  [
    (presets.preset('test/8'), {}, r"'test/8' is for images: give backbone_configs\.frames and "),
    (presets.preset('vivit-test/8x2'), {}, r"'vivit-test/8x2' mixes .* backbone_configs\.factor"),
    (of(), {'depth': 0}, 'temporal depth must be an integer of at least 1, not 0'),
    (of(), {'layers': 4}, 'Unknown .*layers'),
  ],
)
def test_what_it_refuses(spec, options, message):
  with pytest.raises(errors.UserError, match=message):
    methods.build('temporal', spec, options)
