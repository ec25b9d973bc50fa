"""DTL and DTL+: a low-rank side stream that meets the backbone again in its later blocks only.

With x_0 the embedded tokens, h_0 = 0 and blocks l = 1..L,

  h_l = h_{l-1} + x_{l-1} A_l B_l                          A_l [d r], B_l [r d], no bias, no norm
  x_l = block_l(x_{l-1}) + C(phi(h_l)) if l >= M, else block_l(x_{l-1})
  phi(t) = t sigmoid(beta t)

C is the identity (DTL), or one depthwise k x k convolution without bias over the token grid that
all blocks from M on share (DTL+; prefix tokens pass it unchanged). Before block M nothing that
trains enters x, so no gradient enters the first M blocks: of those only their inputs are kept,
which the gradients of A need.

Fu, Zhu, Wu: DTL: Disentangled Transfer Learning for Visual Recognition, AAAI 2024,
https://arxiv.org/abs/2312.07856, section 3; M, beta and the convolution as released at
https://github.com/heekhero/DTL. Trainable parameters: 2 d r L + d k^2 (k = 0 for DTL).

A is uniform in +-1/sqrt(d), the kernel of C in +-1/k, B = 0: the start is exactly the frozen model.
Deviations: the paper pools by LN_f(mean of the patch tokens), which is option pool='mean'; the
default is the backbone's own pooling, so that methods compare. No drop-path on the backbone. Other
depths than 12 take M = round(7 L / 12) (our reading); on clips C runs over each frame (ours, too).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from losa_scenic.adapt_lib import convolutions, inserts
from losa_scenic.adapt_lib.method import Method
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Array
from losa_scenic.model_lib import sites
from losa_scenic.model_lib.products import product
from losa_scenic.model_lib.sites import Ctx, Op
from losa_scenic.model_lib.spec import BackboneSpec

KERNELS = (0, 3, 4, 5)
POOLS = ('backbone', 'mean')


def build(
  spec: BackboneSpec,
  *,
  rank: int = 2,
  first_block: int | None = None,
  beta: float = 100.0,
  kernel: int = 0,
  pool: str = 'backbone',
) -> Method:
  """DTL for a backbone.

  Args:
    spec: the backbone.
    rank: r, at least 1 (2 in the released scripts).
    first_block: M in 1..L, the first block after which the side stream is added; round(7 L / 12)
      when not given (7 of 12 in the released scripts).
    beta: slope of phi, above 0 (100 in the released scripts).
    kernel: k of DTL+ (3, 4 or 5, chosen by task in the released scripts), or 0 for DTL.
    pool: 'backbone' (its own pooling) or 'mean' (mean of the patch tokens, then the final norm:
      the paper's, which leaves out class token and MAP head).

  Raises:
    errors.UserError: for a value out of range.
  """
  first = (14 * spec.depth + 12) // 24 if first_block is None else first_block
  if rank < 1:
    raise errors.UserError(f'DTL rank must be at least 1, got {rank}.')
  if not 1 <= first <= spec.depth:
    raise errors.UserError(f'DTL first_block must be in 1..{spec.depth}, got {first}.')
  if not 0 < beta < float('inf'):
    raise errors.UserError(f'DTL beta must be positive, got {beta}.')
  if kernel not in KERNELS:
    raise errors.UserError(f'DTL kernel must be one of {KERNELS} (0: no convolution): {kernel}.')
  errors.one_of('DTL pool', pool, POOLS)
  last = spec.depth - 1

  def make(i: int) -> sites.MakeInsert:
    if i < first - 1:
      return functools.partial(KeepInput, inputs=i)
    inputs, starts = (first, True) if i == first - 1 else (1, False)
    return functools.partial(SideStream, rank, inputs, starts, i == last, beta, bool(kernel))

  table: dict[sites.Where, sites.MakeInsert | sites.PerLayer] = {'block': sites.PerLayer(make)}
  if pool == 'mean':
    at = 'norm' if spec.final_norm == 'tokens' else 'pool'
    table['norm', 'pool'] = functools.partial(MeanThenNorm, at)
  return Method(
    inserts=table,
    shared=functools.partial(Depthwise, kernel, spec.width) if kernel else None,
    unrolled=True,
    first=first,
    adds_tokens=True,
    exact_at_init=pool == 'backbone',
  )


class KeepInput(nn.Module):
  """Before block M: [x_i, x_0 .. x_{i-1}] -> [x_{i+1}, x_0 .. x_i], along the token axis.

  The low-rank sums of the early blocks are taken at block M. Taken here, they would travel in one
  array with x, and its gradient would run through the early blocks.

  Attributes:
    inputs: i.
  """

  inputs: int

  @nn.compact
  def __call__(self, f: Op, x: Float[Array, 'b n d'], ctx: Ctx) -> Float[Array, 'b m d']:
    x, *earlier = jnp.split(x, self.inputs + 1, axis=1)
    return jnp.concatenate([f(x), *earlier, x], axis=1)


class SideStream(nn.Module):
  """From block M on: adds to h, adds C(phi(h)) to the block's output, hands on [x, h].

  Attributes:
    rank: r.
    inputs: how many blocks' inputs are added to h here: M at block M, 1 after it.
    starts: whether h begins here, the earlier inputs being in its place.
    ends: whether this is the last block, which hands on x alone.
    beta: slope of phi.
    convolves: whether `ctx.shared` is the kernel of C.
  """

  rank: int
  inputs: int
  starts: bool
  ends: bool
  beta: float = 100.0
  convolves: bool = False

  @nn.compact
  def __call__(self, f: Op, x: Float[Array, 'b n d'], ctx: Ctx) -> Float[Array, 'b m d']:
    d, dtype = x.shape[-1], x.dtype
    shape = (self.inputs, d, self.rank)
    a = self.param('a', inserts.uniform(d**-0.5), shape).astype(dtype)
    b = self.param('b', nn.initializers.zeros, (self.inputs, self.rank, d)).astype(dtype)
    x, *rest = jnp.split(x, self.inputs if self.starts else 2, axis=1)
    read = [*rest, x] if self.starts else [x]
    h = sum(
      (product(product(u, a[i]), b[i]) for i, u in enumerate(read)),
      start=0 if self.starts else rest[0],
    )
    active = h * jax.nn.sigmoid(self.beta * h)
    x = f(x) + (convolve(active, ctx.shared, ctx) if self.convolves else active)
    return x if self.ends else jnp.concatenate([x, h], axis=1)


class Depthwise(nn.Module):
  """The kernel of C.

  Attributes:
    kernel: k.
    width: d.
  """

  kernel: int
  width: int

  @nn.compact
  def __call__(self) -> Float[Array, 'k k d']:
    shape = (self.kernel, self.kernel, self.width)
    return self.param('conv_kernel', inserts.uniform(1 / self.kernel), shape)


def convolve(x: Float[Array, 'b n d'], kernel: Any, ctx: Ctx) -> Float[Array, 'b n d']:
  """Depthwise convolution, kernel [k k d], of the grid's tokens frame by frame; same size."""
  prefix, grid, end = ctx.split(x)
  y = convolutions.depthwise(grid, kernel[None])
  return jnp.concatenate([prefix, y.reshape(x.shape[0], -1, x.shape[-1]), end], axis=1)


class MeanThenNorm(nn.Module):
  """Features f(mean of the grid's tokens), f being the final norm. Stands at 'norm' and 'pool'.

  Attributes:
    at: where the mean is taken: 'norm' if that comes before the pooling, else 'pool'.
  """

  at: str

  @nn.compact
  def __call__(self, f: Op, x: Float[Array, 'b n d'], ctx: Ctx) -> Float[Array, 'b ...']:
    if ctx.site == 'pool' and self.is_initializing():
      f(x)  # A MAP head is not used, but its stored weights must still find their place.
    if ctx.site != self.at:
      return x[:, 0] if ctx.site == 'pool' else f(x)  # Here all tokens are the same.
    _, grid, _ = ctx.split(x)
    mean = grid.mean(axis=(1, 2, 3))
    return jnp.broadcast_to(f(mean[:, None]), x.shape) if ctx.site == 'norm' else mean
