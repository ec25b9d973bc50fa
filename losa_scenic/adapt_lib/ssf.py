"""SSF: a trained scale and shift of every channel after each linear layer and LayerNorm.

  y = scale * f(x) + shift,   both [e] for an f with e output channels

f: the patch embedding; in every block LN_1, query, key, value, attention output, LN_2 and the two
linear layers of the MLP; the final LayerNorm. All of it can be folded into the frozen weights.

Lian, Zhou, Feng, Wang: Scaling & Shifting Your Features, NeurIPS 2022, section 3.2,
https://arxiv.org/abs/2210.08823. Trainable parameters, L blocks of width d with an MLP of m hidden
channels: 2 L (7 d + m) + 4 d. A MAP head is left as it is.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from losa_scenic.adapt_lib.method import Method
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Array
from losa_scenic.model_lib.sites import Ctx, Op
from losa_scenic.model_lib.spec import BackboneSpec

SITES = ('patch', 'norm1', 'query', 'key', 'value', 'out', 'norm2', 'fc1', 'gate', 'fc2', 'norm')
# init: standard deviation of the scales around 1 and of the shifts around 0.
INITS = {'normal': 0.02, 'identity': 0.0}


def build(spec: BackboneSpec, *, init: str = 'normal') -> Method:
  """Scales and shifts.

  Args:
    spec: the backbone.
    init: 'normal' (scales around 1 and shifts around 0, of deviation 0.02, as in the paper) or
      'identity' (1 and 0: exactly the frozen model's features).

  Raises:
    errors.UserError: for an unknown init.
  """
  errors.one_of('ssf init', init, INITS)
  absent = ([] if spec.gated else ['gate']) + (['norm'] if spec.final_norm == 'none' else [])
  chosen = [site for site in SITES if site not in absent]
  insert = functools.partial(ScaleShift, INITS[init])
  return Method(inserts=dict.fromkeys(chosen, insert), exact_at_init=init == 'identity')


class ScaleShift(nn.Module):
  """scale * f(x) + shift.

  Attributes:
    deviation: of both at the start, around 1 and 0.
  """

  deviation: float

  @nn.compact
  def __call__(self, f: Op, x: Array, ctx: Ctx) -> Array:
    del ctx
    y = f(x)

    def param(name: str, mean: float) -> Array:
      return self.param(name, self._around(mean), y.shape[-1:]).astype(y.dtype)

    return y * param('scale', 1.0) + param('shift', 0.0)

  def _around(self, mean: float) -> nn.initializers.Initializer:
    def init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
      return mean + self.deviation * jax.random.normal(key, shape, dtype)

    return init
