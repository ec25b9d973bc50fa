"""RepAdapter's insert against its equation in NumPy, and folded into a linear layer."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from losa_scenic.adapt_lib import methods
from losa_scenic.common_lib import errors
from losa_scenic.model_lib import presets
from losa_scenic.model_lib.sites import Ctx

SPEC = presets.preset('test/8')
CTX = Ctx(grid=(1, 2, 2), prefix=1)
QKV = ('query', 'key', 'value')
X = np.random.default_rng(1).standard_normal((2, 5, 12)).astype(np.float32)
W = np.random.default_rng(2).standard_normal((12, 7)).astype(np.float32)


def f(x):
  return x @ W + 1


def added(p, z):
  """G(z W_d + b_d) + b_g, one output channel at a time."""
  hidden, up = z @ p['delta/down_kernel'] + p['delta/down_bias'], p['delta/up_kernel']
  _, n_in, n_out = up.shape
  y = np.zeros_like(z)
  for channel in range(z.shape[-1]):
    group = channel // n_out
    of_group = hidden[..., group * n_in : (group + 1) * n_in]
    y[..., channel] = of_group @ up[group, :, channel % n_out]
  return y + p['delta/up_bias']


@pytest.mark.parametrize('groups', [1, 2, 3])
@pytest.mark.parametrize('where', [QKV, 'fc1'])
def test_insert_equals_the_equation(where, groups, call_insert):
  spec = presets.preset('test/8', width=12)
  options = {'bottleneck': 6, 'groups': groups, 'scale': 0.5}
  have, p = call_insert(methods.build('repadapter', spec, options), where, f, X, CTX)
  z = X.astype(np.float64)
  np.testing.assert_allclose(have, f(z + 0.5 * added(p, z)), rtol=1e-5, atol=1e-5)
  assert p['delta/up_kernel'].shape == (groups, 6 // groups, 12 // groups)


def test_it_can_be_folded_into_the_linear_layer(call_insert):
  have, p = call_insert(methods.build('repadapter', SPEC, {'scale': 3.0}), 'fc1', f, X, CTX)
  eye, bias = np.eye(12), added(p, np.zeros((1, 12)))
  weight = (eye + 3 * (added(p, eye) - bias)) @ W
  np.testing.assert_allclose(have, X @ weight + 3 * bias @ W + 1, rtol=1e-4, atol=1e-4)


def test_query_key_and_value_share_one_module_and_its_dropout_mask(random_like):
  module = methods.build('repadapter', SPEC, {'dropout': 0.5}).inserts[QKV]()
  training = Ctx(grid=(1, 2, 2), prefix=1, train=True)
  same = lambda u: u  # noqa: E731

  def three(module):
    return [module(same, X, training) for _ in QKV]

  params = random_like(jax.eval_shape(lambda: module.init(jax.random.key(0), same, X, CTX)))
  draws = [nn.apply(three, module)(params, rngs={'dropout': jax.random.key(i)}) for i in (0, 1)]
  assert all(np.array_equal(draws[0][0], y) for y in draws[0])
  assert not np.allclose(draws[0][0], draws[1][0])
  assert not np.allclose(draws[0][0], module.apply(params, same, X, CTX))


@pytest.mark.parametrize(
  ('placement', 'where'), [('block', {QKV, 'fc1'}), ('attn', {QKV})], ids=['block', 'attn']
)
def test_placement(placement, where):
  method = methods.build('repadapter', SPEC, {'placement': placement})
  assert set(method.inserts) == where and method.exact_at_init


def test_starts_at_zero_with_a_gradient(start_of):
  p = start_of(methods.build('repadapter', SPEC), 'fc1', f, X, CTX)
  assert np.any(p.pop('delta/down_kernel')) and not any(np.any(leaf) for leaf in p.values())


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'bottleneck': 0}, 'repadapter bottleneck must be at least 1, got 0'),
    ({'groups': 0}, 'repadapter groups must be at least 1, got 0'),
    ({'groups': 3}, 'groups must divide the bottleneck 8 and the width 32, got 3'),
    ({'groups': 3, 'bottleneck': 6}, 'groups must divide the bottleneck 6 and the width 32'),
    ({'scale': -1.0}, 'repadapter scale must be positive, got -1.0'),
    ({'dropout': 1.0}, r'repadapter dropout must be in \[0, 1\), got 1.0'),
    ({'placement': 'mlp'}, "Unknown repadapter placement 'mlp'"),
  ],
)
def test_a_bad_option_is_a_user_error(options, message):
  with pytest.raises(errors.UserError, match=message):
    methods.build('repadapter', SPEC, options)
