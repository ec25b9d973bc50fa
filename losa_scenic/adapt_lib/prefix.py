"""Prefix tuning: learned keys and values in every attention layer.

  Attn(u) = out(softmax(q [k; p_k]^T / sqrt(d / H)) [v; p_v]),   p_k, p_v [l d], split over heads

Queries and the number of tokens stay as they are.

Li, Liang 2021, Prefix-Tuning: Optimizing Continuous Prompts for Generation, ACL,
https://arxiv.org/abs/2101.00190, section 4. This is the 'flat' form: the keys and values are the
parameters themselves, not the output of an MLP. Appended or prepended is the same to attention.

Trainable parameters: 2 L l d. Not the identity at the start: any key takes a share of the softmax.
"""

import functools

import flax.linen as nn

from losa_scenic.adapt_lib import inserts, tokens
from losa_scenic.adapt_lib.method import Method
from losa_scenic.common_lib import errors
from losa_scenic.model_lib.spec import BackboneSpec

INITS = ('xavier', 'normal')


def build(spec: BackboneSpec, *, length: int = 10, init: str = 'xavier') -> Method:
  """Prefix tuning.

  Args:
    spec: the backbone.
    length: l, learned keys and values of each layer, at least 1.
    init: 'xavier', uniform within sqrt(6 / (d (l + 1))) as in modelscope/scepter, or 'normal',
      N(0, 1) as in adapter-hub/adapters, a strong disturbance for a ViT.

  Raises:
    errors.UserError: for a value out of range.
  """
  inserts.check_options('prefix', length=length)
  errors.one_of('prefix init', init, INITS)
  xavier = tokens.xavier_init(length, spec.width)
  make = functools.partial(
    tokens.Prefix, length=length, init=xavier if init == 'xavier' else nn.initializers.normal(1.0)
  )
  return Method(inserts={'attend': make}, exact_at_init=False)
