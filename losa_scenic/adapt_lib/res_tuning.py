"""Res-Tuning: a prefix on the attention, an adapter beside the MLP and prompts on the block.

  attn(u)   softmax(q [k; p_k]^T / sqrt(d / H)) [v; p_v]
  mlp(u)    fc2(gelu(fc1(u))) + gelu(u W_1 + c_1) W_2 + c_2
  block(x)  B([x, p]) without the positions of p

each of length (prefix, prompts) or width (adapter) r.

Jiang et al. 2023, Res-Tuning: A Flexible and Efficient Tuning Paradigm via Unbinding Tuner from
Backbone, NeurIPS, https://arxiv.org/abs/2310.19859, section 3.

Trainable parameters: L (2 d r + r + d + 3 r d).

Our reading: which tuner stands where follows from the paper's share of trainable parameters,
0.548 % of ViT-B/16 for r = 10. Their adapter has a shortcut of its own, z + W_2 gelu(W_1 z); beside
an MLP that is one too many, and it is left out. Weights start xavier-uniform, biases at 0 (N(0,
1e-6) in the authors' code, modelscope/scepter). The GELU is the backbone's own.
"""

import functools

import flax.linen as nn

from losa_scenic.adapt_lib import inserts, tokens
from losa_scenic.adapt_lib.method import Method
from losa_scenic.model_lib.spec import BackboneSpec


def build(spec: BackboneSpec, *, length: int = 10, dropout: float = 0.0) -> Method:
  """Res-Tuning.

  Args:
    spec: the backbone.
    length: r, of the prefix and of the prompts, and width of the adapter; at least 1.
    dropout: rate inside the adapter and on the prompts, in [0, 1).

  Raises:
    errors.UserError: for a value out of range.
  """
  inserts.check_options('res_tuning', length=length, dropout=dropout)
  init = tokens.xavier_init(length, spec.width)
  adapter = functools.partial(
    inserts.Bottleneck,
    hidden=length,
    activation=f'gelu_{spec.gelu}',
    dropout=dropout,
    up_init=nn.initializers.xavier_uniform(),
  )
  return Method(
    inserts={
      'attend': functools.partial(tokens.Prefix, length=length, init=init),
      'mlp': functools.partial(inserts.Delta, make=adapter, place='beside'),
      'block': functools.partial(tokens.Prompts, count=length, init=init, dropout=dropout),
    },
    adds_tokens=True,
    exact_at_init=False,
  )
