"""ST-Adapter: bottlenecks with a depthwise convolution in time and space, for clips.

  S(x) = x + act(dwconv(x W_d + b_d)) W_u + b_u,   W_d [d h], W_u [h d]

takes the place of the residual stream x before each block's attention and again before its MLP. The
convolution, with bias, runs over the token grid (t, y, x), zeros around it; tokens that are not on
the grid pass unchanged. An image is a clip of one frame.

Pan, Lin, Zhu, Shao, Li: ST-Adapter, NeurIPS 2022, section 3, https://arxiv.org/abs/2206.13559. As
in https://github.com/linziyi96/st-adapter there is no activation by default, though the paper
writes one, and the convolution starts at 0. The window is 3 x 3 x 3 with 768 channels in the LoSA
paper's video table, 3 x 1 x 1 with half the backbone's width in the released models.

Trainable parameters, L blocks of width d, k entries in the window: 2 L (2 d h + h + k h + h + d),
half of it with placement 'mlp'.

With pooling 'cls' the adapter before the last MLP changes nothing the classifier sees.
"""

import functools
import re

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from losa_scenic.adapt_lib import convolutions, inserts
from losa_scenic.adapt_lib.method import Method
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.activations import ACTIVATIONS
from losa_scenic.common_lib.types import Array
from losa_scenic.model_lib.sites import Ctx, Op
from losa_scenic.model_lib.spec import BackboneSpec

PLACEMENTS = {'both': ('attn_block', 'mlp_block'), 'mlp': ('mlp_block',)}


def build(
  spec: BackboneSpec,
  *,
  bottleneck: int | None = None,
  kernel: str = '3,3,3',
  activation: str = 'none',
  placement: str = 'both',
) -> Method:
  """Space-time adapters.

  Args:
    spec: the backbone.
    bottleneck: h, at least 1 (768 in the LoSA paper); half the width, as in the released models,
      when not given.
    kernel: size of the window in time, height and width, three odd numbers.
    activation: a key of `ACTIVATIONS`, after the convolution.
    placement: 'both' (before attention and before MLP) or 'mlp'.

  Raises:
    errors.UserError: for a value out of range.
  """
  hidden = max(spec.width // 2, 1) if bottleneck is None else bottleneck
  inserts.check_options('st_adapter', bottleneck=hidden)
  errors.one_of('st_adapter activation', activation, ACTIVATIONS)
  errors.one_of('st_adapter placement', placement, PLACEMENTS)
  sizes = [int(n) for n in kernel.split(',')] if re.fullmatch(r'\d+,\d+,\d+', kernel) else []
  if not sizes or not all(n % 2 for n in sizes):
    raise errors.UserError(
      f"st_adapter kernel must be three odd numbers such as '3,3,3', got '{kernel}'."
    )
  insert = functools.partial(
    STAdapter,
    functools.partial(
      inserts.Bottleneck,
      hidden,
      activation,
      down_init=inserts.LINEAR_INIT,
      up_init=inserts.LINEAR_INIT,
      conv=functools.partial(DepthwiseConvolution, tuple(sizes)),
    ),
  )
  return Method(inserts=dict.fromkeys(PLACEMENTS[placement], insert))


class STAdapter(nn.Module):
  """f(S(x)).

  Attributes:
    make: makes the module `delta(grid, ctx)` that S adds on the grid.
  """

  make: inserts.MakeDelta

  def setup(self):
    self.delta = self.make()

  def __call__(self, f: Op, x: Float[Array, 'b n d'], ctx: Ctx) -> Float[Array, 'b m d']:
    prefix, grid, added = ctx.split(x)
    grid += self.delta(grid, ctx)
    return f(jnp.concatenate([prefix, grid.reshape(x.shape[0], -1, x.shape[-1]), added], axis=1))


class DepthwiseConvolution(nn.Module):
  """Depthwise convolution of a grid with bias, both 0 at the start.

  Attributes:
    size: of the window (t, h, w).
  """

  size: tuple[int, ...]

  @nn.compact
  def __call__(self, x: Float[Array, 'b t h w c'], ctx: Ctx) -> Float[Array, 'b t h w c']:
    del ctx
    zeros, channels = nn.initializers.zeros, x.shape[-1]
    kernel = self.param('kernel', zeros, (*self.size, channels)).astype(x.dtype)
    bias = self.param('bias', zeros, (channels,)).astype(x.dtype)
    return convolutions.depthwise(x, kernel) + bias
