"""LoSA's mixers, and the tokens of clips as they mix them."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from losa_scenic.common_lib.activations import GELU
from losa_scenic.common_lib.types import Array
from losa_scenic.model_lib.encoder import Encoded


class Weights(NamedTuple):
  """Of g(x) = alpha * (GELU(x W_d + c_d) W_u + c_u), Eq. 4, along an axis of size s; float32.

  Attributes:
    down: W_d [s r].
    down_bias: c_d [r].
    up: W_u [r s].
    up_bias: c_u [s].
    alpha: scalar.
  """

  down: Array
  down_bias: Array
  up: Array
  up_bias: Array
  alpha: Array


class MixerWeights(nn.Module):
  """Makes the weights of a mixer: its parameters.

  Attributes:
    rank: r.
    alpha_init: alpha before training.
  """

  rank: int
  alpha_init: float = 1.0

  @nn.compact
  def __call__(self, size: int) -> Weights:
    """Those of an axis of that size."""
    return Weights(
      self.param('down_kernel', nn.initializers.he_uniform(), (size, self.rank)),
      self.param('down_bias', nn.initializers.zeros, (self.rank,)),
      self.param('up_kernel', nn.initializers.zeros, (self.rank, size)),
      self.param('up_bias', nn.initializers.zeros, (size,)),
      self.param('alpha', nn.initializers.constant(self.alpha_init), ()),
    )


def mix(weights: Weights, x: Float[Array, '...'], axis: int, gelu: str) -> Float[Array, '...']:
  """g(x) along one axis; the others are carried along.

  Args:
    weights: of that axis; cast to the dtype of x.
    x: any axes.
    axis: the one that is mixed.
    gelu: 'tanh' or 'erf'.
  """
  w = Weights(*(leaf.astype(x.dtype) for leaf in weights))
  x = jnp.moveaxis(x, axis, -1)
  hidden = GELU[gelu](x @ w.down + w.down_bias)
  # alpha comes before the product: for its gradient r channels are kept, not as many as come out.
  # The barrier keeps XLA from laying out the biases of all mixers before anything else runs.
  hidden, up_bias = jax.lax.optimization_barrier((w.alpha * hidden, w.alpha * w.up_bias))
  return jnp.moveaxis(hidden @ w.up + up_bias, -1, axis)


def by_time(x: Float[Array, 'b n d'], encoded: Encoded) -> Float[Array, 'b t m d']:
  """The tokens of each time: leading ones (of a whole clip at every time), then the grid."""
  b, _, d = x.shape
  times, prefix = encoded.grid[0], encoded.prefix
  grid = x[:, prefix:].reshape(b, times, -1, d)
  if not prefix:
    return grid
  own = x[:, :prefix].reshape(b, encoded.sequences, -1, d)
  own = jnp.broadcast_to(own, (b, times, *own.shape[2:]))
  return jnp.concatenate([own, grid], axis=2)


def in_a_row(x: Float[Array, 'b t m d'], encoded: Encoded) -> Float[Array, 'b n d']:
  """The inverse of `by_time`; leading tokens of the whole clip are the mean over its times."""
  b, _, _, d = x.shape
  if not encoded.prefix:
    return x.reshape(b, -1, d)
  own, grid = jnp.split(x, [encoded.prefix // encoded.sequences], axis=2)
  grid = grid.reshape(b, -1, d)
  own = own if encoded.sequences > 1 else own.mean(axis=1, keepdims=True)
  return jnp.concatenate([own.reshape(b, -1, d), grid], axis=1)
