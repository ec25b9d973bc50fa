"""Adapter: a bottleneck after each block's MLP, or after its attention and its MLP.

With z what a sublayer gives before the residual sum,

  A(z) = z + act(z W_d + b_d) W_u + b_u,   W_d [d h], W_u [h d]

'houlsby': on the attention and on the MLP of every block (Houlsby et al. 2019, Parameter-Efficient
Transfer Learning for NLP, ICML 2019, https://arxiv.org/abs/1902.00751, section 2.1).
'pfeiffer': on the MLP only (Pfeiffer et al. 2021, AdapterFusion, EACL 2021,
https://arxiv.org/abs/2005.00247), with QuickGELU t sigmoid(1.702 t), as NOAH's authors run it on
images (Zhang, Zhou, Liu 2022, https://arxiv.org/abs/2206.04673).

Trainable parameters, L blocks of width d: L (2 d h + h + d), with 'houlsby' twice that.

Deviations: W_u = 0 at the start by default, for exactly the frozen model's features; the
LayerNorms, which Houlsby et al. train too, stay frozen.
"""

import functools

import flax.linen as nn

from losa_scenic.adapt_lib import inserts
from losa_scenic.adapt_lib.method import Method
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.activations import ACTIVATIONS
from losa_scenic.model_lib.spec import BackboneSpec

# placement: (sites, default activation).
PLACEMENTS = {
  'pfeiffer': (('mlp',), 'quick_gelu'),
  'houlsby': (('attn', 'mlp'), 'gelu_erf'),
}
INITS = ('zero', 'noah')


def build(
  spec: BackboneSpec,
  *,
  bottleneck: int = 8,
  placement: str = 'pfeiffer',
  activation: str | None = None,
  init: str = 'zero',
  dropout: float = 0.0,
) -> Method:
  """Serial adapters.

  Args:
    spec: the backbone.
    bottleneck: h, at least 1 (8 in NOAH's runs on VTAB-1K).
    placement: 'pfeiffer' (one adapter per block) or 'houlsby' (two).
    activation: a key of `ACTIVATIONS`; 'quick_gelu' or, with 'houlsby', 'gelu_erf' when not given.
    init: 'zero' (W_d Xavier-uniform, W_u = 0) or 'noah' (both normal of deviation 0.02, what the
      released code of NOAH starts from).
    dropout: rate after the activation, in [0, 1) (0.1 in NOAH's runs).

  Raises:
    errors.UserError: for a value out of range.
  """
  del spec
  inserts.check_options('adapter', bottleneck=bottleneck, dropout=dropout)
  errors.one_of('adapter placement', placement, PLACEMENTS)
  errors.one_of('adapter init', init, INITS)
  where, default = PLACEMENTS[placement]
  activation = default if activation is None else activation
  errors.one_of('adapter activation', activation, ACTIVATIONS)
  make = functools.partial(inserts.Bottleneck, bottleneck, activation, dropout)
  if init == 'noah':
    # There the normal distribution is cut at +-2, which is a hundred deviations.
    normal = nn.initializers.normal(0.02)
    make = functools.partial(make, down_init=normal, up_init=normal)
  insert = functools.partial(inserts.Delta, make, place='after')
  return Method(inserts=dict.fromkeys(where, insert), exact_at_init=init == 'zero')
