"""EXPRES: learned output tokens, shaped by residual prompts inside the layers.

M output tokens o join the image's tokens at the input. In every layer a learned vector is added to
what an operation computes for an output token, and for those tokens only:

  y = f(x),   y_i <- y_i + r_i for every output token i,   f one of norm1, query/key/value, out

and the representation is the mean of the output tokens after the final norm.

Das et al. 2023, Learning Expressive Prompting With Residuals for Vision Transformers, CVPR,
https://arxiv.org/abs/2303.15591.

Trainable parameters: M d (1 + L s), with s vectors per layer and token: 1 each for norm1 and out, 3
for qkv.

Our reading, as no code of the authors is public: the operations are norm1 and out (which fits the
parameters that the LoSA paper estimates), the mean, residuals that start at 0 and tokens that start
as VPT's. The class token stays in the sequence; nothing reads it.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from losa_scenic.adapt_lib import inserts, tokens
from losa_scenic.adapt_lib.method import Method
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Array
from losa_scenic.model_lib import sites
from losa_scenic.model_lib.spec import BackboneSpec

PLACES = {'norm1': ('norm1',), 'qkv': ('query', 'key', 'value'), 'out': ('out',)}


def build(spec: BackboneSpec, *, prompts: int = 10, places: str = 'norm1,out') -> Method:
  """EXPRES.

  Args:
    spec: the backbone.
    prompts: M, number of output tokens, at least 1.
    places: where residuals are added, joined by commas: 'norm1', 'qkv', 'out'.

  Raises:
    errors.UserError: for a value out of range.
  """
  inserts.check_options('express', prompts=prompts)
  names = places.split(',')
  for name in names:
    errors.one_of('express place', name, PLACES)
  if len(set(names)) != len(names):
    raise errors.UserError(f"express places '{places}' name one twice.")
  residual = functools.partial(Residual, count=prompts)
  output_tokens = functools.partial(
    tokens.Prompts, count=prompts, init=tokens.vpt_init(spec), stay=True
  )
  return Method(
    inserts={
      'encoder': output_tokens,
      **{site: residual for name in names for site in PLACES[name]},
      'pool': MeanOfAdded,
    },
    adds_tokens=True,
    exact_at_init=False,
  )


class Residual(nn.Module):
  """f(x) + r, for the tokens at the end only; r = 0 at the start.

  Trainable parameters: count * d.

  Attributes:
    count: number of tokens at the end, each with a vector of its own.
  """

  count: int

  @nn.compact
  def __call__(self, f: sites.Op, x: Float[Array, 'b n d'], ctx: sites.Ctx) -> Array:
    y = f(x)
    r = self.param('residuals', nn.initializers.zeros, (self.count, y.shape[-1])).astype(y.dtype)
    return y + jnp.pad(r, ((y.shape[1] - self.count, 0), (0, 0)))


class MeanOfAdded(nn.Module):
  """Mean over the tokens at the end, in place of the pooling. No parameters."""

  def __call__(self, f: sites.Op, x: Float[Array, 'b n d'], ctx: sites.Ctx) -> Float[Array, 'b d']:
    if self.is_initializing():
      f(x)  # A MAP head is not used, but its stored weights must still find their place.
    return x[:, tokens.own_tokens(ctx) :].mean(axis=1)
