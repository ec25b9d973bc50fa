"""What a mixer of LoSA reads of the backbone: D b, for an output b of the frozen encoder.

The forward pass needs b nowhere else, and the backward pass only for the gradient of D. So b need
not be kept as it is: rounded to 8 bits it takes half of the memory, the forward pass and all other
gradients are exact, and that of D is a sum over all tokens of all images, in which rounding errors
cancel.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int8

from losa_scenic.adapt_lib.group_weights import CHANNELS
from losa_scenic.adapt_lib.token_products import (
  along_channels,
  along_channels_gradient,
  along_tokens,
  along_tokens_gradient,
  tokens_first,
)
from losa_scenic.common_lib.types import Array, DType
from losa_scenic.model_lib.products import made


class Tap(NamedTuple):
  """What is left of an output b of the encoder once a mixer has read it.

  Attributes:
    seen: D b, tokens first: [n b r] along channels, [r b d] along tokens.
    kept: b for the gradient of D, tokens first: [n b d], or in 8 bits as `round_tokens` gives it;
      None where that gradient is made elsewhere.
  """

  seen: Array
  kept: Any


def read(b: Float[Array, 'b n d'], down: Float[Array, 's r'], axis: str, *, rounded: bool) -> Tap:
  """What a mixer reads, in the dtype of b, without a gradient of `down`: see `down_gradient`.

  Args:
    b: tokens of the backbone.
    down: W_d of the mixer that reads them, float32.
    axis: which axis of b the mixer mixes, `CHANNELS` or `TOKENS`.
    rounded: whether b is kept in 8 bits.
  """
  d = jax.lax.stop_gradient(down).astype(b.dtype)
  b = tokens_first(b)
  seen = along_channels(b, d) if axis == CHANNELS else along_tokens(made(d.T), b)
  b = jax.lax.stop_gradient(b)
  return Tap(seen, round_tokens(b) if rounded else b)


def product(tap: Tap, down: Float[Array, 's r'], axis: str) -> Array:
  """`tap.seen` with the gradient of `down`, the weight that it was read through."""
  return _product(axis, tap.seen, tap.kept, down)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(axis: str, seen: Array, kept: Any, down: Array) -> Array:
  del axis, kept, down
  return seen


def _forward(axis: str, seen: Array, kept: Any, down: Array) -> tuple[Array, Any]:
  del axis, down
  return seen, kept


def _backward(axis: str, kept: Any, dz: Array) -> tuple[Array, None, Array]:
  return dz, None, down_gradient(kept, dz, axis)


_product.defvjp(_forward, _backward)


def down_gradient(kept: Any, dz: Array, axis: str) -> Float[Array, 's r']:
  """The gradient of W_d in D b: float32.

  Args:
    kept: b as in `Tap`.
    dz: the gradient of D b.
    axis: see `read`.
  """
  if isinstance(kept, tuple):
    # Else compilers make all of them whole before the first one is needed.
    (b, scale), dz = jax.lax.optimization_barrier((kept, dz))
    b = whole_tokens(b, scale, dz.dtype)
  else:
    b = kept
  return along_channels_gradient(b, dz) if axis == CHANNELS else along_tokens_gradient(dz, b).T


def round_tokens(
  x: Float[Array, '*b n d'],
) -> tuple[Int8[Array, '*b n d'], Float[Array, '*b n 1']]:
  """Tokens in 8 bits: whole numbers in -127..127, and a factor for each token, float32."""
  wide = x.astype(jnp.float32)
  scale = jnp.maximum(jnp.abs(wide).max(-1, keepdims=True), 1e-30) / 127
  return jnp.round(wide / scale).astype(jnp.int8), scale


def whole_tokens(
  x: Int8[Array, '*b n d'], scale: Float[Array, '*b n 1'], dtype: DType
) -> Float[Array, '*b n d']:
  """The inverse of `round_tokens`, up to rounding."""
  return (x.astype(jnp.float32) * scale).astype(dtype)
