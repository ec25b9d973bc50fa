"""AdaptFormer's insert against its equation in NumPy."""

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


@pytest.mark.parametrize('scale', [0.1, 10.0])
def test_insert_equals_the_equation(scale, call_insert):
  method = methods.build('adaptformer', SPEC, {'bottleneck': 3, 'scale': scale})
  assert set(method.inserts) == {'mlp_block'}
  have, p = call_insert(method, 'mlp_block', f, X, CTX)
  u = X.astype(np.float64)
  hidden = np.maximum(u @ p['delta/down_kernel'] + p['delta/down_bias'], 0)
  want = f(u) + scale * (hidden @ p['delta/up_kernel'] + p['delta/up_bias'])
  np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)


def test_defaults_are_those_of_the_paper_for_images(start_of, call_insert):
  default = methods.build('adaptformer', SPEC)
  p = start_of(default, 'mlp_block', f, X, CTX)
  assert p['delta/down_kernel'].shape == (6, 64)
  bound = 1 / np.sqrt(6)
  assert 0.9 * bound < np.abs(p['delta/down_kernel']).max() <= bound
  assert not any(np.any(p[f'delta/{name}']) for name in ('down_bias', 'up_kernel', 'up_bias'))
  same = methods.build('adaptformer', SPEC, {'scale': 0.1})
  y, equal = (call_insert(m, 'mlp_block', f, X, CTX)[0] for m in (default, same))
  assert np.array_equal(y, equal)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'bottleneck': 0}, 'adaptformer bottleneck must be at least 1, got 0'),
    ({'scale': 0.0}, 'adaptformer scale must be positive, got 0.0'),
    ({'scale': float('nan')}, 'adaptformer scale must be positive, got nan'),
    ({'dropout': 1.5}, r'adaptformer dropout must be in \[0, 1\), got 1.5'),
  ],
)
def test_a_bad_option_is_a_user_error(options, message):
  with pytest.raises(errors.UserError, match=message):
    methods.build('adaptformer', SPEC, options)
