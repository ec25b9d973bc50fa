"""LoSA's Pallas kernel, interpreted, against products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from losa_scenic.adapt_lib import losa, mixer_group, side_kernel
from losa_scenic.common_lib import errors
from losa_scenic.model_lib import attention, presets
from losa_scenic.model_lib.adapted import Adapted


def arrays(seed, dtype, *shapes):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


@settings(max_examples=6, deadline=None)
@given(
  st.tuples(st.integers(1, 70), st.integers(1, 2), st.integers(1, 140)),
  st.tuples(st.integers(1, 40), st.integers(1, 40)),
  st.booleans(),
)
@example((70, 2, 140), (40, 33), True)  # More than one tile each way.
def test_the_kernel_adds_both_products(shape, units, with_bias):
  (n, b, d), (r, s) = shape, units
  given = arrays(n, jnp.float32, (n, b, d), (n, b, r), (r, d), (s, b, d), (n, s), (d,), (n, 1, 1))
  y, h_c, up_c, h_t, up_t, along, across = given
  have = side_kernel.widen(*given[:5], (along, across) if with_bias else None)
  want = y + h_c @ up_c + jnp.einsum('ns,sbd->nbd', up_t, h_t)
  want += along + across if with_bias else 0
  np.testing.assert_allclose(have, want, atol=3e-5)


def test_sums_are_not_rounded_on_the_way():
  given = arrays(0, jnp.bfloat16, (17, 2, 24), (17, 2, 96), (96, 24), (96, 2, 24), (17, 96))
  y, h_c, up_c, h_t, up_t = (np.asarray(x, np.float64) for x in given)
  have = np.asarray(side_kernel.widen(*given), np.float64)
  want = y + h_c @ up_c + np.einsum('ns,sbd->nbd', up_t, h_t)
  # A bfloat16 has 8 bits: half of the last one, and the order of float32 sums.
  assert np.all(np.abs(have - want) <= np.abs(want) / 250 + 1e-4)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_it_is_lowered_for_gpus(dtype):
  shapes = (257, 2, 1408), (257, 2, 128), (128, 1408), (128, 2, 1408), (257, 128)
  given = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
  with attention.using('fused'):
    lowered = jax.jit(side_kernel.widen).trace(*given).lower(lowering_platforms=('cuda',))
  assert 'triton' in lowered.as_text()


@pytest.mark.parametrize(('pool', 'scan'), [('cls', False), ('gap', False), ('gap', True)])
@pytest.mark.parametrize('memory', ['fast', 'balanced'])
def test_training_is_the_same(pool, scan, memory, loss_and_gradient, monkeypatch):
  changes = {} if pool == 'cls' else {'pool': 'gap', 'class_token': False}
  spec = presets.preset('test/8', depth=8, **changes)
  calls = []
  widen = side_kernel.widen
  monkeypatch.setattr(
    mixer_group.side_kernel, 'widen', lambda *x: calls.append(len(x)) or widen(*x)
  )

  def gradient(kernel):
    method = losa.build(spec, rank=48, kernel=kernel, memory=memory)
    return loss_and_gradient(Adapted(spec, method, num_classes=5, scan=scan))[1]

  want = gradient('xla')
  assert not calls
  have = gradient('pallas')
  # With biases, as forwards, and without, as backwards.
  assert set(calls) == {6, 5}
  whole = np.linalg.norm([np.linalg.norm(x) for x in want.values()])
  for path, x in want.items():
    error = np.linalg.norm(have[path] - x) / max(np.linalg.norm(x), 1e-2 * whole)
    assert error < 1e-5, path


def test_what_the_kernel_is_not_for_is_an_error():
  with pytest.raises(errors.UserError, match='is for images'):
    losa.build(presets.preset('vivit-test/8x2'), kernel='pallas')
  with pytest.raises(errors.UserError, match="adaptor 'low_rank_mixer'"):
    losa.build(presets.preset('test/8'), kernel='pallas', adaptor='low_rank_mlp')
  with pytest.raises(errors.UserError, match='has no effect: 12 mixers of rank 8 are one group'):
    losa.build(presets.preset('test/8', depth=12), kernel='pallas', rank=8)
  with pytest.raises(errors.UserError, match='LoSA kernel'):
    losa.build(presets.preset('test/8'), kernel='triton')
  method = losa.build(presets.preset('test/8', depth=8), kernel='pallas', rank=48)
  method.check_devices(1)
  with pytest.raises(errors.UserError, match="LoSA kernel='pallas' is for one device, not 2"):
    method.check_devices(2)
