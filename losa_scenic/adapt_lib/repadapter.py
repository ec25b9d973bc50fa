"""RepAdapter: a linear bottleneck before linear layers, which can be folded into them.

  R(z) = z + s (G(z W_d + b_d) + b_g),   W_d [d h]

G maps h to d channels in g groups: the i-th h/g hidden channels give the i-th d/g outputs. There is
no activation. R stands between LN_1 and the query, key and value, and between LN_2 and the first
layer of the MLP; with placement 'attn' only the former. The scale s multiplies the biases too.

Luo, Huang, Zhou, Sun, Jiang, Wang, Ji 2023: Towards Efficient Visual Adaption via Structural
Re-parameterization, section 3, https://arxiv.org/abs/2302.08106; the biases are those of
https://github.com/luogen1996/RepAdapter, the paper's parameter counts leave them out.

Trainable parameters, L blocks of width d: L (d h + h + d h / g + d), twice that with 'block'.

Here R stands at the linear layers themselves, and query, key and value share one: the same function
as one after the LayerNorm, and each of the layers can be folded on its own.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from losa_scenic.adapt_lib import inserts
from losa_scenic.adapt_lib.method import Method
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Array
from losa_scenic.model_lib.products import product
from losa_scenic.model_lib.sites import Ctx
from losa_scenic.model_lib.spec import BackboneSpec

PLACEMENTS = {'block': (inserts.QKV, 'fc1'), 'attn': (inserts.QKV,)}


def build(
  spec: BackboneSpec,
  *,
  bottleneck: int = 8,
  groups: int = 2,
  scale: float = 1.0,
  placement: str = 'block',
  dropout: float = 0.0,
) -> Method:
  """Linear adapters that can be folded.

  Args:
    spec: the backbone.
    bottleneck: h, a multiple of `groups` (8 in the paper).
    groups: g, a divisor of the backbone's width (2 in the paper).
    scale: s, positive (one of 0.1, 0.5, 1, 5, 10 for each task of VTAB-1K in the released code).
    placement: 'block' (attention and MLP) or 'attn'.
    dropout: rate on the hidden channels, in [0, 1) (0.1 in the released code).

  Raises:
    errors.UserError: for a value out of range, or groups that do not divide.
  """
  inserts.check_options(
    'repadapter', bottleneck=bottleneck, groups=groups, scale=scale, dropout=dropout
  )
  errors.one_of('repadapter placement', placement, PLACEMENTS)
  if bottleneck % groups or spec.width % groups:
    raise errors.UserError(
      f'repadapter groups must divide the bottleneck {bottleneck} and the width {spec.width}, '
      f'got {groups}.'
    )
  make = functools.partial(Grouped, bottleneck, groups, dropout)
  insert = functools.partial(inserts.Delta, make, place='before', scale=scale)
  return Method(inserts=dict.fromkeys(PLACEMENTS[placement], insert))


class Grouped(nn.Module):
  """G(x W_d + b_d) + b_g, with G = 0 and b = 0 at the start.

  Attributes:
    hidden: h.
    groups: g.
    dropout: rate on the hidden channels; all calls of one pass through a layer share their mask.
  """

  hidden: int
  groups: int
  dropout: float = 0.0

  def setup(self):
    # Drawn once and not in every call, so that query, key and value see the same R(z).
    self.mask_rng = self.make_rng('dropout') if self.has_rng('dropout') else None

  @nn.compact
  def __call__(self, x: Float[Array, 'b n d'], ctx: Ctx) -> Float[Array, 'b n d']:
    d, h, g, dtype = x.shape[-1], self.hidden, self.groups, x.dtype
    zeros = nn.initializers.zeros
    down = self.param('down_kernel', nn.initializers.xavier_uniform(), (d, h)).astype(dtype)
    down_bias = self.param('down_bias', zeros, (h,)).astype(dtype)
    up = self.param('up_kernel', zeros, (g, h // g, d // g)).astype(dtype)
    up_bias = self.param('up_bias', zeros, (d,)).astype(dtype)
    x = inserts.dropout(self, self.dropout, product(x, down) + down_bias, ctx.train, self.mask_rng)
    grouped = x.reshape(*x.shape[:-1], g, h // g)
    return jnp.einsum('bngh,ghe->bnge', grouped, up).reshape(*x.shape[:-1], d) + up_bias
