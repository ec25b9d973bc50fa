"""Products along the token axis and along the channel axis of tokens [n b d].

Tokens stand first, so that a product along tokens is one plain matrix product, [m n] with [n b*d],
as one along channels is, [n*b d] with [d r]. That is how they are quickest on CPUs. On GPUs, where
the tokens of an encoder lie as [b n d] in memory, the former is a batched product with the weight
spread over the batch; the axes are then only renamed, and nothing moves.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Num

from losa_scenic.common_lib.types import Array, DType
from losa_scenic.model_lib import attention
from losa_scenic.model_lib.products import sum_of_rows


def tokens_first(x: Num[Array, 'b n d']) -> Num[Array, 'n b d']:
  """[b n d] -> [n b d]; its own inverse."""
  return jnp.swapaxes(x, 0, 1)


def along_channels(x: Float[Array, 'n b d'], w: Float[Array, 'd r']) -> Float[Array, 'n b r']:
  """x @ w, in the dtype of x."""
  return x @ w if attention.on_cpu() else tokens_first(tokens_first(x) @ w)


def along_tokens(w: Float[Array, 'm n'], x: Float[Array, 'n b d']) -> Float[Array, 'm b d']:
  """sum_n w[m, n] x[n, b, d], in the dtype of x."""
  if attention.on_cpu():
    return (w @ x.reshape(x.shape[0], -1)).reshape(w.shape[0], *x.shape[1:])
  spread = jnp.broadcast_to(w, (x.shape[1], *w.shape))
  return tokens_first(jnp.matmul(spread, tokens_first(x)))


def along_tokens_gradient(
  z: Float[Array, 'm b d'], x: Float[Array, 'n b d']
) -> Float[Array, 'm n']:
  """sum_bd z[m, b, d] x[n, b, d]: the gradient of w in `along_tokens`.

  In float32, or in float64 if x is; so are all gradients of weights here.
  """
  if attention.on_cpu():
    return _product(z.reshape(z.shape[0], -1), x.reshape(x.shape[0], -1).T)
  # One product an image, and their sum: else both would be laid out anew, tokens first.
  each = jax.lax.dot_general(
    *(tokens_first(z), tokens_first(x)),
    (((2,), (2,)), ((0,), (0,))),
    preferred_element_type=_sums(z),
  )
  return each.astype(wide(z.dtype)).sum(0)


def along_channels_gradient(
  x: Float[Array, 'n b d'], z: Float[Array, 'n b r']
) -> Float[Array, 'd r']:
  """sum_nb x[n, b, d] z[n, b, r]: the gradient of w in x @ w."""
  if not attention.on_cpu():
    x, z = tokens_first(x), tokens_first(z)
  return sum_of_rows(x, z, dtype=_sums(x)).astype(wide(x.dtype))


def _product(a: Float[Array, 'm k'], b: Float[Array, 'k n']) -> Float[Array, 'm n']:
  y = jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=_sums(a))
  return y.astype(wide(a.dtype))


def _sums(x: Array) -> jnp.dtype:
  """In what a product is summed up."""
  # On CPU XLA has no product of float16 matrices with float32 sums.
  half = x.dtype == jnp.float16 and attention.on_cpu()
  return x.dtype if half else wide(x.dtype)


def wide(dtype: DType) -> jnp.dtype:
  """In what gradients of weights are summed up: float32, or float64."""
  return jnp.promote_types(dtype, jnp.float32)
