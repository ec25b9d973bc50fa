"""DoRA against its equations in NumPy; features and gradients against peft: test_against_peft."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from losa_scenic.adapt_lib import dora, methods
from losa_scenic.common_lib import errors
from losa_scenic.model_lib import presets
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.sites import Ctx
from losa_scenic.train_lib import optimizers

D, E, RANK = 6, 5, 2


class Around(nn.Module):
  """DoRA around a linear layer, as a block has it."""

  insert: nn.Module

  def setup(self):
    self.dense = nn.Dense(E)

  def __call__(self, x, train=False):
    return self.insert(self.dense, x, Ctx(grid=(1, 1, x.shape[1]), train=train))


@pytest.fixture
def case(random_like):
  x = np.random.default_rng(0).standard_normal((2, 3, D)).astype(np.float32)

  def make(**fields):
    module = Around(dora.DoRA(RANK, **fields))
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x))
    return module, random_like(shapes, scale=0.5)['params'], x

  return make


def terms(p, scale):
  """W, A B s, gain of the equations."""
  w, own = p['dense']['kernel'], p['insert']
  increment = scale * own['a'] @ own['b']
  gain = (np.linalg.norm(w, axis=0) + own['magnitude_bias']) / np.linalg.norm(w + increment, axis=0)
  return w, increment, gain


def test_equals_the_merged_weight(case):
  module, p, x = case(scale=0.7)
  w, increment, gain = terms(p, 0.7)
  want = x @ ((w + increment) * gain) + p['dense']['bias']
  np.testing.assert_allclose(module.apply({'params': p}, x), want, rtol=1e-5, atol=1e-5)
  assert np.abs(gain - 1).max() > 0.1


def test_with_dropout_the_pretrained_output_stays_whole(case):
  """The sum over many masks: x W + c exactly plus increments whose mean is known."""
  module, p, x = case(dropout=0.5)
  w, increment, gain = terms(p, 1.0)
  keys = jax.random.split(jax.random.key(0), 4000)
  run = jax.vmap(lambda key: module.apply({'params': p}, x, train=True, rngs={'dropout': key}))
  ys = np.asarray(jax.jit(run)(keys), np.float64)
  whole = x @ w + p['dense']['bias']
  # y - whole is linear in the kept inputs: the same thinned-out x goes through both other terms.
  slope = (gain - 1) * w + gain * increment
  mean = whole + x @ slope
  deviation = np.sqrt((x.astype(np.float64) ** 2) @ slope**2)  # At rate 1/2 each term is 0 or 2x.
  np.testing.assert_array_less(np.abs(ys.mean(0) - mean), 6 * deviation / np.sqrt(4000) + 1e-5)
  np.testing.assert_allclose(ys.std(0), deviation, rtol=0.1)
  still = module.apply({'params': p}, x)
  np.testing.assert_allclose(still, mean, rtol=1e-4, atol=1e-4)


def test_the_norm_has_no_gradient(case):
  module, p, x = case()
  w, increment, gain = terms(p, 1.0)
  v = w + increment
  cotangent = np.random.default_rng(1).standard_normal((2, 3, E)).astype(np.float32)

  def loss(own):
    return (cotangent * module.apply({'params': {**p, 'insert': own}}, x)).sum()

  have = jax.grad(loss)(p['insert'])
  flat_x, flat_c = x.reshape(-1, D), cotangent.reshape(-1, E)
  by_v = flat_x.T @ flat_c * gain  # d loss / d V with the norm held.
  np.testing.assert_allclose(have['a'], by_v @ p['insert']['b'].T, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(have['b'], p['insert']['a'].T @ by_v, rtol=1e-4, atol=1e-5)
  magnitude = (flat_c * (flat_x @ v)).sum(0) / np.linalg.norm(v, axis=0)
  np.testing.assert_allclose(have['magnitude_bias'], magnitude, rtol=1e-4, atol=1e-5)


def test_an_output_without_weights_stays_finite(case):
  module, p, x = case()
  p['dense']['kernel'][:, 1] = 0
  p['insert'] = {name: np.zeros_like(leaf) for name, leaf in p['insert'].items()}
  y, gradient = jax.value_and_grad(
    lambda own: module.apply({'params': {**p, 'insert': own}}, x).sum()
  )(p['insert'])
  assert np.isfinite(y) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_weight_decay_spares_the_magnitude():
  leaves = {'a': 0, 'b': 0, 'magnitude_bias': 0}
  assert optimizers.decay_mask(leaves) == {'a': True, 'b': True, 'magnitude_bias': False}


def test_another_insert_in_between_is_refused():
  spec = presets.preset('test/8')
  with pytest.raises(errors.UserError, match='needs the frozen weight itself'):
    Adapted(spec, methods.build('lora+dora', spec), 5).param_shapes()


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'rank': 0}, 'DoRA rank must be at least 1, got 0'),
    ({'alpha': -1.0}, r'DoRA alpha must be positive, got -1\.0'),
    ({'dropout': -0.1}, r'DoRA dropout must be in \[0, 1\)'),
    ({'targets': 'mlp'}, "Unknown DoRA target 'mlp'"),
  ],
)
def test_a_bad_option_is_a_user_error(options, message):
  with pytest.raises(errors.UserError, match=message):
    methods.build('dora', presets.preset('test/8'), options)
