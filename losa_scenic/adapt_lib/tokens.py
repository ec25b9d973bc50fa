"""Modules that add learned tokens, or learned keys and values, at sites.

New tokens go to the end of the sequence. The order of tokens means nothing to attention, and so the
model's own tokens keep their places, whatever is added.

Prompts: Jia et al. 2022, Visual Prompt Tuning, https://arxiv.org/abs/2203.12119.
Prefix: Li, Liang 2021, Prefix-Tuning, https://arxiv.org/abs/2101.00190.
"""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from losa_scenic.adapt_lib import inserts
from losa_scenic.common_lib.types import Array
from losa_scenic.model_lib.sites import Ctx, Op
from losa_scenic.model_lib.spec import BackboneSpec


def own_tokens(ctx: Ctx) -> int:
  """How many of the leading tokens are the model's own."""
  return ctx.prefix + math.prod(ctx.grid)


def vpt_init(spec: BackboneSpec) -> nn.initializers.Initializer:
  """Uniform in (-v, v), v = sqrt(6 / (values of a patch + d)), as the patch embedding of VPT."""
  return inserts.uniform(math.sqrt(6 / (3 * spec.patch**2 * spec.tubelet + spec.width)))


def xavier_init(count: int, width: int) -> nn.initializers.Initializer:
  """Xavier-uniform of a tensor [1, count, width]: uniform within sqrt(6 / (width (count + 1)))."""
  return inserts.uniform(math.sqrt(6 / (width * (count + 1))))


class Prompts(nn.Module):
  """f(concat(x, p)), and after it the prompts' positions are removed unless they stay.

  Stands at 'encoder' or 'block'. Trainable parameters: count * d.

  Attributes:
    count: number of prompts.
    init: initialiser of p [count d].
    dropout: rate, drawn for every image.
    stay: the prompts' positions stay in the sequence.
    replace: tokens that an earlier layer left at the end are removed first.
  """

  count: int
  init: nn.initializers.Initializer
  dropout: float = 0.0
  stay: bool = False
  replace: bool = False

  @nn.compact
  def __call__(self, f: Op, x: Float[Array, 'b n d'], ctx: Ctx) -> Float[Array, 'b m d']:
    p = self.param('prompts', self.init, (self.count, x.shape[-1])).astype(x.dtype)
    p = jnp.broadcast_to(p, (x.shape[0], *p.shape))
    p = inserts.dropout(self, self.dropout, p, ctx.train)
    x = x[:, : own_tokens(ctx)] if self.replace else x
    y = f(jnp.concatenate([x, p], axis=1))
    return y if self.stay else y[:, : x.shape[1]]


class Strip(nn.Module):
  """f(x) without the tokens that the layers added. Stands at 'encoder'. No parameters."""

  def __call__(self, f: Op, x: Float[Array, 'b n d'], ctx: Ctx) -> Float[Array, 'b n d']:
    return f(x)[:, : own_tokens(ctx)]


class Prefix(nn.Module):
  """Attention over [k; p_k], [v; p_v]: learned keys and values that every query sees.

  Stands at 'attend'. Trainable parameters: 2 * length * d.

  Attributes:
    length: number of keys and of values.
    init: initialiser of p_k and p_v, each [length d].
  """

  length: int
  init: nn.initializers.Initializer

  @nn.compact
  def __call__(self, f: Op, x: tuple[Any, ...], ctx: Ctx) -> Float[Array, 'b n d']:
    """`x` is (q, k, v), or (q, k, v, mask) with a mask [b|1 1 n|1 m]."""
    q, k, v, *mask = x

    def extend(name: str, own: Float[Array, 'b m d']) -> Float[Array, 'b l d']:
      p = self.param(name, self.init, (self.length, own.shape[-1])).astype(own.dtype)
      return jnp.concatenate([own, jnp.broadcast_to(p, (own.shape[0], *p.shape))], axis=1)

    seen = [
      jnp.pad(m, ((0, 0), (0, 0), (0, 0), (0, self.length)), constant_values=True) for m in mask
    ]
    return f((q, extend('keys', k), extend('values', v), *seen))
