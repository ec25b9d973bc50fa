"""LoSA's mixers, and the tokens of clips as they mix them."""

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from losa_scenic.common_lib.activations import GELU
from losa_scenic.common_lib.types import Array
from losa_scenic.model_lib.encoder import Encoded
from losa_scenic.model_lib.products import product


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
  def __call__(self, size: int, count: int | None = None) -> Weights:
    """Those of an axis of that size; of so many mixers, stacked, if a number is given."""
    many, batch = ((), ()) if count is None else ((count,), 0)
    zeros, down = nn.initializers.zeros, nn.initializers.he_uniform(batch_axis=batch)
    return Weights(
      self.param('down_kernel', down, (*many, size, self.rank)),
      self.param('down_bias', zeros, (*many, self.rank)),
      self.param('up_kernel', zeros, (*many, self.rank, size)),
      self.param('up_bias', zeros, (*many, size)),
      self.param('alpha', nn.initializers.constant(self.alpha_init), many),
    )


class LayerWeights(nn.Module):
  """Makes the weights of the mixers of a layer of the side network, which have names.

  Attributes:
    rank: r of each.
    alpha_init: alpha of each before training.
  """

  rank: int
  alpha_init: float = 1.0

  @nn.compact
  def __call__(
    self, sizes: Mapping[str, int], counts: Mapping[str, int] | None = None
  ) -> dict[str, Weights]:
    """By name.

    Args:
      sizes: of the axis of each.
      counts: in how many layers there is each, for the weights of all layers, stacked.
    """
    return {
      name: MixerWeights(self.rank, self.alpha_init, name=name)(size, (counts or {}).get(name))
      for name, size in sizes.items()
    }


def rows(stacked: Float[Array, 'm ...']) -> list[Float[Array, '...']]:
  """Those along the first axis."""
  # Not indexed: the gradient of an index has the size of all of them.
  return [row[0] for row in jax.lax.split(stacked, (1,) * len(stacked))]


def each(weights: Weights) -> list[Weights]:
  """Those of each of the mixers whose weights are stacked."""
  return [Weights(*own) for own in zip(*map(rows, weights), strict=True)]


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
  hidden = GELU[gelu](product(x, w.down) + w.down_bias)
  # alpha comes before the product: for its gradient r channels are kept, not as many as come out.
  # The barrier keeps XLA from laying out the biases of all mixers before anything else runs.
  hidden, up_bias = jax.lax.optimization_barrier((w.alpha * hidden, w.alpha * w.up_bias))
  return jnp.moveaxis(product(hidden, w.up) + up_bias, -1, axis)


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
