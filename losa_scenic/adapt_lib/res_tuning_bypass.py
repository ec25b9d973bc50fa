"""Res-Tuning-Bypass: a chain of small residual adapters beside the detached backbone.

With b_0 the embedded tokens, b_1 .. b_L the outputs of the blocks and h_0 = b_0,

  h_l = A^lat_l(b_l) + A^ver_l(h_{l-1}),   A(z) = z + GELU(z W_1 + c_1) W_2 + c_2

and h_L takes the place of b_L: frozen final norm, pooling, classifier. All 2 L adapters differ.

Jiang, Mao, Huang, Ma, Lv, Shen, Zhao, Zhou: Res-Tuning: A Flexible and Efficient Tuning Paradigm
via Unbinding Tuner from Backbone, NeurIPS 2023, section 3.3, https://arxiv.org/abs/2310.19859; the
sum is that of the released code, https://github.com/modelscope/swift. The paper weights the two
terms instead: form='weighted' is l_l A^lat_l(b_l) + (1 - l_l) A^ver_l(h_{l-1}) with
l_l = sigmoid(gate_l) and gate_l = 0 at the start, where the sigmoid is our reading.

Trainable parameters, bottleneck r: 2 L (2 d r + r + d), and L more when weighted.

Deviations: the biases start at 0 (released: normal with deviation 1e-6); the GELU is the
backbone's own. Since A keeps its input, h_L starts near b_0 + b_1 + .. + b_L, far from b_L: the
final norm brings it back to scale.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float, Num

from losa_scenic.adapt_lib import inserts
from losa_scenic.adapt_lib.method import Method, Run
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Array
from losa_scenic.model_lib import sites
from losa_scenic.model_lib.spec import BackboneSpec

FORMS = ('sum', 'weighted')


def build(
  spec: BackboneSpec, *, bottleneck: int = 10, form: str = 'sum', zero_init: bool = False
) -> Method:
  """Res-Tuning-Bypass for a backbone.

  Args:
    spec: the backbone.
    bottleneck: hidden channels r of every adapter, at least 1 (10 has the parameters of the paper's
      VTAB table).
    form: 'sum' (released code) or 'weighted' (a learned weight for each layer, as in the paper).
    zero_init: start W_2 at 0 instead of Xavier-uniform, so that every A is the identity.

  Raises:
    errors.UserError: for a value out of range.
  """
  errors.one_of('Res-Tuning-Bypass form', form, FORMS)
  if bottleneck < 1:
    raise errors.UserError(f'Res-Tuning-Bypass bottleneck must be at least 1, got {bottleneck}.')
  up_init = nn.initializers.zeros if zero_init else nn.initializers.xavier_uniform()
  adapter = functools.partial(inserts.Bottleneck, bottleneck, f'gelu_{spec.gelu}', up_init=up_init)
  side = functools.partial(Bypass, adapter, weighted=form == 'weighted')
  return Method(collect=('block',), side=side, exact_at_init=False)


class Bypass(nn.Module):
  """The side network.

  Attributes:
    make: makes what an adapter adds to its input; takes a name.
    weighted: whether the lateral and the vertical term have a learned weight.
  """

  make: Callable[..., nn.Module]
  weighted: bool = False

  @nn.compact
  def __call__(
    self, run: Run, inputs: Num[Array, 'b *thw c'] | None, *, train: bool
  ) -> Float[Array, 'b ...']:
    encoded = run.encode(inputs, train=train)
    ctx = sites.Ctx(grid=encoded.grid, prefix=encoded.prefix, train=train)
    depth = len(encoded.layers['block'])
    h, one = encoded.embedded, jnp.ones((), encoded.embedded.dtype)
    gate = self.param('gate', nn.initializers.zeros, (depth,)) if self.weighted else None
    for i in range(depth):
      b = encoded.layers['block'][i]
      lateral = b + self.make(name=f'lateral_{i}')(b, ctx)
      vertical = h + self.make(name=f'vertical_{i}')(h, ctx)
      if gate is None:
        h = lateral + vertical
      else:
        weight = nn.sigmoid(gate[i]).astype(h.dtype)
        h = weight * lateral + (one - weight) * vertical
    return run.features(h, train=train)
