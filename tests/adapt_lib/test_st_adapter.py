"""ST-Adapter's insert against its equation in NumPy, one token at a time."""

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


def tokens(ctx, added=0):
  t, h, w = ctx.grid
  n = ctx.prefix + t * h * w + added
  return np.random.default_rng(1).standard_normal((2, n, D)).astype(np.float32)


def adapted(p, x, ctx, size, act):
  """S(x) with the convolution as a sum over pairs of tokens."""
  p = {path.removeprefix('delta/'): leaf for path, leaf in p.items()}
  places = list(itertools.product(*map(range, ctx.grid)))
  hidden = x @ p['down_kernel'] + p['down_bias']
  y = np.array(x)
  for i, here in enumerate(places):
    mixed = np.array(np.broadcast_to(p['conv/bias'], hidden[:, 0].shape))
    for j, there in enumerate(places):
      tap = tuple(b - a + s // 2 for a, b, s in zip(here, there, size, strict=True))
      if all(0 <= t < s for t, s in zip(tap, size, strict=True)):
        mixed += hidden[:, ctx.prefix + j] * p['conv/kernel'][tap]
    y[:, ctx.prefix + i] += act(mixed) @ p['up_kernel'] + p['up_bias']
  return y


@pytest.mark.parametrize('where', ['attn_block', 'mlp_block'])
@pytest.mark.parametrize(
  ('grid', 'prefix', 'added', 'kernel'),
  [
    ((3, 2, 3), 0, 0, '3,3,3'),
    ((4, 2, 2), 1, 0, '3,1,1'),
    ((1, 3, 3), 1, 0, '3,3,3'),
    ((2, 3, 2), 1, 2, '1,5,3'),
  ],
  ids=['clip', 'released', 'image', 'prompts'],
)
def test_insert_equals_the_equation(grid, prefix, added, kernel, where, call_insert):
  ctx = Ctx(grid=grid, prefix=prefix)
  x = tokens(ctx, added)
  method = methods.build('st_adapter', SPEC, {'bottleneck': H, 'kernel': kernel})
  have, p = call_insert(method, where, f, x, ctx)
  size = tuple(map(int, kernel.split(',')))
  want = f(adapted(p, x.astype(np.float64), ctx, size, act=lambda t: t))
  np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4)
  assert p['delta/conv/kernel'].shape == (*size, H)


def test_activation_comes_after_the_convolution(call_insert):
  ctx = Ctx(grid=(2, 2, 2))
  method = methods.build('st_adapter', SPEC, {'bottleneck': H, 'activation': 'relu'})
  have, p = call_insert(method, 'mlp_block', f, tokens(ctx), ctx)
  want = f(adapted(p, tokens(ctx).astype(np.float64), ctx, (3, 3, 3), lambda t: np.maximum(t, 0)))
  np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  ('placement', 'where'), [('both', {'attn_block', 'mlp_block'}), ('mlp', {'mlp_block'})]
)
def test_placement(placement, where):
  method = methods.build('st_adapter', SPEC, {'placement': placement})
  assert set(method.inserts) == where and method.exact_at_init


def test_starts_with_a_convolution_of_zeros_and_half_the_width(start_of):
  ctx = Ctx(grid=(2, 2, 2))
  p = start_of(methods.build('st_adapter', SPEC), 'mlp_block', f, tokens(ctx), ctx)
  assert p['delta/down_kernel'].shape == (D, SPEC.width // 2)
  for name, fan_in in (('down', D), ('up', SPEC.width // 2)):
    largest = np.abs(p.pop(f'delta/{name}_kernel')).max()
    assert 0.8 / np.sqrt(fan_in) < largest <= 1 / np.sqrt(fan_in)
  assert len(p) == 4 and not any(np.any(leaf) for leaf in p.values())


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'bottleneck': 0}, 'st_adapter bottleneck must be at least 1, got 0'),
    ({'kernel': '3,3'}, r"three odd numbers such as '3,3,3', got '3,3'"),
    ({'kernel': '3,3,2'}, "got '3,3,2'"),
    ({'kernel': '3,3,0'}, "got '3,3,0'"),
    ({'kernel': '3,3,-1'}, "got '3,3,-1'"),
    ({'kernel': '3x3x3'}, "got '3x3x3'"),
    ({'activation': 'gelu'}, "Unknown st_adapter activation 'gelu'"),
    ({'placement': 'attn'}, "Unknown st_adapter placement 'attn'"),
  ],
)
def test_a_bad_option_is_a_user_error(options, message):
  with pytest.raises(errors.UserError, match=message):
    methods.build('st_adapter', SPEC, options)
