"""LoSA's mixers, and the tokens of clips as they mix them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from losa_scenic.common_lib.activations import GELU
from losa_scenic.common_lib.types import Array
from losa_scenic.model_lib.encoder import Encoded


class Mixer(nn.Module):
  """g of Eq. 4 along one axis: alpha * (GELU(x W_d + c_d) W_u + c_u).

  Attributes:
    rank: r.
    axis: the axis of the input that is mixed; the others are carried along.
    alpha_init: alpha before training.
    gelu: 'tanh' or 'erf'.
  """

  rank: int
  axis: int
  alpha_init: float = 1.0
  gelu: str = 'tanh'

  @nn.compact
  def __call__(self, x: Float[Array, '...']) -> Float[Array, '...']:
    size, dtype = x.shape[self.axis], x.dtype
    down = self.param('down_kernel', nn.initializers.he_uniform(), (size, self.rank)).astype(dtype)
    down_bias = self.param('down_bias', nn.initializers.zeros, (self.rank,)).astype(dtype)
    up = self.param('up_kernel', nn.initializers.zeros, (self.rank, size)).astype(dtype)
    up_bias = self.param('up_bias', nn.initializers.zeros, (size,)).astype(dtype)
    alpha = self.param('alpha', nn.initializers.constant(self.alpha_init), ()).astype(dtype)
    x = jnp.moveaxis(x, self.axis, -1)
    hidden = GELU[self.gelu](x @ down + down_bias)
    # alpha comes before the product: for its gradient r channels are kept, not as many as come out.
    # The barrier keeps XLA from laying out the biases of all mixers before anything else runs.
    hidden, up_bias = jax.lax.optimization_barrier((alpha * hidden, alpha * up_bias))
    return jnp.moveaxis(hidden @ up + up_bias, -1, self.axis)


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
