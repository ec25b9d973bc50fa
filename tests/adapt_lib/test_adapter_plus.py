"""Adapter+'s insert against its equation in NumPy."""

import math

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


def added(p, y):
  gelu = np.vectorize(lambda t: 0.5 * t * (1 + math.erf(t / math.sqrt(2))))
  p = {path.removeprefix('delta/'): leaf for path, leaf in p.items()}
  hidden = gelu(y @ p['delta/down_kernel'] + p['delta/down_bias'])
  return p['scale'] * (hidden @ p['delta/up_kernel'] + p['delta/up_bias'])


def test_insert_equals_the_equation(call_insert):
  method = methods.build('adapter_plus', SPEC, {'bottleneck': 3})
  assert set(method.inserts) == {'block'}
  have, p = call_insert(method, 'block', f, X, CTX)
  y = f(X.astype(np.float64))
  np.testing.assert_allclose(have, y + added(p, y), rtol=1e-5, atol=1e-5)


def test_drop_path_drops_whole_images_and_scales_up_the_others(call_insert):
  x = np.tile(X[:1], (64, 1, 1))
  method = methods.build('adapter_plus', SPEC, {'drop_path': 0.25})
  training = Ctx(grid=(1, 2, 2), prefix=1, train=True)
  rngs = {'dropout': jax.random.key(0)}
  have, p = call_insert(method, 'block', f, x, training, rngs=rngs)
  y = f(x.astype(np.float64))
  delta = (have - y) / added(p, y)
  kept = delta.mean(axis=(1, 2)) > 0.5
  np.testing.assert_allclose(
    delta, np.where(kept, 4 / 3, 0)[:, None, None] * np.ones_like(y), atol=1e-3
  )
  assert 36 <= kept.sum() <= 60
  have, _ = call_insert(method, 'block', f, x, CTX, rngs=rngs)
  np.testing.assert_allclose(have, y + added(p, y), rtol=1e-5, atol=1e-5)


def test_starts_as_published_or_at_zero(start_of):
  x = np.zeros((1, 5, 512), np.float32)
  published, zero = (
    methods.build('adapter_plus', SPEC),
    methods.build('adapter_plus', SPEC, {'init': 'zero'}),
  )
  assert zero.exact_at_init and not published.exact_at_init
  p = start_of(published, 'block', f, x, CTX)
  assert np.array_equal(p['delta/scale'], np.ones(512))
  for name in ('down', 'up'):
    kernel = p[f'delta/delta/{name}_kernel']
    # A normal distribution cut at two deviations has 0.88 of its deviation.
    assert 0.019 < np.abs(kernel).max() <= 0.02 and abs(kernel.std() - 0.0088) < 5e-4
    assert not np.any(p[f'delta/delta/{name}_bias'])
  p = start_of(zero, 'block', f, x, CTX)
  assert np.any(p['delta/delta/down_kernel']) and not np.any(p['delta/delta/up_kernel'])


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'bottleneck': -1}, 'adapter_plus bottleneck must be at least 1, got -1'),
    ({'dropout': 1.0}, r'adapter_plus dropout must be in \[0, 1\), got 1.0'),
    ({'drop_path': 1.0}, r'adapter_plus drop_path must be in \[0, 1\), got 1.0'),
    ({'init': 'hulsby'}, "Did you mean 'houlsby'"),
  ],
)
def test_a_bad_option_is_a_user_error(options, message):
  with pytest.raises(errors.UserError, match=message):
    methods.build('adapter_plus', SPEC, options)
