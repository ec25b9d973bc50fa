"""VeRA against its equation in NumPy, and its frozen random matrices."""

import jax
import numpy as np
import pytest

from losa_scenic.adapt_lib import methods, vera
from losa_scenic.adapt_lib.method import partition
from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib import presets
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.sites import Ctx


def matrices(**options):
  return methods.build('vera', presets.preset('test/8'), options).shared()()


@pytest.mark.parametrize(('d', 'e'), [(7, 5), (4, 6)])
def test_equals_numpy_with_the_first_rows_and_columns(d, e, random_like):
  rng = np.random.default_rng(0)
  x, w = rng.standard_normal((2, 3, d)), rng.standard_normal((d, e))
  x, w = x.astype(np.float32), w.astype(np.float32)
  shared = random_like({'a': np.zeros((7, 3)), 'b': np.zeros((3, 6))})
  module, ctx = vera.VeRA(), Ctx(grid=(1, 1, 3), shared=shared)
  f = lambda u: u @ w  # noqa: E731
  p = random_like(jax.eval_shape(lambda: module.init(jax.random.key(0), f, x, ctx)))['params']
  delta = (x @ shared['a'][:d] * p['lambda_d']) @ shared['b'][:, :e] * p['lambda_b']
  have = module.apply({'params': p}, f, x, ctx)
  np.testing.assert_allclose(have, x @ w + delta, rtol=1e-5, atol=1e-6)


def test_starts_at_zero_and_d_initial():
  spec = presets.preset('test/8')
  model = Adapted(spec, methods.build('vera', spec, {'rank': 6, 'd_initial': 0.3}), 5)
  flat = trees.flatten(model.init_trainable(jax.random.key(0))['backbone'])
  assert {path.rsplit('/', 1)[1] for path in flat} == {'lambda_b', 'lambda_d'}
  for path, leaf in flat.items():
    assert (leaf == (0 if path.endswith('lambda_b') else np.float32(0.3))).all()


def test_the_random_matrices_are_no_parameters():
  spec = presets.preset('test/8')
  model = Adapted(spec, methods.build('vera', spec), 5)
  trainable, frozen = partition(model.param_shapes(), model.method)
  assert 'shared' not in trainable and 'shared' not in frozen


@pytest.mark.parametrize(
  ('targets', 'inputs', 'outputs'),
  [('query,value', 32, 32), ('query,fc1', 32, 64), ('fc2', 64, 32), ('out,fc1,fc2', 64, 64)],
)
def test_they_are_as_large_as_the_largest_target_and_uniform(targets, inputs, outputs):
  made = matrices(targets=targets, rank=100)
  assert made['a'].shape == (inputs, 100) and made['b'].shape == (100, outputs)
  for name, fan_in in (('a', inputs), ('b', 100)):
    bound = (6 / fan_in) ** 0.5
    assert 0.98 * bound < np.abs(made[name]).max() <= bound
    assert abs(made[name].std() - bound / 3**0.5) < 0.03 * bound


def test_they_depend_on_the_seed_and_on_nothing_else():
  one, again, other = matrices(), matrices(), matrices(seed=1)
  for name in 'ab':
    assert np.array_equal(one[name], again[name])
    assert np.abs(one[name] - other[name]).min() < np.abs(one[name] - other[name]).max()
  with jax.threefry_partitionable(False):
    assert np.array_equal(one['a'], matrices()['a'])
  # Checkpoints hold the lambdas alone: other numbers would make them worthless.
  want = [[0.2964527, -0.2750682, -0.2362707], [-0.1508598, -0.1466965, 0.02493167]]
  np.testing.assert_allclose([one['a'][0, :3], one['b'][0, :3]], want, rtol=1e-6)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'rank': 0}, 'VeRA rank must be at least 1, got 0'),
    ({'d_initial': 0.0}, 'VeRA d_initial must not be 0'),
    ({'seed': -1}, r'VeRA seed must be in \[0, 2\^31\), got -1'),
    ({'seed': 2**31}, r'VeRA seed must be in \[0, 2\^31\), got 2147483648'),
    ({'targets': 'mlp'}, "Unknown VeRA target 'mlp'"),
  ],
)
def test_a_bad_option_is_a_user_error(options, message):
  with pytest.raises(errors.UserError, match=message):
    methods.build('vera', presets.preset('test/8'), options)
