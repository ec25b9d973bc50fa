"""Convpass's insert against its equation in NumPy, one token at a time."""

import itertools

import numpy as np
import pytest

from losa_scenic.adapt_lib import methods
from losa_scenic.common_lib import errors
from losa_scenic.model_lib import presets
from losa_scenic.model_lib.sites import Ctx

SPEC = presets.preset('test/8')
D, H = 6, 3


def f(x):
  return 2 * x[..., ::-1] + 1


def q(x):
  return x / (1 + np.exp(-1.702 * x))


def tokens(ctx, added):
  t, h, w = ctx.grid
  n = ctx.prefix + t * h * w + added
  return np.random.default_rng(1).standard_normal((2, n, D)).astype(np.float32)


def bypass(p, x, ctx):
  """C(z) with the convolution as a sum over pairs of tokens."""
  p = {path.removeprefix('delta/'): leaf for path, leaf in p.items()}
  hidden = q(x @ p['down_kernel'] + p['down_bias'])
  mixed = hidden @ p['conv/kernel'][1, 1]  # Every token sees itself.
  t, h, w = ctx.grid
  for frame, y, x_, dy, dx in itertools.product(
    range(t), range(h), range(w), (-1, 0, 1), (-1, 0, 1)
  ):
    if (dy, dx) != (0, 0) and 0 <= y + dy < h and 0 <= x_ + dx < w:
      here = ctx.prefix + (frame * h + y) * w + x_
      mixed[:, here] += hidden[:, here + dy * w + dx] @ p['conv/kernel'][1 + dy, 1 + dx]
  return q(mixed + p['conv/bias']) @ p['up_kernel'] + p['up_bias']


@pytest.mark.parametrize(
  ('name', 'where'), [('convpass', 'attn'), ('convpass', 'mlp'), ('convpass_attn', 'attn')]
)
@pytest.mark.parametrize(
  ('grid', 'prefix', 'added'),
  [((1, 3, 4), 1, 0), ((1, 2, 2), 0, 0), ((1, 3, 2), 1, 2), ((2, 2, 3), 0, 1)],
  ids=['class_token', 'none', 'prompts', 'clip'],
)
def test_insert_equals_the_equation(name, where, grid, prefix, added, call_insert):
  ctx = Ctx(grid=grid, prefix=prefix)
  x = tokens(ctx, added)
  method = methods.build(name, SPEC, {'bottleneck': H, 'scale': 10.0})
  have, p = call_insert(method, where, f, x, ctx)
  want = f(x.astype(np.float64)) + 10 * bypass(p, x.astype(np.float64), ctx)
  np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  ('name', 'where'), [('convpass', {'attn', 'mlp'}), ('convpass_attn', {'attn'})]
)
def test_where_the_bypasses_are(name, where):
  method = methods.build(name, SPEC)
  assert set(method.inserts) == where and method.exact_at_init


def test_the_convolution_starts_random_or_as_the_identity(start_of):
  ctx = Ctx(grid=(1, 2, 2), prefix=1)
  for name, options, identity in (
    ('convpass', {}, False),
    ('convpass_attn', {}, False),
    ('convpass', {'conv_init': 'xavier'}, False),
    ('convpass', {'conv_init': 'identity'}, True),
  ):
    p = start_of(methods.build(name, SPEC, options), 'attn', f, tokens(ctx, 0), ctx)
    kernel = p['delta/conv/kernel']
    assert kernel.shape == (3, 3, 8, 8)
    want = np.zeros((3, 3, 8, 8))
    want[1, 1] = np.eye(8)
    assert np.array_equal(kernel, want) == identity
    bound = np.sqrt(6 / (2 * 72))
    assert identity or 0.9 * bound < np.abs(kernel).max() <= bound
    assert np.any(p['delta/down_kernel']) and not np.any(p['delta/up_kernel'])


@pytest.mark.parametrize('name', ['convpass', 'convpass_attn'])
@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'bottleneck': 0}, ' bottleneck must be at least 1, got 0'),
    ({'scale': 0.0}, ' scale must be positive, got 0.0'),
    ({'dropout': 1.0}, r' dropout must be in \[0, 1\), got 1.0'),
  ],
)
def test_a_bad_option_is_a_user_error(name, options, message):
  with pytest.raises(errors.UserError, match=name + message):
    methods.build(name, SPEC, options)


def test_only_convpass_has_a_choice_of_start():
  with pytest.raises(errors.UserError, match=r"conv_init 'xaver'\. Did you mean 'xavier'"):
    methods.build('convpass', SPEC, {'conv_init': 'xaver'})
  with pytest.raises(errors.UserError, match='Unknown option of method'):
    methods.build('convpass_attn', SPEC, {'conv_init': 'identity'})
