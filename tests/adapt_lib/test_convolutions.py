"""Convolutions over the token grid against sums over the window in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from losa_scenic.adapt_lib import convolutions


def grid(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def windows(x, size):
  """The entries of the window and the padded input shifted by them, larger half forward."""
  pads = [((n - 1) // 2, n // 2) for n in size]
  x = np.pad(x.astype(np.float64), [(0, 0), *pads, (0, 0)])
  out = [n - s + 1 for n, s in zip(x.shape[1:-1], size, strict=True)]
  for tap in itertools.product(*map(range, size)):
    yield tap, x[(slice(None), *(slice(i, i + n) for i, n in zip(tap, out, strict=True)))]


def by_lax(x, kernel):
  pads = [((n - 1) // 2, n // 2) for n in kernel.shape[:3]]
  layout = ('NDHWC', 'DHWIO', 'NDHWC')
  return lax.conv_general_dilated(
    x,
    kernel[..., None, :],
    (1, 1, 1),
    pads,
    dimension_numbers=layout,
    feature_group_count=x.shape[-1],
  )


SIZES = [(3, 3, 3), (3, 1, 1), (1, 5, 3), (1, 4, 4), (2, 1, 4), (1, 1, 1)]


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('frames', [1, 2])
def test_depthwise_and_its_gradients(frames, size):
  x, kernel, weight = (
    grid(2, frames, 4, 3, 5),
    grid(*size, 5, seed=1),
    grid(2, frames, 4, 3, 5, seed=2),
  )
  have = jax.jit(convolutions.depthwise)(x, kernel)
  want = sum(shifted * kernel[tap] for tap, shifted in windows(x, size))
  np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)
  ours, lax_ = (
    jax.jit(jax.grad(lambda x, k, fn=fn: (fn(x, k) * weight).sum(), (0, 1)))(x, kernel)
    for fn in (convolutions.depthwise, by_lax)
  )
  for a, b in zip(ours, lax_, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_depthwise_in_half_precision_rounds_only_once(dtype):
  x, kernel = (jnp.asarray(a, dtype) for a in (grid(2, 3, 4, 4, 5), grid(3, 3, 3, 5, seed=1)))
  have = convolutions.depthwise(x, kernel)
  exact = convolutions.depthwise(x.astype(jnp.float32), kernel.astype(jnp.float32))
  assert have.dtype == x.dtype
  assert np.array_equal(have, exact.astype(dtype))
  gradients = jax.grad(lambda x, k: convolutions.depthwise(x, k).sum(), (0, 1))(x, kernel)
  assert [g.dtype for g in gradients] == [x.dtype, x.dtype]


def test_per_frame_sees_each_frame_on_its_own():
  x, kernel = grid(2, 3, 4, 5, 2), grid(3, 3, 2, 6, seed=1)
  have = convolutions.per_frame(x, kernel)
  want = np.zeros((2, 3, 4, 5, 6))
  for t in range(3):
    want[:, t] = sum(shifted @ kernel[tap] for tap, shifted in windows(x[:, t], (3, 3)))
  np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)
