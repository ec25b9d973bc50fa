"""Modules that stand at sites. Each one's forward line is the paper's equation, `f` frozen.

Parameters are float32 and cast to the dtype of the input at use.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from losa_scenic.common_lib.types import Array
from losa_scenic.model_lib.sites import Ctx, Op


class LowRank(nn.Module):
  """f(x) + scale * (x A) B, with A [d rank] and B [rank e] = 0 at the start.

  At a linear site this is LoRA (Hu et al. 2021, section 4.1; their scale is alpha / rank). At
  'mlp' or 'pool_mlp' it is the path around the whole MLP that the LoSA paper calls LoRA on the MLP.
  Trainable parameters: rank * (d + e).

  Attributes:
    rank: r.
    scale: factor of the low-rank path.
  """

  rank: int
  scale: float = 1.0

  @nn.compact
  def __call__(self, f: Op, x: Array, ctx: Ctx) -> Array:
    del ctx
    y = f(x)
    a = self.param('a', nn.initializers.he_uniform(), (x.shape[-1], self.rank))
    b = self.param('b', nn.initializers.zeros, (self.rank, y.shape[-1]))
    return y + self.scale * (x @ a.astype(x.dtype)) @ b.astype(x.dtype)


class TokenDropout(nn.Module):
  """f on a random subset of the tokens in training, and on all of them otherwise.

  Stands at 'encoder'. Prefix tokens always stay; of the others every image keeps its own random
  share, in order. PatchDropout (Liu et al. 2022, https://arxiv.org/abs/2208.07220, section 3).
  No parameters.

  Attributes:
    keep: share of the grid tokens that stay, in (0, 1]; at least one does.
  """

  keep: float

  @nn.compact
  def __call__(self, f: Op, x: Array, ctx: Ctx) -> Array:
    if not ctx.train:
      return f(x)
    prefix, grid = x[:, : ctx.prefix], x[:, ctx.prefix :]
    b, n, _ = grid.shape
    score = jax.random.uniform(self.make_rng('dropout'), (b, n))
    _, kept = jax.lax.top_k(score, max(1, round(self.keep * n)))
    grid = jnp.take_along_axis(grid, jnp.sort(kept, axis=1)[:, :, None], axis=1)
    return f(jnp.concatenate([prefix, grid], axis=1))
