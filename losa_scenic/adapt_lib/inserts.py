"""Modules that stand at sites. Each one's forward line is the paper's equation, `f` frozen.

Parameters are float32 and cast to the dtype of the input at use. A leaf's name says whether weight
decay applies to it: not to `*_bias`, `scale`, `shift`, `alpha`, `gate`.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from losa_scenic.common_lib import errors
from losa_scenic.common_lib.activations import ACTIVATIONS
from losa_scenic.common_lib.types import Array
from losa_scenic.model_lib.products import product
from losa_scenic.model_lib.sites import Ctx, Op

# A module `delta(x, ctx)` -> what is added: see `Delta`.
MakeDelta = Callable[[], nn.Module]
QKV = ('query', 'key', 'value')
LINEAR_SITES = (*QKV, 'out', 'fc1', 'fc2', 'gate')
# Uniform within 1 / sqrt(fan_in): PyTorch's default for the weight of a linear layer.
LINEAR_INIT = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


def targets(method: str, given: str, allowed: Sequence[str]) -> tuple[str, ...]:
  """Reads a comma list of sites: 'value,query' -> ('query', 'value').

  Args:
    method: name of the method, for errors.
    given: the list; 'qkv' is short for 'query,key,value'.
    allowed: the sites that the method can stand at; they are returned in this order, so that what
      parameters are called does not depend on the order in a config.

  Raises:
    errors.UserError: for an empty list, an unknown site, or one that is named twice.
  """
  names: list[str] = []
  for name in given.replace(' ', '').split(','):
    names += QKV if name == 'qkv' else [name]
  for name in names:
    errors.one_of(f'{method} target', name, (*allowed, 'qkv'))
  if len(set(names)) < len(names):
    raise errors.UserError(f"{method} targets '{given}' name a site twice.")
  return tuple(name for name in allowed if name in names)


def low_rank_scale(method: str, rank: int, alpha: float | None) -> float:
  """alpha / rank; 1 without an alpha. Raises `UserError` for an alpha that is not positive."""
  if alpha is not None and not 0 < alpha < float('inf'):
    raise errors.UserError(f'{method} alpha must be positive, got {alpha}.')
  return 1.0 if alpha is None else alpha / rank


_Range = tuple[str, Callable[[int | float], bool]]
_COUNT: _Range = ('at least 1', lambda value: value >= 1)
_RATE: _Range = ('in [0, 1)', lambda value: 0 <= value < 1)
_RANGES: dict[str, _Range] = {
  **dict.fromkeys(('rank', 'bottleneck', 'groups', 'prompts', 'length'), _COUNT),
  **dict.fromkeys(('dropout', 'drop_path'), _RATE),
  'scale': ('positive', lambda value: 0 < value < float('inf')),
}


def check_options(method: str, **options: int | float) -> None:
  """Raises `UserError` for the first of these options of a method that is out of its range."""
  for name, value in options.items():
    range_, holds = _RANGES[name]
    if not holds(value):
      raise errors.UserError(f'{method} {name} must be {range_}, got {value}.')


def dropout(
  module: nn.Module, rate: float, x: Array, train: bool, rng: Array | None = None
) -> Array:
  """Dropout in a compact method or a plain function of `module`: no submodule, no parameters.

  The mask is drawn anew in every call, unless `rng` is given.
  """
  if not train or rate == 0:
    return x
  rng = module.make_rng('dropout') if rng is None else rng
  keep = jax.random.bernoulli(rng, 1 - rate, x.shape)
  return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


class LowRank(nn.Module):
  """f(x) + scale * dropout(x) A B, with A [d rank], and B [rank e] = 0 at the start.

  At a linear site this is LoRA (Hu et al. 2021, section 4.1; their scale is alpha / rank). At
  'mlp' or 'pool_mlp' it is the path around the whole MLP that the LoSA paper calls LoRA on the MLP.
  Standing at several sites at once, it has one A for all of them and a B for each, `b_<site>`.
  Trainable parameters: rank * (d + sum of the e).

  Attributes:
    rank: r.
    scale: factor of the low-rank path.
    shared_down: whether it stands at several sites.
    dropout: rate, on the input of the low-rank path.
    down_init: initialiser of A.
  """

  rank: int
  scale: float = 1.0
  shared_down: bool = False
  dropout: float = 0.0
  down_init: nn.initializers.Initializer = LINEAR_INIT

  @nn.compact
  def __call__(self, f: Op, x: Array, ctx: Ctx) -> Array:
    y = f(x)
    a = self.param('a', self.down_init, (x.shape[-1], self.rank))
    name = f'b_{ctx.site}' if self.shared_down else 'b'
    b = self.param(name, nn.initializers.zeros, (self.rank, y.shape[-1]))
    x = dropout(self, self.dropout, x, ctx.train)
    hidden = self.scale * product(x, a.astype(x.dtype))
    return y + product(hidden, b.astype(x.dtype))


class Bottleneck(nn.Module):
  """act(conv(x W_d + b_d)) W_u + b_u: what an adapter adds. W_u = 0, b = 0 at the start.

  Trainable parameters: 2 d h + h + d, and those of the convolution.

  Attributes:
    hidden: h, width of the bottleneck.
    activation: a key of `ACTIVATIONS`.
    dropout: rate, after the activation.
    down_init: initialiser of W_d.
    up_init: initialiser of W_u.
    conv: makes the module `conv(hidden, ctx)` before the activation, or None for none.
  """

  hidden: int
  activation: str
  dropout: float = 0.0
  down_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
  up_init: nn.initializers.Initializer = nn.initializers.zeros
  conv: Callable[..., nn.Module] | None = None

  @nn.compact
  def __call__(self, x: Float[Array, '... d'], ctx: Ctx) -> Float[Array, '... d']:
    d, dtype = x.shape[-1], x.dtype
    down = self.param('down_kernel', self.down_init, (d, self.hidden)).astype(dtype)
    down_bias = self.param('down_bias', nn.initializers.zeros, (self.hidden,)).astype(dtype)
    up = self.param('up_kernel', self.up_init, (self.hidden, d)).astype(dtype)
    up_bias = self.param('up_bias', nn.initializers.zeros, (d,)).astype(dtype)
    x = product(x, down) + down_bias
    if self.conv is not None:
      x = self.conv(name='conv')(x, ctx)
    x = dropout(self, self.dropout, ACTIVATIONS[self.activation](x), ctx.train)
    return product(x, up) + up_bias


class Delta(nn.Module):
  """Adds something before, beside or after a frozen operation.

    before: f(x + s delta(x));  beside: f(x) + s delta(x);  after: y + s delta(y) with y = f(x)

  Attributes:
    make: makes the module `delta(x, ctx)`.
    place: 'before', 'beside' or 'after'.
    scale: s.
  """

  make: MakeDelta
  place: str
  scale: float = 1.0

  def setup(self):
    errors.one_of('place', self.place, ('before', 'beside', 'after'))
    self.delta = self.make()

  def __call__(self, f: Op, x: Array, ctx: Ctx) -> Array:
    if self.place == 'before':
      return f(x + self.scale * self.delta(x, ctx))
    y = f(x)
    return y + self.scale * self.delta(x if self.place == 'beside' else y, ctx)


def uniform(bound: float) -> nn.initializers.Initializer:
  """Initialiser: uniform in (-bound, bound)."""

  def init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


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
