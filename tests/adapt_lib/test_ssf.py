"""SSF's insert, and where it stands."""

import numpy as np
import pytest

from losa_scenic.adapt_lib import methods, ssf
from losa_scenic.adapt_lib.method import partition, split_head
from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib import presets
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.sites import Ctx

SPEC = presets.preset('test/8')
CTX = Ctx(grid=(1, 2, 2), prefix=1)
X = np.random.default_rng(1).standard_normal((2, 5, 6)).astype(np.float32)


def f(x):
  return (2 * x + 1)[..., :4]


@pytest.mark.parametrize('where', [site for site in ssf.SITES if site != 'gate'])
def test_insert_equals_the_equation(where, call_insert):
  have, p = call_insert(methods.build('ssf', SPEC), where, f, X, CTX)
  want = f(X.astype(np.float64)) * p['scale'] + p['shift']
  np.testing.assert_allclose(have, want, rtol=1e-6, atol=1e-6)
  assert set(p) == {'scale', 'shift'} and p['scale'].shape == p['shift'].shape == (4,)


@pytest.mark.parametrize('pool', ['cls', 'gap', 'map'])
def test_stands_after_every_linear_layer_and_norm_but_the_map_heads(pool):
  spec = presets.preset('test/8', pool=pool)
  method = methods.build('ssf', spec)
  params = Adapted(spec, method, 5, scan=True).param_shapes()
  have = trees.flatten(split_head(partition(params, method)[0])[0])
  where = {path.split('/')[-2]: leaf.shape[-1] for path, leaf in have.items()}
  width = dict.fromkeys(
    ['patch', 'norm1', 'norm2', 'query', 'key', 'value', 'out', 'fc2', 'norm'], 32
  )
  assert where == {f'insert_{name}': n for name, n in {**width, 'fc1': 64}.items()}
  assert sum(leaf.size for leaf in have.values()) == 2 * 3 * (7 * 32 + 64) + 4 * 32


def test_of_a_gated_mlp_the_gate_too_and_no_norm_where_there_is_none():
  spec = presets.preset('test/8', gated=True, final_norm='none')
  assert set(methods.build('ssf', spec).inserts) == set(ssf.SITES) - {'norm'}


def test_starts_around_or_at_the_identity(start_of):
  x = np.zeros((1, 5, 4096), np.float32)
  normal, identity = (methods.build('ssf', SPEC, {'init': i}) for i in ('normal', 'identity'))
  assert identity.exact_at_init and not normal.exact_at_init
  same = lambda u: u  # noqa: E731
  p = start_of(normal, 'query', same, x, CTX)
  for name, mean in (('scale', 1), ('shift', 0)):
    assert abs(p[name].mean() - mean) < 0.002 and abs(p[name].std() - 0.02) < 0.002
  assert not np.allclose(p['scale'] - 1, p['shift'], atol=1e-4)
  p = start_of(identity, 'query', same, x, CTX)
  assert np.all(p['scale'] == 1) and np.all(p['shift'] == 0)


def test_an_unknown_init_is_a_user_error():
  with pytest.raises(errors.UserError, match=r"ssf init 'identty'\. Did you mean 'identity'"):
    methods.build('ssf', SPEC, {'init': 'identty'})
