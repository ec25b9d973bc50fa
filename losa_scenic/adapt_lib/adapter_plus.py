"""Adapter+: one bottleneck after each block, with a trained scale for every channel.

With y the output of a block,

  x = y + s * DropPath(GELU(y W_d + b_d) W_u + b_u),   W_d [d h], W_u [h d], s [d]

Steitz, Roth: Adapters Strike Back, CVPR 2024, section 3, https://arxiv.org/abs/2406.06820; released
code: https://github.com/visinf/adapter_plus. The GELU is exact (erf). s = 1 and W_d, W_u normal of
deviation 0.01, cut at two deviations, at the start: near the frozen model, not equal to it.

Trainable parameters, L blocks of width d: L (2 d h + h + 2 d).
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from losa_scenic.adapt_lib import inserts
from losa_scenic.adapt_lib.method import Method
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Array
from losa_scenic.model_lib.sites import Ctx
from losa_scenic.model_lib.spec import BackboneSpec

INITS = ('houlsby', 'zero')


def build(
  spec: BackboneSpec,
  *,
  bottleneck: int = 8,
  init: str = 'houlsby',
  dropout: float = 0.0,
  drop_path: float = 0.0,
) -> Method:
  """Adapters after the blocks.

  Args:
    spec: the backbone.
    bottleneck: h, at least 1 (8 in the paper).
    init: 'houlsby' (see above, the paper's) or 'zero' (W_d Xavier-uniform, W_u = 0: exactly the
      frozen model's features).
    dropout: rate after the GELU, in [0, 1) (0 in the paper).
    drop_path: rate at which training leaves out an adapter for an image, in [0, 1) (0.1 in the
      paper, in every block).

  Raises:
    errors.UserError: for a value out of range.
  """
  del spec
  inserts.check_options('adapter_plus', bottleneck=bottleneck, dropout=dropout, drop_path=drop_path)
  errors.one_of('adapter_plus init', init, INITS)
  make = functools.partial(inserts.Bottleneck, bottleneck, 'gelu_erf', dropout)
  if init == 'houlsby':
    normal = nn.initializers.truncated_normal(0.01)
    make = functools.partial(make, down_init=normal, up_init=normal)
  scaled = functools.partial(Scaled, make, drop_path)
  insert = functools.partial(inserts.Delta, scaled, place='after')
  return Method(inserts={'block': insert}, exact_at_init=init == 'zero')


class Scaled(nn.Module):
  """s * DropPath(delta(x)) with s = 1 at the start.

  Attributes:
    make: makes the module `delta(x, ctx)`.
    drop_path: rate at which all of it is dropped for an image; what stays is scaled up.
  """

  make: inserts.MakeDelta
  drop_path: float = 0.0

  def setup(self):
    self.delta = self.make()

  @nn.compact
  def __call__(self, x: Float[Array, 'b n d'], ctx: Ctx) -> Float[Array, 'b n d']:
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],)).astype(x.dtype)
    one_per_image = jnp.ones((x.shape[0], 1, 1), x.dtype)
    path = inserts.dropout(self, self.drop_path, one_per_image, ctx.train)
    return scale * (path * self.delta(x, ctx))
