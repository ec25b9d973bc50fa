"""One kernel for what a group of LoSA's mixers does to y: y + h_c U_c + U_t h_t, and biases.

By itself XLA makes two products of it and adds them to y, which on GPUs takes several passes over
arrays of the size of y, and they are what a side network's time goes into. Here each tile of y is
read once, both products are added while it is in registers, and it is written once. The backward
pass does the same to the gradient of y, with other weights. Written in Pallas; on GPUs it is
compiled through Triton (from compute capability 8.0 on), on CPUs it is interpreted, for tests:
slowly. Products of float32 are as precise as XLA's are on GPUs by default.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Float

from losa_scenic.adapt_lib.token_products import tokens_first
from losa_scenic.common_lib.types import Array
from losa_scenic.model_lib import attention

# Tokens, channels and hidden units of a tile; Triton wants powers of two, and 16 at least.
_ROWS, _COLUMNS, _UNITS = 64, 128, 32


def widen(
  y: Float[Array, 'n b d'],
  h_c: Float[Array, 'n b R'],
  up_c: Float[Array, 'R d'],
  h_t: Float[Array, 'S b d'],
  up_t: Float[Array, 'n S'],
  bias: tuple[Float[Array, ' d'], Float[Array, 'n 1 1']] | None = None,
) -> Float[Array, 'n b d']:
  """y + h_c @ up_c + along_tokens(up_t, h_t), and both biases if given; sums are float32.

  All of the dtype of y. On one device: XLA cannot split a kernel over several.

  Args:
    y: tokens.
    h_c: R hidden units of mixers of channels.
    up_c: what they add to each channel.
    h_t: S hidden units of mixers of tokens.
    up_t: what they add to each token.
    bias: of channels, and of tokens.
  """
  n, b, d = y.shape
  along, across = (
    (jnp.zeros((d,), y.dtype), jnp.zeros((n, 1, 1), y.dtype)) if bias is None else bias
  )
  call = pl.pallas_call(
    functools.partial(_tile, n=n, d=d),
    jax.ShapeDtypeStruct((b, n, d), y.dtype),
    grid=(b, pl.cdiv(n, _ROWS), pl.cdiv(d, _COLUMNS)),
    interpret=attention.on_cpu(),
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
    name='losa_widen',
  )
  given = (
    tokens_first(y),
    tokens_first(h_c),
    up_c,
    tokens_first(h_t),
    up_t,
    along,
    across.reshape(n),
  )
  return tokens_first(call(*given))


def _tile(y_ref, h_c_ref, up_c_ref, h_t_ref, up_t_ref, along_ref, across_ref, out_ref, *, n, d):
  """A tile of the result, of one image: [_ROWS _COLUMNS]."""
  image = pl.program_id(0)
  rows = pl.program_id(1) * _ROWS + jnp.arange(_ROWS)
  columns = pl.program_id(2) * _COLUMNS + jnp.arange(_COLUMNS)
  in_rows, in_columns = rows < n, columns < d
  inside = in_rows[:, None] & in_columns[None]

  def load(ref, index, mask):
    return triton.load(ref.at[index], mask=mask, other=0.0)

  total = load(y_ref, (image, rows[:, None], columns[None]), inside).astype(jnp.float32)
  total += load(along_ref, (columns,), in_columns).astype(jnp.float32)[None]
  total += load(across_ref, (rows,), in_rows).astype(jnp.float32)[:, None]

  def add_channels(k, total):
    units = k * _UNITS + jnp.arange(_UNITS)
    there = units < up_c_ref.shape[0]
    h = load(h_c_ref, (image, rows[:, None], units[None]), in_rows[:, None] & there[None])
    up = load(up_c_ref, (units[:, None], columns[None]), there[:, None] & in_columns[None])
    return total + jnp.dot(h, up, preferred_element_type=jnp.float32)

  def add_tokens(k, total):
    units = k * _UNITS + jnp.arange(_UNITS)
    there = units < up_t_ref.shape[1]
    up = load(up_t_ref, (rows[:, None], units[None]), in_rows[:, None] & there[None])
    h = load(h_t_ref, (image, units[:, None], columns[None]), there[:, None] & in_columns[None])
    return total + jnp.dot(up, h, preferred_element_type=jnp.float32)

  total = jax.lax.fori_loop(0, pl.cdiv(up_c_ref.shape[0], _UNITS), add_channels, total)
  total = jax.lax.fori_loop(0, pl.cdiv(up_t_ref.shape[1], _UNITS), add_tokens, total)
  triton.store(
    out_ref.at[image, rows[:, None], columns[None]], total.astype(out_ref.dtype), mask=inside
  )
