"""Attention: all ways agree, forward and backward, and blocks of queries hold no [n m] matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from losa_scenic.common_lib import errors
from losa_scenic.model_lib import attention, presets
from losa_scenic.model_lib.vit import ViT


def draw(shape, dtype='float32', seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def naive(q, k, v, heads, mask=None, bias=None):
  """Explicit softmax of the whole matrix, in float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3) for x in (q, k, v))
  scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1])
  scores = scores if bias is None else scores + np.asarray(bias, np.float64)
  scores = scores if mask is None else np.where(mask, scores, -1e30)
  p = np.exp(scores - scores.max(-1, keepdims=True))
  y = p / p.sum(-1, keepdims=True) @ v
  return y.transpose(0, 2, 1, 3).reshape(y.shape[0], y.shape[2], -1)


@pytest.mark.parametrize(('queries', 'keys'), [(4, 4), (1, 7)])
def test_attention_equals_the_explicit_softmax(queries, keys):
  q, k, v = (draw((2, n, 6), seed=i) for i, n in enumerate((queries, keys, keys)))
  have = attention.attention(q, k, v, heads=3)
  np.testing.assert_allclose(have, naive(q, k, v, 3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(('dtype', 'step'), [('bfloat16', 2**-8), ('float16', 2**-11)])
@pytest.mark.parametrize('queries', [1, 3])
def test_half_precision_sums_in_float32(dtype, step, queries):
  # 256 equal keys: in half precision the sum of the 256 exponentials would be off by far more.
  v = jnp.asarray(np.random.default_rng(0).random((1, 256, 2)), dtype)
  q, k = jnp.ones((1, queries, 2), dtype), jnp.ones((1, 256, 2), dtype)
  want = np.asarray(v, np.float64).mean(1, keepdims=True)
  for have in (
    attention.attention(q, k, v, heads=1),
    # In float32 for the CPU, as `attention` does it.
    attention.chunked(*(x.astype('float32') for x in (q, k, v)), 1, queries=1).astype(dtype),
  ):
    assert have.dtype == jnp.dtype(dtype)
    have = np.asarray(have, np.float64)
    np.testing.assert_allclose(have, np.broadcast_to(want, have.shape), rtol=step)


CASES = st.fixed_dictionaries(
  {
    'b': st.integers(1, 3),
    'n': st.integers(1, 13),
    'm': st.integers(1, 9),
    'heads': st.integers(1, 3),
    'queries': st.integers(1, 14),
    'mask': st.sampled_from(('none', 'by key', 'by query', 'of one image')),
    'bias': st.booleans(),
    'dtype': st.sampled_from(('float32', 'bfloat16')),
    'seed': st.integers(0, 99),
  }
)


def case(b, n, m, heads, mask, bias, dtype, seed):
  """(q, k, v), mask, bias and the cotangent of the output."""
  d, rng = 4 * heads, np.random.default_rng(seed)
  qkv = tuple(draw((b, size, d), dtype, seed + i) for i, size in enumerate((n, m, m)))
  shape = {'by key': (b, 1, 1, m), 'by query': (b, 1, n, m), 'of one image': (1, 1, n, m)}
  mask = None if mask == 'none' else jnp.asarray(rng.random(shape[mask]) < 0.7)
  bias = draw((heads, n, m), dtype, seed + 3) if bias else None
  return qkv, mask, bias, draw((b, n, d), dtype, seed + 4)


@settings(max_examples=8, deadline=None)
@given(CASES)
def test_blocks_of_queries_equal_the_whole_matrix_forward_and_backward(options):
  queries, heads = options.pop('queries'), options['heads']
  qkv, mask, bias, dy = case(**options)

  @functools.partial(jax.jit, static_argnums=0)
  def run(queries):
    def forward(qkv, bias):
      return attention.chunked(*qkv, heads, mask, bias, queries=queries)

    y, vjp = jax.vjp(forward, qkv, bias)
    return y, vjp(dy)

  have, want = jax.tree.leaves(run(queries)), jax.tree.leaves(run(options['n']))
  assert [x.dtype for x in have] == [x.dtype for x in want]
  step = float(jnp.finfo(options['dtype']).eps)
  for x, y in zip(have, want, strict=True):
    x, y = (np.asarray(a, np.float64) for a in (x, y))
    # A mask can leave a query no key: then all count, in both.
    np.testing.assert_allclose(x, y, rtol=0, atol=16 * step * max(1, np.abs(y).max()))


@pytest.mark.parametrize('mask', ['none', 'by key', 'by query'])
def test_blocks_of_queries_equal_the_explicit_softmax(mask):
  (q, k, v), mask, bias, _ = case(2, 11, 7, 2, mask, True, 'float32', 0)
  if mask is not None:
    mask = mask.at[..., 0].set(True)  # The explicit form knows no row without a key.
  have = attention.chunked(q, k, v, 2, mask, bias, queries=4)
  np.testing.assert_allclose(have, naive(q, k, v, 2, mask, bias), rtol=1e-5, atol=1e-6)


def test_gradients_of_keys_and_values_are_summed_in_float32_over_blocks():
  # Each of 1,024 blocks adds 1: in bfloat16 the sum would stop growing at 256.
  q, k = jnp.zeros((1, 2048, 2), 'bfloat16'), jnp.zeros((1, 2, 2), 'bfloat16')
  run = functools.partial(attention.chunked, q, k, heads=1, queries=2)
  dv = jax.grad(lambda v: run(v=v).astype('float32').sum())(k)
  assert dv.dtype == jnp.bfloat16 and np.all(np.asarray(dv, np.float32) == 1024)


@pytest.mark.parametrize('wrap', ['jit', 'remat', 'scan', 'vmap'])
def test_blocks_of_queries_within_other_transformations(wrap):
  qkv, _, bias, dy = case(2, 7, 5, 2, 'none', True, 'float32', 1)

  def loss(qkv, queries):
    def once(q):
      return attention.chunked(q, *qkv[1:], 2, None, bias, queries=queries)

    if wrap == 'scan':
      y = jax.lax.scan(lambda q, _: (q + once(q), None), qkv[0], None, length=3)[0]
    elif wrap == 'vmap':
      y = jax.vmap(once)(jnp.stack([qkv[0], 2 * qkv[0]]))
    else:
      y = {'jit': jax.jit, 'remat': jax.checkpoint}[wrap](once)(qkv[0])
    return (y * dy).sum()

  have, want = (jax.grad(loss)(qkv, queries) for queries in (2, 7))
  for x, y in zip(have, want, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def temporary(n, way, backward):
  """Bytes that a program of attention of n tokens holds between its arguments and its result."""

  def forward(q, k, v):
    return attention.attention(q, k, v, heads=4)

  def loss(q, k, v):
    return jax.grad(lambda *qkv: forward(*qkv).sum(), argnums=(0, 1, 2))(q, k, v)

  shapes = [jax.ShapeDtypeStruct((1, n, 32), jnp.float32)] * 3
  with attention.using(way):
    program = jax.jit(loss if backward else forward).lower(*shapes)
  return program.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize('backward', [False, True])
def test_memory_does_not_grow_with_the_square_of_the_length(backward, monkeypatch):
  monkeypatch.setattr(attention, 'SCORE_BYTES', 2**20)
  sizes = (2048, 4096, 8192)
  plain = [temporary(n, 'plain', backward) for n in sizes[:2]]
  assert plain[0] >= 4 * 4 * sizes[0] ** 2 and plain[1] > 3.5 * plain[0]
  have = [temporary(n, 'chunked', backward) for n in sizes]
  assert have[0] < plain[0] / 4
  assert have[1] < 2.2 * have[0] and have[2] < 2.2 * have[1]


def test_short_sequences_are_traced_as_the_whole_matrix_and_long_ones_in_blocks():
  def traced(b, n):
    x = jax.ShapeDtypeStruct((b, n, 64), jnp.float32)
    return str(jax.make_jaxpr(lambda x: attention.attention(x, x, x, heads=4))(x))

  assert 'scan' not in traced(2, 197) and 'scan' not in traced(1, 2048)
  assert 'scan' in traced(1, 2049) and 'scan' in traced(2, 2048)
  assert 'scan' not in traced(512, 257)  # Images are computed as they always were.
  with attention.using('plain'):
    assert 'scan' not in traced(1, 2049)


def test_a_model_computes_the_same_in_blocks(random_like, make_batch, monkeypatch):
  spec = presets.preset('test/8', image_size=96, pool='map')
  model = ViT(spec, {}, scan=True, remat=True)
  images = jax.ShapeDtypeStruct((1, 96, 96, 3), jnp.float32)
  params = random_like(jax.eval_shape(model.init, jax.random.key(0), images)['params'])
  images = draw((2, 96, 96, 3))
  loss = lambda p: (model.apply({'params': p}, images) ** 2).sum()  # noqa: E731
  want, want_gradient = jax.jit(jax.value_and_grad(loss))(params)
  monkeypatch.setattr(attention, 'SCORE_BYTES', 0)
  monkeypatch.setattr(attention, 'LEAST_KEYS', 0)
  assert 'custom_vjp' in str(jax.make_jaxpr(loss)(params))
  again = lambda p: loss(p)  # noqa: E731  # Else jit would use what it has traced.
  have, gradient = jax.jit(jax.value_and_grad(again))(params)
  np.testing.assert_allclose(have, want, rtol=1e-5)
  for x, y in zip(jax.tree.leaves(gradient), jax.tree.leaves(want_gradient), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4 * float(np.abs(y).max() + 1e-3))


@pytest.mark.parametrize(
  ('dtype', 'channels', 'n', 'm', 'want'),
  [
    ('bfloat16', 112, 4096, 4096, True),  # ViViT-e
    ('float16', 64, 196, 196, True),
    ('float32', 64, 196, 196, False),
    ('bfloat16', 64, 197, 197, False),
    ('bfloat16', 64, 1, 256, False),
    ('bfloat16', 84, 256, 256, False),
    ('bfloat16', 136, 256, 256, False),
  ],
)
def test_what_the_fused_kernel_takes(dtype, channels, n, m, want):
  assert attention.fits_kernel(jnp.dtype(dtype), channels, n, m) == want


@pytest.mark.parametrize(
  ('version', 'capability', 'want'),
  [('cuda 12090', '9.0', True), ('cuda 12090', '7.0', False), ('rocm 6', 'gfx90a', False)],
)
def test_the_fused_kernel_is_for_ampere_and_later(version, capability, want, monkeypatch):
  class Device:
    compute_capability = capability
    client = type('Client', (), {'platform_version': version})

  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(jax, 'devices', lambda: [Device()])
  assert attention._has_kernel() == want


def test_an_unknown_way_is_a_user_error():
  with (
    pytest.raises(errors.UserError, match=r"Unknown way of attention 'fuse'.*'fused'"),
    attention.using('fuse'),
  ):
    pass
