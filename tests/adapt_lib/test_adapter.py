"""Serial adapters against their equation in NumPy."""

import jax
import numpy as np
import pytest

from losa_scenic.adapt_lib import methods
from losa_scenic.common_lib import errors
from losa_scenic.model_lib import presets
from losa_scenic.model_lib.sites import Ctx

SPEC = presets.preset('test/8')
CTX = Ctx(grid=(1, 2, 2), prefix=1)
X = np.random.default_rng(1).standard_normal((2, 5, 6)).astype(np.float32)


def f(x):
  return 2 * x[..., ::-1] + 1


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


ACTIVATIONS = {
  'quick_gelu': lambda x: x * sigmoid(1.702 * x),
  'relu': lambda x: np.maximum(x, 0),
  'none': lambda x: x,
}


@pytest.mark.parametrize('activation', sorted(ACTIVATIONS))
@pytest.mark.parametrize(
  ('placement', 'where'), [('pfeiffer', 'mlp'), ('houlsby', 'mlp'), ('houlsby', 'attn')]
)
def test_insert_equals_the_equation(placement, where, activation, call_insert):
  options = {'bottleneck': 3, 'placement': placement, 'activation': activation}
  have, p = call_insert(methods.build('adapter', SPEC, options), where, f, X, CTX)
  z = f(X.astype(np.float64))
  hidden = ACTIVATIONS[activation](z @ p['delta/down_kernel'] + p['delta/down_bias'])
  want = z + hidden @ p['delta/up_kernel'] + p['delta/up_bias']
  np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)
  assert p['delta/down_kernel'].shape == (6, 3)


@pytest.mark.parametrize(
  ('placement', 'where', 'activation'),
  [('pfeiffer', {'mlp'}, 'quick_gelu'), ('houlsby', {'attn', 'mlp'}, 'gelu_erf')],
)
def test_placement_says_where_and_which_activation(placement, where, activation, call_insert):
  method = methods.build('adapter', SPEC, {'placement': placement})
  assert set(method.inserts) == where
  same = methods.build('adapter', SPEC, {'placement': placement, 'activation': activation})
  other = methods.build('adapter', SPEC, {'placement': placement, 'activation': 'gelu_tanh'})
  y, equal, different = (call_insert(m, 'mlp', f, X, CTX)[0] for m in (method, same, other))
  assert np.array_equal(y, equal) and not np.allclose(y, different, rtol=0, atol=1e-6)


def test_starts_at_zero_or_as_noah_does(start_of):
  x = np.zeros((1, 5, 512), np.float32)
  zero, noah = (methods.build('adapter', SPEC, {'init': i}) for i in ('zero', 'noah'))
  assert zero.exact_at_init and not noah.exact_at_init
  p = start_of(zero, 'mlp', f, x, CTX)
  assert np.any(p['delta/down_kernel']) and not np.any(p['delta/up_kernel'])
  p = start_of(noah, 'mlp', f, x, CTX)
  for name in ('down', 'up'):
    assert abs(p[f'delta/{name}_kernel'].std() - 0.02) < 0.001
    assert not np.any(p[f'delta/{name}_bias'])


def test_dropout_is_on_the_hidden_channels_and_only_in_training(call_insert):
  def identity(flat):
    kernels = {path: np.eye(6, dtype=np.float32) for path in flat if path.endswith('kernel')}
    return {path: np.zeros_like(leaf) for path, leaf in flat.items()} | kernels

  method = methods.build('adapter', SPEC, {'bottleneck': 6, 'activation': 'none', 'dropout': 0.75})
  rngs = {'dropout': jax.random.key(0)}
  training = Ctx(grid=(1, 2, 2), prefix=1, train=True)
  have, _ = call_insert(method, 'mlp', f, X, training, identity, rngs)
  factors = np.round((have - f(X)) / f(X), 4)
  assert set(np.unique(factors)) == {0.0, 4.0}
  have, _ = call_insert(method, 'mlp', f, X, CTX, identity, rngs)
  np.testing.assert_allclose(have, 2 * f(X), rtol=1e-6)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'bottleneck': 0}, 'adapter bottleneck must be at least 1, got 0'),
    ({'dropout': 1.0}, r'adapter dropout must be in \[0, 1\), got 1.0'),
    ({'dropout': -0.1}, r'adapter dropout must be in \[0, 1\), got -0.1'),
    ({'placement': 'pfeifer'}, "adapter placement 'pfeifer'. Did you mean 'pfeiffer'"),
    ({'activation': 'gelu'}, "Unknown adapter activation 'gelu'"),
    ({'init': 'zeros'}, "Did you mean 'zero'"),
  ],
)
def test_a_bad_option_is_a_user_error(options, message):
  with pytest.raises(errors.UserError, match=message):
    methods.build('adapter', SPEC, options)
