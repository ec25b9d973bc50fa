"""Positions inside the attention: rotary embeddings, and biases per relative offset.

Both act on the model's own tokens. Tokens and keys that a method adds stand at the end of the
sequence and have no position: they are not turned, and their bias is 0.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from losa_scenic.common_lib.types import Array
from losa_scenic.model_lib.spec import BackboneSpec


@functools.cache
def angles(spec: BackboneSpec) -> Float[np.ndarray, 'patches half']:
  """What each grid token's pairs of channels are turned by, in radians; half is d / heads / 2.

  There are m = d / heads / 4 frequencies; the first m angles are of rows, the others of columns.
    'eva': frequency theta^(-j / m), coordinates 0 .. side - 1 scaled to `rope_grid` (EVA-02, Fang
      et al. 2023).
    'dinov3': 2 pi theta^(-j / m), coordinates of patch centres in [-1, 1] (DINOv3, Simeoni et al.
      2025).
  """
  _, height, width = spec.grid
  m = spec.width // spec.heads // 4
  frequencies = spec.rope_theta ** (-np.arange(m) / m)

  def coordinates(side: int) -> np.ndarray:
    if spec.rope == 'eva':
      return np.arange(side) / side * spec.rope_grid
    return 2 * np.pi * (2 * (np.arange(side) + 0.5) / side - 1)

  grid = np.stack(np.meshgrid(coordinates(height), coordinates(width), indexing='ij'), axis=-1)
  return (grid[..., None] * frequencies).reshape(height * width, 2 * m).astype(np.float32)


def rotate(x: Float[Array, 'b n d'], spec: BackboneSpec) -> Float[Array, 'b n d']:
  """Turns pairs of channels of the grid's tokens; computed in float32.

  'eva' pairs neighbouring channels of a head, 'dinov3' channel j with j + (d / heads) / 2.
  """
  start, end = spec.prefix, spec.sequence
  own = x[:, start:end].astype(jnp.float32)
  shape = own.shape
  turn = angles(spec)[:, None]
  cos, sin = jnp.asarray(np.cos(turn)), jnp.asarray(np.sin(turn))
  if spec.rope == 'eva':
    pairs = own.reshape(*shape[:2], spec.heads, -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
  else:
    a, b = jnp.split(own.reshape(*shape[:2], spec.heads, -1), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  turned = turned.reshape(shape).astype(x.dtype)
  return jnp.concatenate([x[:, :start], turned, x[:, end:]], axis=1)


def num_offsets(spec: BackboneSpec) -> int:
  """Rows of a table of relative biases: offsets of two patches; and three with the class token."""
  _, height, width = spec.grid
  return (2 * height - 1) * (2 * width - 1) + 3


@functools.cache
def offsets(spec: BackboneSpec) -> Int[np.ndarray, 'n n']:
  """Row of the table for each (query, key): row-major (dy, dx), then class token to patch, patch to
  class token, class token to itself (BEiT, Bao et al. 2022; the order of its published code)."""
  _, height, width = spec.grid
  y, x = (c.ravel() for c in np.mgrid[:height, :width])
  dy, dx = y[:, None] - y + height - 1, x[:, None] - x + width - 1
  index = np.pad(dy * (2 * width - 1) + dx, ((1, 0), (1, 0)))
  rows = num_offsets(spec)
  index[0, :], index[:, 0], index[0, 0] = rows - 3, rows - 2, rows - 1
  return index if spec.class_token else index[1:, 1:]


def relative_bias(
  table: Float[Array, 'offsets heads'], spec: BackboneSpec, queries: int, keys: int
) -> Float[Array, 'heads queries keys']:
  """The bias of each (query, key), 0 for those that a method added at the end."""
  bias = table[offsets(spec)].transpose(2, 0, 1)
  return jnp.pad(bias, ((0, 0), (0, queries - spec.sequence), (0, keys - spec.sequence)))
