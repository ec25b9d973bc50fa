"""LoSA's gradients in every memory mode, against mixers one by one, differentiated in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from losa_scenic.adapt_lib import losa, methods, mixer, mixer_loop, side_memory, tap_products
from losa_scenic.adapt_lib.token_products import tokens_first
from losa_scenic.common_lib import errors
from losa_scenic.model_lib import presets
from losa_scenic.model_lib.adapted import Adapted

AXES = {'channels': 2, 'tokens': 1}


def one_by_one(axes, mixers, stream, y, gelu, wanted=None):
  """The tokens that are wanted of Eq. 3, as it is written."""
  for axis, own, b in zip(axes, mixers, stream, strict=True):
    y = mixer.mix(own, b + y, AXES[axis], gelu) + y
  return y[:, :wanted]


def in_groups(axes, mixers, stream, y, gelu, wanted=None, rounded=False, reversible=False):
  taps = mixer_loop.read(axes, mixers, stream, rounded=rounded)
  form = mixer_loop.Form(tuple(axes), gelu, 4, wanted, reversible)
  return tokens_first(mixer_loop.unrolled(form, mixers, tokens_first(y), taps))


def in_a_loop(axes, mixers, stream, y, gelu, wanted=None, rounded=False, reversible=False, sites=1):
  """The same of outputs that are stacked, site by site, and so are weights, axis by axis."""
  by = {axis: [m for m, own in zip(mixers, axes, strict=True) if own == axis] for axis in axes}
  weights = {axis: jax.tree.map(lambda *w: jnp.stack(w), *own) for axis, own in by.items()}
  each = [jnp.stack(stream[site::sites]) for site in range(sites)]
  form = mixer_loop.Form(tuple(axes), gelu, 2, wanted, reversible)
  y = tokens_first(y)
  return tokens_first(mixer_loop.scanned(form, weights, y, each, rounded=rounded))


def values(rng, *shape):
  return (rng.standard_normal(shape) / np.sqrt(shape[-1] if shape else 1)).astype(np.float64)


def problem(axes, b, n, d, rank, seed):
  rng = np.random.default_rng(seed)
  sizes = [{'channels': d, 'tokens': n}[axis] for axis in axes]
  mixers = [
    mixer.Weights(
      values(rng, s, rank), values(rng, rank), values(rng, rank, s), values(rng, s), values(rng)
    )
    for s in sizes
  ]
  return mixers, [3 * values(rng, b, n, d) for _ in axes], values(rng, b, n, d)


def gradients(mix, axes, mixers, stream, y, gelu, dtype):
  mixers, stream, y = jax.tree.map(lambda x: jnp.asarray(x, dtype), (mixers, stream, y))

  def loss(mixers, stream, y):
    y = mix(axes, mixers, stream, y, gelu)
    return (jnp.cos(jnp.arange(y.size, dtype=dtype)).reshape(y.shape) * y).sum()

  return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(mixers, stream, y)


def check(mix, axes, given, gelu, wanted, of_stream=True):
  """That gradients are those of mixers one by one; some forms take the stream for frozen."""
  with jax.enable_x64(True):
    plain = functools.partial(one_by_one, wanted=wanted)
    want = gradients(plain, axes, *given, gelu, jnp.float64)
    have = gradients(functools.partial(mix, wanted=wanted), axes, *given, gelu, jnp.float64)
    if not of_stream:
      have, want = (have[0], have[2]), (want[0], want[2])
    # In double precision only mistakes are left; weights' gradients are float32 even so.
    for x, y in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6 * (1 + np.abs(y).max()))


@settings(max_examples=6, deadline=None)
@given(
  st.lists(st.sampled_from(list(AXES)), min_size=1, max_size=6),
  st.tuples(*[st.integers(1, 9)] * 4),
  st.sampled_from(['tanh', 'erf']),
  st.none() | st.integers(1, 9),
  st.booleans(),
)
def test_gradients_of_groups_are_exact(axes, shape, gelu, wanted, reversible):
  mix = functools.partial(in_groups, reversible=reversible)
  check(mix, axes, problem(axes, *shape, seed=len(axes)), gelu, wanted)


@settings(max_examples=5, deadline=None)
@given(
  st.sampled_from([['channels', 'tokens'], ['channels', 'channels']]),
  st.integers(1, 7),
  st.tuples(*[st.integers(1, 9)] * 4),
  st.sampled_from(['tanh', 'erf']),
  st.none() | st.integers(1, 9),
  st.booleans(),
  st.sampled_from([1, 2]),
)
def test_gradients_of_a_loop_over_groups_are_exact(
  period, count, shape, gelu, wanted, reversible, sites
):
  axes = (period * count)[: count + count % sites]
  mix = functools.partial(in_a_loop, reversible=reversible, sites=sites)
  check(mix, axes, problem(axes, *shape, seed=count), gelu, wanted, of_stream=False)


@pytest.mark.parametrize('form', [in_groups, in_a_loop])
@pytest.mark.parametrize('rounded', [False, True])
def test_rounded_outputs_change_the_gradients_of_down_projections_alone(form, rounded):
  axes = ['channels', 'tokens'] * 3
  given = problem(axes, 4, 33, 40, 6, seed=0)
  want = gradients(one_by_one, axes, *given, 'tanh', jnp.float32)
  mix = functools.partial(form, rounded=rounded, reversible=rounded)
  have = gradients(mix, axes, *given, 'tanh', jnp.float32)
  for a, b in zip(have[0], want[0], strict=True):
    for name in mixer.Weights._fields:
      x, y = np.ravel(getattr(a, name)), np.ravel(getattr(b, name))
      cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
      error = np.linalg.norm(x - y) / np.linalg.norm(y)
      if name == 'down' and rounded:
        assert cosine > 0.9999 and error > 1e-5
      else:
        assert error < 5e-6, name


def test_tokens_are_rounded_to_a_254th_of_their_largest_channel():
  x = np.random.default_rng(0).standard_normal((2, 5, 300)).astype(np.float32)
  x[0, 0] = 0
  whole, scale = tap_products.round_tokens(x)
  assert whole.dtype == jnp.int8 and np.abs(whole).max() == 127
  back = tap_products.whole_tokens(whole, scale, jnp.float32)
  assert np.all(np.abs(back - x) <= np.abs(x).max(-1, keepdims=True) / 253)


OPTIONS = [
  ('test/8', {}),
  ('test/8', {'activation': 'both', 'num_layers': 2}),
  ('test/8', {'adaptor': 'low_rank_mlp', 'y0': 'b_0'}),
  ('vivit-test/8x2', {}),
  ('vivit-test/8x2', {'mix_time': False}),
  ('vivit-test/8x2', {'adaptor': 'low_rank_mlp'}),
]


@pytest.mark.parametrize(
  ('preset', 'options', 'scan'),
  [
    *((*one, i == 1) for i, one in enumerate(OPTIONS)),
    pytest.param(*OPTIONS[3], True, marks=pytest.mark.slow),
  ],
)
def test_every_mode_trains_alike(preset, options, scan, loss_and_gradient):
  spec = presets.preset(preset)

  def trained(memory):
    method = methods.build('losa', spec, {'rank': 5, 'memory': memory, **options})
    return loss_and_gradient(Adapted(spec, method, num_classes=5, scan=scan))

  loss, want = trained('fast')
  images = preset == 'test/8' or options.get('adaptor') == 'low_rank_mlp'
  for mode in ('balanced', 'smallest'):
    have_loss, have = trained(mode)
    exact = images and mode == 'smallest'
    # A sum of terms of both signs, of the size of 1.
    np.testing.assert_allclose(have_loss, loss, rtol=1e-6 if images else 2e-3, atol=3e-7)
    whole = np.linalg.norm([np.linalg.norm(y) for y in want.values()])
    for path, y in want.items():
      x, y = np.ravel(have[path]), np.ravel(y)
      # A bias that the final norm takes out again has no gradient but rounding errors.
      error = np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-2 * whole)
      if exact or (images and 'down_kernel' not in path):
        assert error < 1e-6, (mode, path)
      elif np.linalg.norm(y) > 1e-5 * whole:
        assert x @ y / np.linalg.norm(x) / np.linalg.norm(y) > 0.9999, (mode, path)


def test_a_mode_that_would_have_no_effect_is_an_error():
  spec = presets.preset('test/8')
  with pytest.raises(errors.UserError, match="memory='balanced' is for mixers"):
    losa.build(spec, adaptor='transformer', memory='balanced')
  with pytest.raises(errors.UserError, match='LoSA memory'):
    losa.build(spec, memory='small')


def test_auto_keeps_outputs_whole_unless_they_are_a_tenth_of_the_memory():
  tokens = jnp.zeros((8, 256, 1408), jnp.bfloat16)
  size = 40 * tokens.size * 2
  assert side_memory.choose('auto', tokens, 40) == 'fast'  # There is plenty of a CPU's.
  for limit, devices, want in ((10 * size, 1, 'fast'), (9 * size, 1, 'balanced')):
    with side_memory.planned_for(limit, devices):
      assert side_memory.choose('auto', tokens, 40) == want
      assert side_memory.choose('smallest', tokens, 40) == 'smallest'
  with side_memory.planned_for(9 * size, 8):
    assert side_memory.choose('auto', tokens, 40) == 'fast'
