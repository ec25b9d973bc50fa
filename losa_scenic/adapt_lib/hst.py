"""HST: a pyramid of small blocks beside the backbone that reads its features and meta tokens.

Every block l of the backbone gets m meta tokens E_l of its own: [x; E_l] -> [x'; g_l], and only x'
goes on to the next block. F_l is the token grid of x'. The side network starts from the image,

  s = LN(conv_2x2/2(ReLU(BatchNorm(conv_3x3/2(image)))))

each later stage starts with s = LN(conv_3x3/2(s)), and for every block l of a stage of width c

  s <- s + CrossAttention(LN(s); [LN_l(T g_l); mean(T F_l)]),  s <- s + T F_l,
  s <- s + MLP(LN(s))

with T [d c] the stage's bridge and T F_l resized to the grid of s. A LayerNorm ends each stage. The
classifier sees a BatchNorm without scale and shift of the mean of the last stage's tokens.

Lin, Wu, Yang, Huang, Huang, Jin: Hierarchical Side-Tuning for Vision Transformers, arXiv 2023,
section 3, https://arxiv.org/abs/2310.05393, and their code, https://github.com/AFeng-x/HST.

Trainable parameters: for each of the L blocks m d (meta tokens) + 4 d (the backbone's norms) +
12 c^2 + 13 c + 2 c, c the width of its stage; for each stage d c + c (bridge) + 2 c; 9 c' c + 3 c
for the step from width c' to c; 27 c + 2 c + 4 c^2 + 3 c for the stem.

LN1 and LN2 of the backbone's blocks train; its final norm and pooling are not used. Deviations: the
GELU and the epsilon of the LayerNorms are the backbone's own; the meta tokens stand at the end of
the sequence, not in front. The paper has 12 blocks in 4 stages; here block i of L (from 0) belongs
to stage floor(i stages / L), which is the same for those numbers (our reading).
"""

import functools
import math
import re

import flax.linen as nn
import jax.numpy as jnp

from losa_scenic.adapt_lib import hst_network, inserts
from losa_scenic.adapt_lib.method import Method
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Array
from losa_scenic.model_lib import sites
from losa_scenic.model_lib.spec import BackboneSpec

WIDTHS, HEADS = (32, 48, 64, 72), (2, 4, 8, 12)
_NORM = re.compile(r'encoder/layers(_\d+)?/block/norm[12]/(scale|bias)')


def build(spec: BackboneSpec, *, meta_tokens: int = 1, stages: int = 4) -> Method:
  """HST for a backbone.

  Args:
    spec: the backbone, of images.
    meta_tokens: m, meta tokens of every block, at least 1 (1 as released).
    stages: stages of the pyramid, in 1..4 and no more than the backbone has blocks; their widths
      are the first of 32, 48, 64, 72.

  Raises:
    errors.UserError: for a value out of range, for clips, and for images whose size is not a
      multiple of 4.
  """
  if meta_tokens < 1:
    raise errors.UserError(f'HST meta_tokens must be at least 1, got {meta_tokens}.')
  if not 1 <= stages <= len(WIDTHS):
    raise errors.UserError(f'HST stages must be in 1..{len(WIDTHS)}, got {stages}.')
  if stages > spec.depth:
    raise errors.UserError(
      f'HST needs a block for each of its {stages} stages; this backbone has {spec.depth}: set '
      f'stages to at most {spec.depth}.'
    )
  if spec.frames:
    raise errors.UserError('HST reads the image itself: it cannot adapt a backbone for clips.')
  if spec.image_size % 4:
    raise errors.UserError(
      f'HST needs images whose size is a multiple of 4, not {spec.image_size} pixels.'
    )
  side = functools.partial(
    hst_network.SideNetwork,
    spec,
    stage_of=tuple(i * stages // spec.depth for i in range(spec.depth)),
    widths=WIDTHS[:stages],
    heads=HEADS[:stages],
  )
  return Method(
    inserts={'block': functools.partial(MetaTokens, meta_tokens)},
    collect=('block',),
    side=side,
    trains=lambda path: bool(_NORM.fullmatch(path)),
    adds_tokens=True,
    exact_at_init=False,
  )


class MetaTokens(nn.Module):
  """Runs a block with more tokens at the end; records what becomes of them, and removes them.

  Attributes:
    count: m.
  """

  count: int

  @nn.compact
  def __call__(self, f: sites.Op, x: Array, ctx: sites.Ctx) -> Array:
    b, n, d = x.shape
    bound = math.sqrt(6 / ((self.count + 1) * d))  # Xavier, as released: of a tensor [1 m d].
    meta = self.param('meta', inserts.uniform(bound), (self.count, d)).astype(x.dtype)
    y = f(jnp.concatenate([x, jnp.broadcast_to(meta, (b, self.count, d))], axis=1))
    ctx.record('meta', y[:, n:])
    return y[:, :n]
