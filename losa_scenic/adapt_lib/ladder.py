"""A ladder: a small transformer beside the backbone that reads its layers.

With b_1 .. b_k what is read and h_0 = D_0 y_0,

  mu_i = sigmoid(a_i / T),  h_i = Block_i(mu_i h_{i-1} + (1 - mu_i) D_i b_i),  out = U LN(h_k)

where D_i [d w] and U [w d] are linear layers with bias, Block_i is a pre-norm transformer block of
width w, a_i = 0 at the start and T = 0.1. The output takes the place of the backbone's normalised
tokens. Sung, Cho, Bansal: LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer
Learning, NeurIPS 2022, section 3, https://arxiv.org/abs/2206.06522, and their code,
https://github.com/ylsung/Ladder-Side-Tuning.

Trainable parameters, with m hidden channels in the side blocks:
k (d w + w + 4 w^2 + 4 w + 2 w m + m + w + 4 w + 1) + (d w + w) + 2 w + (w d + d).
"""

import dataclasses
import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float, Num

from losa_scenic.adapt_lib.method import Run
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Array
from losa_scenic.model_lib import layers, sites
from losa_scenic.model_lib.block import Block
from losa_scenic.model_lib.spec import BackboneSpec

TEMPERATURE = 0.1


def side_spec(
  spec: BackboneSpec, width: int | None, mlp_dim: int | str, heads: int | None
) -> BackboneSpec:
  """The geometry of the side blocks.

  Args:
    spec: the backbone.
    width: w; d / 8, rounded down, when None.
    mlp_dim: hidden channels of a side block's MLP: a number (also as a string), '4w' for 4 w, or
      'backbone' for as many as the backbone's blocks have.
    heads: attention heads; when None the largest divisor of w that is not above the backbone's
      number, hence that number itself wherever it divides w.

  Raises:
    errors.UserError: for a value out of range.
  """
  width = max(1, spec.width // 8) if width is None else width
  if width < 1:
    raise errors.UserError(f'The width of the side network must be at least 1, got {width}.')
  if heads is None:
    heads = next(h for h in range(min(spec.heads, width), 0, -1) if width % h == 0)
  if heads < 1 or width % heads:
    raise errors.UserError(f'{heads} heads do not divide the side width {width}.')
  named = {'4w': 4 * width, 'backbone': spec.mlp}
  if isinstance(mlp_dim, str) and mlp_dim.isdecimal():
    mlp_dim = int(mlp_dim)
  if isinstance(mlp_dim, str):
    mlp_dim = named[errors.one_of('mlp_dim (or a number)', mlp_dim, named)]
  if mlp_dim < 1:
    raise errors.UserError(f'mlp_dim must be at least 1, got {mlp_dim}.')
  plain = BackboneSpec(spec.name, width, spec.depth, mlp_dim, heads, spec.patch, spec.image_size)
  return dataclasses.replace(plain, activation=f'gelu_{spec.gelu}', norm_eps=spec.norm_eps)


class Ladder(nn.Module):
  """The side network.

  Attributes:
    spec: of the side blocks; see `side_spec`.
    taps: 0-based indices of the blocks that are read.
    collect: the site or sites read of each of those blocks, one rung for each.
    start: y_0, 'b_0' (the embedded tokens) or 'b_L' (the output of the last block).
  """

  spec: BackboneSpec
  taps: tuple[int, ...]
  collect: tuple[str, ...] = ('block',)
  start: str = 'b_0'

  @nn.compact
  def __call__(
    self, run: Run, inputs: Num[Array, 'b *thw c'] | None, *, train: bool
  ) -> Float[Array, 'b ...']:
    encoded = run.encode(inputs, train=train)
    y = encoded.tokens if self.start == 'b_L' else encoded.embedded
    if self.is_initializing():
      run.normed(y)  # The backbone keeps its final norm, though nothing here passes through it.
    stream = [encoded.layers[site][tap] for tap in self.taps for site in self.collect]
    return run.pooled(self._climb(y, stream), train=train)

  def _climb(
    self, y: Float[Array, 'b n d'], stream: list[Float[Array, 'b n d']]
  ) -> Float[Array, 'b n d']:
    spec, dtype = self.spec, y.dtype
    linear = functools.partial(layers.dense, dtype=dtype)
    gate = self.param('gate', nn.initializers.zeros, (len(stream),))
    mu = nn.sigmoid(gate / TEMPERATURE).astype(dtype)
    h = linear(spec.width, name='down_0')(y)
    for i, b in enumerate(stream):
      b = linear(spec.width, name=f'down_{i + 1}')(b)
      h = mu[i] * h + (jnp.ones((), dtype) - mu[i]) * b
      h = Block(spec, dtype, name=f'block_{i + 1}')(h, _nothing_inserted)
    h = nn.LayerNorm(epsilon=spec.norm_eps, dtype=dtype, name='norm')(h)
    return linear(y.shape[-1], name='up')(h)


def _nothing_inserted(site: str, f: sites.Op) -> sites.Op:
  del site
  return f
