"""softmax(q k^T / sqrt(e) + bias) v in three ways that agree to float tolerance.

  fused: cuDNN's kernel, on GPUs that have it: scores never leave the chip.
  plain: XLA; holds the scores of all queries, [b h n m] in float32.
  chunked: XLA, some queries at a time: exact, since a query's softmax needs the scores of no other.
    The backward pass computes each block's scores again, so that neither pass holds [n m].

4,096 tokens of a clip in 16 heads have 1 GiB of scores, where their residual stream has 14 MiB.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Array, DType

WAYS = ('fused', 'chunked', 'plain')
# Scores that are held at once. What else a layer holds is of this size (ViT-g on 16 images of 256
# tokens: 64 MiB of scores, 48 MiB in the MLP), so more would decide how much memory is needed; and
# with less, products become too small to keep a GPU busy.
SCORE_BYTES = 64 * 2**20
# No fewer queries at a time, however many images there are: their scores, 64 h m numbers an image,
# are still more than its tokens, and smaller products are slow.
_LEAST_QUERIES = 64

# Keys from which on scores are worth dividing: of a few hundred they are small for every image, and
# a batch of images is divided by taking a smaller one. Blocks cost a quarter more time there.
LEAST_KEYS = 1024

_way: contextvars.ContextVar[str | None] = contextvars.ContextVar('attention_way', default=None)


@contextlib.contextmanager
def using(way: str) -> Iterator[None]:
  """Says how attention is traced inside the context, whatever the device.

  A function that was jitted and called before keeps what it was traced with.

  Args:
    way: 'fused' as on a GPU that has the kernel, with the others where the kernel does not do;
      'chunked' as on a device without it, so plain where that is small enough; 'plain' always,
      which is what counting operations needs.

  Raises:
    errors.UserError: for another word.
  """
  token = _way.set(errors.one_of('way of attention', way, WAYS))
  try:
    yield
  finally:
    _way.reset(token)


def attention(
  q: Float[Array, 'b n d'],
  k: Float[Array, 'b m d'],
  v: Float[Array, 'b m d'],
  heads: int,
  mask: Bool[Array, '#b 1 #n m'] | None = None,
  bias: Float[Array, 'h n m'] | None = None,
) -> Float[Array, 'b n d']:
  """softmax(q k^T / sqrt(d / heads) + bias) v, per head; the softmax is computed in float32.

  Args:
    q: queries, of any float dtype.
    k: keys, of the same dtype.
    v: values, of the same dtype.
    heads: h, divides d.
    mask: query i sees only the keys where it is True (all alike where that is none).
    bias: added to the scores.

  Returns:
    In the dtype of q; the products sum in float32.
  """
  b, n, d = q.shape
  way, dtype, m = _way.get(), q.dtype, k.shape[1]
  fused = _has_kernel() if way is None else way == 'fused'
  if fused and mask is None and bias is None and fits_kernel(dtype, d // heads, n, m):
    y = jax.nn.dot_product_attention(
      *(split_heads(x, heads) for x in (q, k, v)), implementation='cudnn'
    )
    return y.reshape(q.shape)
  # On CPU XLA has no product of float16 matrices with float32 sums, and on GPUs none of float16
  # vectors: a pooling head has one query. `using` is for other devices than this one.
  if dtype == jnp.float16 and (on_cpu() or min(n, m) == 1):
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
  queries = n
  if way == 'chunked' or (way != 'plain' and m >= LEAST_KEYS):
    queries = max(_LEAST_QUERIES, SCORE_BYTES // (4 * b * heads * m))
  return chunked(q, k, v, heads, mask, bias, queries=queries).astype(dtype)


def fits_kernel(dtype: DType, channels: int, n: int, m: int) -> bool:
  """Whether cuDNN's kernel takes heads of so many channels, n queries and m keys.

  It computes in 16 bits only. Odd lengths are left out: its backward pass refuses some of them.
  """
  half = dtype in (jnp.bfloat16, jnp.float16)
  return half and channels % 8 == 0 and channels <= 128 and n % 2 == 0 and m % 2 == 0


def on_cpu() -> bool:
  """Whether what is traced now will run on a CPU: the default device, unless `using` says how."""
  return _way.get() is None and jax.default_backend() == 'cpu'


def is_plain() -> bool:
  """Whether what is traced now shall have no kernels, but products and loops that can be read."""
  return _way.get() == 'plain'


def _has_kernel() -> bool:
  """Whether the device that programs run on by default is an NVIDIA GPU from Ampere on."""
  if jax.default_backend() != 'gpu':
    return False
  device = jax.devices()[0]
  if 'cuda' not in device.client.platform_version:
    return False
  return float(device.compute_capability) >= 8.0


def split_heads(x: Float[Array, 'b n d'], heads: int) -> Float[Array, 'b n h e']:
  """[b n d] -> [b n heads d/heads]."""
  return x.reshape(*x.shape[:-1], heads, -1)


def chunked(
  q: Float[Array, 'b n d'],
  k: Float[Array, 'b m d'],
  v: Float[Array, 'b m d'],
  heads: int,
  mask: Bool[Array, '#b 1 #n m'] | None = None,
  bias: Float[Array, 'h n m'] | None = None,
  *,
  queries: int,
) -> Float[Array, 'b n d']:
  """`attention` of at most `queries` queries at a time; the plain form where those are all.

  Differentiable once, in reverse mode (the plain form in every way).
  """
  n = q.shape[1]
  shape = q.shape
  q, k, v = (split_heads(x, heads) for x in (q, k, v))
  bias = None if bias is None else bias[None].astype(q.dtype)
  count = math.ceil(n / queries)
  if count <= 1:
    return _plain(q, k, v, bias, mask).reshape(shape)
  return _in_blocks(count, q, k, v, bias, mask).reshape(shape)


def _plain(q: Array, k: Array, v: Array, bias: Array | None, mask: Array | None) -> Array:
  """Of heads: [b n h e], [b m h e] twice, [1 h n m], [b|1 1 n|1 m] -> [b n h e]."""
  if on_cpu() and bias is None and mask is None and q.dtype == jnp.float32:
    return _scaled_late(q, k, v)
  return jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, implementation='xla')


def _scaled_late(q: Array, k: Array, v: Array) -> Array:
  """`_plain` as it is quick on CPUs: the sum of a softmax divides results, not all scores."""
  q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q, k, v))
  scores = jnp.matmul(q * q.shape[-1] ** -0.5, jnp.swapaxes(k, 2, 3))
  shares = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
  return jnp.moveaxis(jnp.matmul(shares, v) / shares.sum(-1, keepdims=True), 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_blocks(
  count: int, q: Array, k: Array, v: Array, bias: Array | None, mask: Array | None
) -> Array:
  """`_plain`, one of `count` blocks of queries at a time."""

  # Each block's result takes the place of its queries. A loop that collects results starts with an
  # array of zeros, and XLA's GPU compiler makes those of all layers before the first one runs.
  def block(x: Array, part: Any) -> tuple[Array, None]:
    i, bias, own = part
    y = _plain(x[i], k, v, bias, _either(own, mask))
    return jax.lax.dynamic_update_index_in_dim(x, y, i, 0), None

  q_blocks, *rest = _parts(count, q, bias, mask)
  y, _ = jax.lax.scan(block, q_blocks, (jnp.arange(count), *rest))
  return _join(y, q.shape[1], axis=1)


def _in_blocks_fwd(
  count: int, q: Array, k: Array, v: Array, bias: Array | None, mask: Array | None
) -> tuple[Array, Any]:
  return _in_blocks(count, q, k, v, bias, mask), (q, k, v, bias, mask)


def _in_blocks_bwd(count: int, given: Any, dy: Array) -> tuple[Any, ...]:
  q, k, v, bias, mask = given
  # Every block adds to the gradients of keys and values: in float32, as one product would.
  wide = jnp.promote_types(k.dtype, jnp.float32)
  zero, dy = jax.lax.optimization_barrier((jnp.zeros((), wide), dy))  # no zeros ahead of time
  sums = jnp.broadcast_to(zero, k.shape), jnp.broadcast_to(zero, v.shape)

  def block(carry: tuple[Array, ...], part: Any) -> tuple[tuple[Array, ...], Any]:
    x, dk, dv = carry
    i, bias, own, dy = part
    plain = functools.partial(_plain, mask=_either(own, mask))
    dq, more_dk, more_dv, dbias = jax.vjp(plain, x[i], k, v, bias)[1](dy)
    x = jax.lax.dynamic_update_index_in_dim(x, dq, i, 0)
    return (x, dk + more_dk.astype(wide), dv + more_dv.astype(wide)), dbias

  q_blocks, *rest = _parts(count, q, bias, mask)
  parts = jnp.arange(count), *rest, _blocks(dy, count, axis=1)
  (dq, dk, dv), dbias = jax.lax.scan(block, (q_blocks, *sums), parts)
  dq = _join(dq, q.shape[1], axis=1)
  dbias = None if bias is None else _join(dbias, q.shape[1], axis=2)
  return dq, dk.astype(k.dtype), dv.astype(v.dtype), dbias, None


_in_blocks.defvjp(_in_blocks_fwd, _in_blocks_bwd)


def _parts(count: int, q: Array, bias: Array | None, mask: Array | None) -> tuple[Any, ...]:
  """What differs by block: queries, bias, and a mask that differs by query."""
  own = mask is not None and mask.shape[2] > 1
  return (
    _blocks(q, count, axis=1),
    None if bias is None else _blocks(bias, count, axis=2),
    _blocks(mask, count, axis=2) if own and mask is not None else None,
  )


def _either(own: Array | None, common: Array | None) -> Array | None:
  return common if own is None else own


def _blocks(x: Array, count: int, axis: int) -> Array:
  """Cuts an axis into `count` equal blocks, a new leading axis; zeros fill up the last one.

  What comes of the filling is cut off by `_join`, so it gets and gives no gradient.
  """
  size = math.ceil(x.shape[axis] / count)
  padding = [(0, 0)] * x.ndim
  padding[axis] = (0, count * size - x.shape[axis])
  x = jnp.pad(x, padding)
  return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)


def _join(blocks: Array, length: int, axis: int) -> Array:
  """The inverse of `_blocks` for an axis that was `length` long."""
  x = jnp.moveaxis(blocks, 0, axis)
  x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
  return jax.lax.slice_in_dim(x, 0, length, axis=axis)
