"""Temporal encoder: a transformer over the times of a clip, after the spatial encoder of each.

With x [n_t d] the features of a factorised backbone in time, normalised and pooled in space, and p
[n_t d] learned positions,

  y = mean_t(x) + mean_t(LN(Block_k(.. Block_1(x + p))))

takes the place of their mean. The blocks are pre-norm, of the backbone's width, heads and hidden
channels; the scale of LN starts at 0, so that the adapted model starts as the frozen one.

Arnab, Dehghani, Heigold, Sun, Lucic, Schmid: ViViT, ICCV 2021, section 3.3, model 2 (factorised
encoder), https://arxiv.org/abs/2103.15691. That model is `full+temporal` with residual=False (y is
the second mean alone, and LN starts as usual) and depth 4, but for two things: its released configs
classify a class token in time, here the mean over time is classified; and positions start larger.
Beside a frozen backbone nothing is published: the residual form is ours, in the spirit of the zero
initialisation that the paper gives to model 3.

Trainable parameters, k blocks of width d with m hidden channels:
k (4 d^2 + 9 d + 2 d m + m) + n_t d + 2 d.
"""

import dataclasses
import functools

import flax.linen as nn
from jaxtyping import Float

from losa_scenic.adapt_lib import ladder
from losa_scenic.adapt_lib.method import Method
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Array
from losa_scenic.model_lib import sites
from losa_scenic.model_lib.block import Block
from losa_scenic.model_lib.spec import BackboneSpec

# Of the positions at the start. The features are normalised: with the 0.02 that is usual before a
# first block, which way a pattern moves was not learned in 1,000 steps, with 0.2 in 300.
_SPREAD = 0.5


def build(spec: BackboneSpec, *, depth: int = 4, residual: bool = True) -> Method:
  """A temporal encoder for a factorised backbone.

  Args:
    spec: the backbone.
    depth: k, number of blocks, at least 1 (4 in ViViT).
    residual: whether it adds to the mean over time, by nothing at the start, or takes its place.

  Raises:
    errors.UserError: for a depth out of range, and for a backbone that is not factorised.
  """
  errors.check_at_least('temporal depth', depth, 1)
  if not spec.factorised:
    kind = 'mixes all times of a clip in every layer' if spec.frames else 'is for images'
    raise errors.UserError(
      f"A temporal encoder reads the features of each time of a clip, but backbone '{spec.name}' "
      f'{kind}: give backbone_configs.frames and backbone_configs.factorised=True.'
    )
  blocks = ladder.side_spec(spec, spec.width, spec.mlp, spec.heads)
  insert = functools.partial(
    TemporalEncoder, dataclasses.replace(blocks, depth=depth), residual=residual
  )
  return Method(inserts={'time': insert}, exact_at_init=residual)


class TemporalEncoder(nn.Module):
  """Features in time -> those of the clip, around their mean `f`.

  Attributes:
    spec: of the blocks.
    residual: whether `f(x)` is added.
  """

  spec: BackboneSpec
  residual: bool = True

  @nn.compact
  def __call__(self, f: sites.Op, x: Float[Array, 'b t d'], ctx: sites.Ctx) -> Float[Array, 'b d']:
    positions = self.param('pos_embedding', nn.initializers.normal(_SPREAD), (1, *x.shape[1:]))
    z, nothing_inserted = x + positions.astype(x.dtype), sites.make_at({}, ctx)
    # Not an `Encoder`: its `layers_<i>` would be stacked with those of the backbone.
    for i in range(self.spec.depth):
      z = Block(self.spec, x.dtype, name=f'block_{i + 1}')(z, nothing_inserted)
    start = nn.initializers.zeros if self.residual else nn.initializers.ones
    z = nn.LayerNorm(self.spec.norm_eps, x.dtype, scale_init=start, name='norm')(z).mean(axis=1)
    return f(x) + z if self.residual else z
