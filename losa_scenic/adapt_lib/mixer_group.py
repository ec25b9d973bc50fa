"""The mixers of LoSA, a few in a row at a time, computed through their hidden units.

A mixer adds little to what it reads: y_i = y_{i-1} + U_i h_i, where h_i has r channels (or r
tokens) only. So what a later mixer sees of it, D_j U_i h_i, needs nothing of the size of y: of a
group of mixers y is read once before and written once after, by products wide enough to be quick,
and in between there are hidden units alone,

  z_i = D_i b_i + D_i y_0 + sum_{j<i} (D_i U_j) h_j + biases,  h_i = alpha_i GELU(z_i)
  y   = y_0 + sum_i U_i h_i + biases.

A mixer's h_j, once it is there, is multiplied for all later ones at once: as D_i U_j h_j where i
and j mix the same axis, else as D_i h_j, which has r channels of r tokens only, and U_j comes after
those of all j are side by side. So nothing of the size of h is ever put together on the way.

The gradient is written by hand, in the same form: G_i, that of y_i, is never made either. What is
kept for it is every z_i, every D_i h_j, and y_0 of each group; or only the last y, from which each
y_0 is had again by subtraction. Exact: only the order of sums differs from mixers one by one.

Tokens stand first, [n b d]; c below are mixers of channels (D [d r], hidden units [n b r]), t those
of tokens (D [n r], hidden units [r b d]).
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from losa_scenic.adapt_lib import side_kernel
from losa_scenic.adapt_lib.group_weights import CHANNELS, OTHER, TOKENS, Joint, Units, join
from losa_scenic.adapt_lib.mixer import Weights
from losa_scenic.adapt_lib.mixer_crossing import (
  across_alike,
  add,
  down_across,
  through_hidden,
  up_across,
)
from losa_scenic.adapt_lib.token_products import (
  along_channels_gradient,
  along_tokens,
  along_tokens_gradient,
  wide,
)
from losa_scenic.common_lib.activations import GELU
from losa_scenic.common_lib.types import Array, DType


class Form(NamedTuple):
  """How a group of mixers is computed: what are no arrays.

  Attributes:
    axes: of each mixer, `CHANNELS` or `TOKENS`.
    gelu: 'tanh' or 'erf'.
    wanted: how many leading tokens of y after the group are made; None for all.
    reversible: whether y before the group is had again from that after it.
    fused: whether y is changed by `side_kernel`, where mixers of both axes change all of it.
  """

  axes: tuple[str, ...]
  gelu: str
  wanted: int | None = None
  reversible: bool = False
  fused: bool = False


def forward(
  form: Form,
  weights: Mapping[str, Weights],
  y: Float[Array, 'n b d'],
  taps: Sequence[Array],
) -> tuple[Float[Array, 'm b d'], 'Kept']:
  """y after a group of mixers, and what is kept for its gradient.

  Args:
    form: of the group.
    weights: of each axis, those of its mixers in turn, with a leading axis, float32.
    y: before the group; its dtype is that of all products.
    taps: D_i b_i, what each mixer reads of the backbone: [n b r] or [r b d].

  Returns:
    What is wanted of y after it, and what `backward` needs.
  """
  axes, units, w = form.axes, _units(form, weights), _cast(join(form.axes, weights), y.dtype)
  first = {}
  if CHANNELS in w:
    first[CHANNELS] = y @ w[CHANNELS].down + w[CHANNELS].z_bias
  if TOKENS in w:
    first[TOKENS] = along_tokens(w[TOKENS].down, y) + w[TOKENS].z_bias
  zs, alphas = units.own(first), _alphas(axes, weights, y.dtype)
  pieces: list[list[Array]] = [[] for _ in axes]
  crossed: list[Array | None] = []
  hs: list[Array] = []
  for i, axis in enumerate(axes):
    zs[i] += taps[i]
    crossed.append(units.joined(pieces[i], OTHER[axis]) if pieces[i] else None)
    if crossed[i] is not None:
      zs[i] += up_across(w, units, i, crossed[i])
    hs.append(alphas[i] * GELU[form.gelu](zs[i]))
    if alike := units.of(axis, i + 1):
      add(zs, units.parts(across_alike(w, units, i, alike, hs[i]), alike))
    if others := units.of(OTHER[axis], i + 1):
      for k, piece in units.parts(down_across(w, units, others, hs[i]), others):
        pieces[k].append(piece)
  return _changed(form, y[: form.wanted], w, units.by_axis(hs)), Kept(zs, crossed)


class Kept(NamedTuple):
  """What is kept of a group for its gradient.

  Attributes:
    zs: of each mixer, [n b r] or [r b d].
    crossed: what each mixer sees of those before it of the other axis. Of that the narrow side,
      D_i h_j for mixers i and j of different axes: [r b r], side by side; None without any.
  """

  zs: list[Array]
  crossed: list[Array | None]


def _changed(
  form: Form, y: Array, w: Mapping[str, Joint], h: Mapping[str, Array], sign: int = 1
) -> Array:
  """The first tokens of y, or all, with what hidden units add to them, or without it."""
  m = len(y)
  if form.fused and len(w) == 2 and m == len(h[CHANNELS]):
    c, t = w[CHANNELS], w[TOKENS]
    biases = sign * c.y_bias, sign * t.y_bias
    return side_kernel.widen(y, sign * h[CHANNELS], c.up, sign * h[TOKENS], t.up, biases)
  if CHANNELS in w:
    y += sign * (h[CHANNELS][:m] @ w[CHANNELS].up + w[CHANNELS].y_bias)
  if TOKENS in w:
    y += sign * (along_tokens(w[TOKENS].up[:m], h[TOKENS]) + w[TOKENS].y_bias[:m])
  return y


def backward(
  form: Form,
  weights: Mapping[str, Weights],
  y: Float[Array, 'n b d'],
  kept: Kept,
  dy: Float[Array, 'm b d'],
) -> tuple[dict[str, Weights], list[Array], Float[Array, 'n b d'], Float[Array, 'n b d']]:
  """The gradient of `forward`.

  Args:
    form: of the group.
    weights: as for `forward`.
    y: before the group, or if it is reversible and made all tokens, that after it.
    kept: what `forward` gave.
    dy: the gradient of what it made of y.

  Returns:
    Gradients of the weights (float32) and of the taps, y before the group, and its gradient.
  """
  axes, n, m = form.axes, len(y), len(dy)
  # Made again: kept, what all groups have would be as much as their weights.
  joint, pull = jax.vjp(functools.partial(join, axes), weights)
  units, w = _units(form, weights), _cast(joint, y.dtype)
  active, slopes = zip(*(_value_and_slope(form.gelu, z) for z in kept.zs), strict=True)
  alphas = _alphas(axes, weights, y.dtype)
  hs = [alpha * a for alpha, a in zip(alphas, active, strict=True)]
  h = units.by_axis(hs)
  if form.reversible and m == n:
    y = _changed(form, y, w, h, -1)
  first = {}
  if CHANNELS in w:
    first[CHANNELS] = _padded(dy @ w[CHANNELS].up.T, n)
  if TOKENS in w:
    first[TOKENS] = along_tokens(w[TOKENS].up[:m].T, dy)
  dhs, dzs, crossing = through_hidden(units, w, hs, alphas, slopes, kept.crossed, units.own(first))
  dz = units.by_axis(dzs)
  of_joint = {}
  if CHANNELS in w:
    of_joint[CHANNELS] = Joint(
      down=along_channels_gradient(y, dz[CHANNELS]) + crossing.down[CHANNELS],
      up=along_channels_gradient(h[CHANNELS][:m], dy) + crossing.up[CHANNELS],
      cross=_later(along_channels_gradient(h[CHANNELS], dz[CHANNELS]), units.rank),
      z_bias=_sum_to(dz[CHANNELS], joint[CHANNELS].z_bias.shape),
      y_bias=_sum_to(dy, joint[CHANNELS].y_bias.shape),
    )
  if TOKENS in w:
    of_joint[TOKENS] = Joint(
      down=along_tokens_gradient(dz[TOKENS], y) + crossing.down[TOKENS],
      up=_padded(along_tokens_gradient(dy, h[TOKENS]), n) + crossing.up[TOKENS],
      cross=_later(along_tokens_gradient(h[TOKENS], dz[TOKENS]), units.rank).T,
      z_bias=_sum_to(dz[TOKENS], joint[TOKENS].z_bias.shape),
      y_bias=_padded(_sum_to(dy, (m, 1, 1)), n),
    )
  dy = _padded(dy, n)
  if form.fused and len(w) == 2:
    c, t = w[CHANNELS].down.T, w[TOKENS].down.T
    dy = side_kernel.widen(dy, dz[CHANNELS], c, dz[TOKENS], t)
  else:
    if CHANNELS in w:
      dy += dz[CHANNELS] @ w[CHANNELS].down.T
    if TOKENS in w:
      dy += along_tokens(w[TOKENS].down.T, dz[TOKENS])
  gradient = pull(of_joint)[0]
  for axis, own in gradient.items():
    of_alphas = [_sum_to(active[i] * dhs[i], ()) for i in units.of(axis)]
    gradient[axis] = own._replace(alpha=own.alpha + jnp.stack(of_alphas))
  return gradient, dzs, y, dy


def _units(form: Form, weights: Mapping[str, Weights]) -> Units:
  return Units(form.axes, next(iter(weights.values())).down.shape[-1])


def _alphas(axes: Sequence[str], weights: Mapping[str, Weights], dtype: DType) -> list[Array]:
  """That of each mixer, in turn."""
  by_axis = {axis: iter(own.alpha.astype(dtype)) for axis, own in weights.items()}
  return [next(by_axis[axis]) for axis in axes]


def _cast(joint: Mapping[str, Joint], dtype: DType) -> dict[str, Joint]:
  return jax.tree.map(lambda x: x.astype(dtype), dict(joint))


def _value_and_slope(gelu: str, z: Array) -> tuple[Array, Array]:
  value, pull = jax.vjp(GELU[gelu], z)
  return value, pull(jnp.ones_like(z))[0]


def _padded(x: Array, n: int) -> Array:
  """n rows: those of x, and zeros."""
  return x if len(x) == n else jnp.pad(x, ((0, n - len(x)), *((0, 0),) * (x.ndim - 1)))


def _later(x: Float[Array, 'R R'], rank: int) -> Float[Array, 'R R']:
  """Zero but where the mixer of a row comes before that of a column."""
  mixer = np.arange(len(x)) // rank
  return jnp.where(mixer[:, None] < mixer, x, 0.0)


def _sum_to(x: Array, shape: tuple[int, ...]) -> Array:
  """The sum over all axes that were broadcast."""
  sizes = (1,) * (x.ndim - len(shape)) + shape
  axes = tuple(i for i, size in enumerate(sizes) if size == 1)
  return x.sum(axes, dtype=wide(x.dtype)).reshape(shape)
