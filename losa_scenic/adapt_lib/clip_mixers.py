"""LoSA on clips: mixers of channels and, in turn, of tokens in space and in time (Eq. 6).

One by one, since a mixer in time adds as much as it reads: 16 times are mixed through r = 64 hidden
units, four times the input. These are never kept, but made again in the backward pass.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Float

from losa_scenic.adapt_lib import mixer, tap_products
from losa_scenic.common_lib.types import Array
from losa_scenic.model_lib.encoder import Encoded

# Mixers of one y that is kept, in the smallest mode: about the root of how many there are.
_SEGMENT = 8


def mix(
  weights: Sequence[tuple[mixer.Weights, ...]],
  stream: Sequence[Any],
  y: Float[Array, 'b n d'],
  encoded: Encoded,
  gelu: str,
  mode: str,
) -> Float[Array, 'b n d']:
  """y_i = g_i(b_i + y_{i-1}) + y_{i-1} for all mixers.

  Args:
    weights: of mixers in turn: of one of channels, then of one in space and perhaps one in time.
    stream: b_1 .. b_k [b n d], each whole or as `tap_products.round_tokens` rounds it.
    y: y_0.
    encoded: how the tokens lie in space and time.
    gelu: 'tanh' or 'erf'.
    mode: see `side_memory`; not 'auto'.
  """
  some = functools.partial(_some, encoded, gelu)
  if mode == 'fast':
    return some(y, weights, stream)
  # Two mixers, one of channels and one of tokens, keep the y that they start from.
  pair = jax.checkpoint(some)
  size = _SEGMENT if mode == 'smallest' else len(weights)
  for start in range(0, len(weights), size):
    part = slice(start, start + size)

    def segment(y: Array, weights: Any, stream: Any) -> Array:
      for i in range(0, len(weights), 2):
        y = pair(y, weights[i : i + 2], stream[i : i + 2])
      return y

    run = jax.checkpoint(segment) if mode == 'smallest' else segment
    y = run(y, list(weights[part]), list(stream[part]))
  return y


def _some(
  encoded: Encoded, gelu: str, y: Array, weights: Sequence[Any], stream: Sequence[Any]
) -> Array:
  """Mixers in a row, the first one of channels; outputs of blocks may be rounded."""
  again = jax.checkpoint(mixer.mix, static_argnums=(2, 3))
  for i, (own, b) in enumerate(zip(weights, stream, strict=True)):
    y, own = _in_turn(y, own)
    x = (tap_products.whole_tokens(b[0], b[1], y.dtype) if isinstance(b, tuple) else b) + y
    if i % 2 == 0:
      y = mixer.mix(own[0], x, 2, gelu) + y
      continue
    x = mixer.by_time(x, encoded)
    mixed = again(own[0], x, 2, gelu)
    if len(own) == 2:
      mixed += again(own[1], x, 1, gelu)
    y = mixer.in_a_row(mixed, encoded) + y
  return y


@jax.custom_vjp
def _in_turn(y: Array, weights: Any) -> tuple[Array, Any]:
  """Both as they are; in the backward pass no mixer before begins until this one is done.

  Else compilers put off the gradients of weights, and keep the hidden units of every mixer for
  them, which in time are larger than the outputs of the backbone.
  """
  return y, weights


_in_turn.defvjp(
  lambda y, weights: ((y, weights), None),
  lambda _, gradients: jax.lax.optimization_barrier(gradients),
)
