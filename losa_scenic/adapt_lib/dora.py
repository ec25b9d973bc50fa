"""DoRA: LoRA in which a magnitude per output unit is trained apart from the direction.

  V = W + s A B,  s = alpha / r
  g = m / ||V||,  m = ||W|| + magnitude_bias
  y = g * (x V) + c

with one norm per output unit, over its d inputs. ||V|| follows A and B, but counts as a constant in
the backward pass. In training with dropout, what is added sees the thinned-out input x':

  y = x W + c + (g - 1) * (x' W) + s g * (x' A B)

Liu et al.: DoRA: Weight-Decomposed Low-Rank Adaptation, ICML 2024, sections 4.1-4.3,
https://arxiv.org/abs/2402.09353; details as in Hugging Face's peft, tuners/lora/dora.py.

Trainable parameters: r (d_in + d_out) + d_out for each target of each block.

Deviation: the parameter is m - ||W||, which starts at 0, in place of m. It takes the same steps,
its start needs no stored weight, and weight decay could not pull m to 0. Norms are float32 in any
dtype of compute.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from losa_scenic.adapt_lib import inserts
from losa_scenic.adapt_lib.method import Method
from losa_scenic.common_lib.types import Array
from losa_scenic.model_lib import sites
from losa_scenic.model_lib.products import product
from losa_scenic.model_lib.spec import BackboneSpec

TARGETS = inserts.LINEAR_SITES


def build(
  spec: BackboneSpec,
  *,
  rank: int = 8,
  alpha: float | None = None,
  targets: str = 'query,value',
  dropout: float = 0.0,
) -> Method:
  """DoRA for a backbone.

  Args:
    spec: the backbone.
    rank: r, at least 1 (8: peft's default).
    alpha: scale times rank, greater than 0; the rank itself when not given, so that s = 1.
    targets: comma list of query, key, value, out, fc1, fc2, gate; 'qkv' stands for the first three.
    dropout: rate in [0, 1) on the input of the increment.

  Raises:
    errors.UserError: for a value out of range.
  """
  del spec
  inserts.check_options('DoRA', rank=rank, dropout=dropout)
  scale = inserts.low_rank_scale('DoRA', rank, alpha)
  make = functools.partial(DoRA, rank=rank, scale=scale, dropout=dropout)
  return Method(inserts=dict.fromkeys(inserts.targets('DoRA', targets, TARGETS), make))


class DoRA(nn.Module):
  """Stands around a linear layer whose weight it needs: no other insert may stand in between.

  Attributes:
    rank: r.
    scale: s.
    dropout: rate.
  """

  rank: int
  scale: float = 1.0
  dropout: float = 0.0

  @nn.compact
  def __call__(
    self, f: sites.Op, x: Float[Array, '... d'], ctx: sites.Ctx
  ) -> Float[Array, '... e']:
    y, dtype = f(x), x.dtype
    kernel = sites.kernel(f)  # Exists once f was called, when all parameters are being made.
    d, e = kernel.shape
    a = self.param('a', inserts.LINEAR_INIT, (d, self.rank))
    b = self.param('b', nn.initializers.zeros, (self.rank, e))
    magnitude = self.param('magnitude_bias', nn.initializers.zeros, (e,))
    of_w, of_v = _norms(kernel, self.scale * a @ b)
    gain = (of_w + magnitude) / of_v
    if ctx.train and self.dropout:
      x = inserts.dropout(self, self.dropout, x, ctx.train)
      direction = x @ kernel.astype(dtype)
    else:
      direction = y - f(jnp.zeros_like(x[..., :1, :]))  # x W: f at 0 is its bias.
    increment = product(self.scale * product(x, a.astype(dtype)), b.astype(dtype))
    # In this form g = 1 and B = 0 give f(x) bit for bit.
    return y + (gain - 1).astype(dtype) * direction + gain.astype(dtype) * increment


def _norms(
  kernel: Float[Array, 'd e'], increment: Float[Array, 'd e']
) -> tuple[Float[Array, ' e'], Float[Array, ' e']]:
  """Norms of the columns of W and of W + increment, without gradients."""
  w = jax.lax.stop_gradient(kernel.astype(jnp.float32))
  # One reduction for both, so that without an increment they are equal to the last bit.
  both = jnp.stack([w, w + jax.lax.stop_gradient(increment)])
  of_w, of_v = jnp.linalg.norm(both, axis=1)
  return of_w, jnp.maximum(of_v, jnp.finfo(jnp.float32).tiny)  # A column of zeros stays zero.
