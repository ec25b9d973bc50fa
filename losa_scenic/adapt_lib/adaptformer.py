"""AdaptFormer: a bottleneck beside each block's MLP, on the residual stream itself.

With u the stream after the attention,

  x = u + MLP(LN_2(u)) + s (ReLU(u W_d + b_d) W_u + b_u),   W_d [d h], W_u [h d]

The scale s is fixed and multiplies the biases too; u is not normalised.

Chen, Ge, Tong, Wang, Song, Wang, Luo: AdaptFormer, NeurIPS 2022, section 3.2,
https://arxiv.org/abs/2205.13535. Trainable parameters, L blocks of width d: L (2 d h + h + d).

Deviation: the authors' batch norm before the classifier is left out.
"""

import functools

from losa_scenic.adapt_lib import inserts
from losa_scenic.adapt_lib.method import Method
from losa_scenic.model_lib.spec import BackboneSpec


def build(
  spec: BackboneSpec, *, bottleneck: int = 64, scale: float = 0.1, dropout: float = 0.0
) -> Method:
  """Parallel adapters.

  Args:
    spec: the backbone.
    bottleneck: h, at least 1 (64 for images in the paper; 8 in comparisons on VTAB-1K).
    scale: s, positive (0.1 in the paper).
    dropout: rate after the ReLU, in [0, 1) (0.1 in the released code).

  Raises:
    errors.UserError: for a value out of range.
  """
  del spec
  inserts.check_options('adaptformer', bottleneck=bottleneck, scale=scale, dropout=dropout)
  make = functools.partial(inserts.Bottleneck, bottleneck, 'relu', dropout, inserts.LINEAR_INIT)
  insert = functools.partial(inserts.Delta, make, place='beside', scale=scale)
  return Method(inserts={'mlp_block': insert})
