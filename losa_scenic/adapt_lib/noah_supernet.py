"""NOAH's supernet: every width of the search space in one set of weights, one choice at a time.

A smaller module is made of the first columns (rows) of the largest one. The choice, an integer
array [3 L] of the prompts, LoRA's ranks and the adapters' widths of all blocks, is data and not
program: what is beyond a width is masked, so that all choices share one compiled function, and

  query, key, value   f(u) + ((u A) * [1 .. r_l]) B_f
  mlp                 z + (act(z W_d + c_d) * [1 .. h_l]) W_u + c_u [h_l > 0]
  attend              queries see only the first P of the prompts' keys and values
  block               a block with P_l = 0 leaves the prompts of the block before in their place

equals the network with exactly those widths. In training every step draws a choice: for each of
the three modules a depth, and for each of the first `depth` blocks a width; the blocks behind have
none. In evaluation the choice is the variable 'widths' of the collection 'architecture', subtree
'side', and the largest one without it.

Zhang, Zhou, Liu 2022, Neural Prompt Search, https://arxiv.org/abs/2206.04673, section 3.2; search
space as for VTAB-1K there. Trainable parameters: L (10 d + 40 d + 20 d + 10 + d).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Num

from losa_scenic.adapt_lib import inserts, tokens
from losa_scenic.adapt_lib.method import Method, Run
from losa_scenic.common_lib.activations import ACTIVATIONS
from losa_scenic.common_lib.types import Array
from losa_scenic.model_lib.products import product
from losa_scenic.model_lib.sites import Ctx, Op
from losa_scenic.model_lib.spec import BackboneSpec

MODULES = ('prompts', 'rank', 'bottleneck')  # rows of a choice
WIDTHS = (1, 5, 10)
LARGEST = max(WIDTHS)
PROMPT_INIT = nn.initializers.truncated_normal(0.02)


def depths(depth: int) -> tuple[int, ...]:
  """How many of the first blocks may have a module: quarters of all, at least one block."""
  return tuple(sorted({max(1, round(depth * quarter / 4)) for quarter in (1, 2, 3, 4)}))


def build(spec: BackboneSpec, dropout: float = 0.0) -> Method:
  """The supernet for a backbone, with `dropout` in all its modules."""
  return Method(
    inserts={
      'encoder': Slots,
      'block': functools.partial(MaskedPrompts, dropout=dropout),
      ('query', 'key', 'value'): functools.partial(MaskedLowRank, dropout=dropout),
      'attend': HidePrompts,
      'mlp': functools.partial(MaskedAdapter, dropout=dropout),
    },
    side=functools.partial(Choice, depth=spec.depth),
    adds_tokens=True,
    exact_at_init=False,
  )


def draw(key: Array, depth: int) -> Int[Array, '3 depth']:
  """A random choice: uniform over depths, then over the widths of each block within."""
  of_depth, of_width = jax.random.split(key)
  last = jax.random.choice(of_depth, jnp.asarray(depths(depth)), (len(MODULES), 1))
  widths = jax.random.choice(of_width, jnp.asarray(WIDTHS), (len(MODULES), depth))
  return jnp.where(jnp.arange(depth) < last, widths, 0)


def signals(widths: Int[Array, '3 depth']) -> dict[str, Bool[Array, 'depth ...']]:
  """What every layer is told: masks [depth LARGEST], and whether it brings prompts [depth].

  'prompts' masks the slots that hold a prompt, be it an earlier layer's.
  """

  def carry(before: Array, count: Array) -> tuple[Array, Array]:
    now = jnp.where(count > 0, count, before)
    return now, now

  prompts, rank, bottleneck = widths
  _, visible = jax.lax.scan(carry, jnp.zeros_like(prompts[0]), prompts)
  mask = lambda count: jnp.arange(LARGEST) < count[:, None]  # noqa: E731
  return {
    'prompts': mask(visible),
    'fresh': prompts > 0,
    'rank': mask(rank),
    'bottleneck': mask(bottleneck),
  }


class Choice(nn.Module):
  """Tells the layers how wide to be. No parameters.

  Attributes:
    depth: L.
  """

  depth: int

  @nn.compact
  def __call__(self, run: Run, inputs: Num[Array, 'b *thw c'] | None, *, train: bool) -> Array:
    if train:
      widths = draw(self.make_rng('dropout'), self.depth)
    elif self.has_variable('architecture', 'widths'):
      widths = self.get_variable('architecture', 'widths')
    else:
      widths = jnp.full((len(MODULES), self.depth), LARGEST)
    encoded = run.encode(inputs, per_layer=signals(widths), train=train)
    return run.features(encoded.tokens, train=train)


class Slots(nn.Module):
  """f(concat(x, 0)) without the slots, which the layers fill with prompts. No parameters."""

  def __call__(self, f: Op, x: Float[Array, 'b n d'], ctx: Ctx) -> Float[Array, 'b n d']:
    return f(jnp.pad(x, ((0, 0), (0, LARGEST), (0, 0))))[:, : x.shape[1]]


class MaskedPrompts(nn.Module):
  """f(concat(x, p)): the slots take this layer's prompts if it has any.

  Attributes:
    dropout: rate, drawn for every image.
  """

  dropout: float = 0.0

  @nn.compact
  def __call__(self, f: Op, x: Float[Array, 'b m d'], ctx: Ctx) -> Float[Array, 'b m d']:
    p = self.param('prompts', PROMPT_INIT, (LARGEST, x.shape[-1])).astype(x.dtype)
    n = tokens.own_tokens(ctx)
    p = jnp.broadcast_to(p, x[:, n:].shape)
    p = inserts.dropout(self, self.dropout, p, ctx.train)
    return f(jnp.concatenate([x[:, :n], jnp.where(_told(ctx)['fresh'], p, x[:, n:])], axis=1))


class HidePrompts(nn.Module):
  """Attention that does not see the slots without a prompt. No parameters."""

  def __call__(self, f: Op, x: tuple[Any, ...], ctx: Ctx) -> Float[Array, 'b m d']:
    q, k, v, *mask = x
    n = tokens.own_tokens(ctx)
    seen = jnp.ones((1, 1, 1, k.shape[1]), bool)
    seen = seen.at[..., n : n + LARGEST].set(_told(ctx)['prompts'])
    return f((q, k, v, seen & mask[0] if mask else seen))


class MaskedLowRank(nn.Module):
  """f(x) + ((x A) * mask) B, with one A for all sites and a B for each.

  Attributes:
    dropout: rate, on the input of the low-rank path.
  """

  dropout: float = 0.0

  @nn.compact
  def __call__(self, f: Op, x: Float[Array, 'b m d'], ctx: Ctx) -> Float[Array, 'b m d']:
    y = f(x)
    a = self.param('a', inserts.LINEAR_INIT, (x.shape[-1], LARGEST)).astype(x.dtype)
    b = self.param(f'b_{ctx.site}', nn.initializers.zeros, (LARGEST, y.shape[-1])).astype(x.dtype)
    x = inserts.dropout(self, self.dropout, x, ctx.train)
    return y + product(product(x, a) * _told(ctx)['rank'].astype(x.dtype), b)


class MaskedAdapter(nn.Module):
  """z + (act(z W_d + c_d) * mask) W_u + c_u with z = f(x); z alone where nothing is unmasked.

  Attributes:
    dropout: rate, after the activation.
  """

  dropout: float = 0.0

  @nn.compact
  def __call__(self, f: Op, x: Float[Array, 'b m d'], ctx: Ctx) -> Float[Array, 'b m d']:
    z = f(x)
    d, zeros = z.shape[-1], nn.initializers.zeros
    leaf = lambda *args: self.param(*args).astype(z.dtype)  # noqa: E731
    down = leaf('down_kernel', nn.initializers.xavier_uniform(), (d, LARGEST))
    hidden = ACTIVATIONS['quick_gelu'](product(z, down) + leaf('down_bias', zeros, (LARGEST,)))
    hidden = inserts.dropout(self, self.dropout, hidden, ctx.train)
    mask = _told(ctx)['bottleneck'].astype(z.dtype)
    added = product(hidden * mask, leaf('up_kernel', zeros, (LARGEST, d)))
    return z + added + mask[0] * leaf('up_bias', zeros, (d,))


def _told(ctx: Ctx) -> Any:
  """This layer's part of `signals`."""
  return ctx.layer
