"""The weights of a group of mixers side by side, and which of them are whose.

See `mixer_group`: [R] below are the hidden units of all mixers of one axis.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from losa_scenic.adapt_lib.mixer import Weights
from losa_scenic.common_lib.types import Array

CHANNELS, TOKENS = 'channels', 'tokens'


class Joint(NamedTuple):
  """What depends on the weights of a group alone.

  Attributes:
    down_c: [d R].
    up_c: [R d].
    cross_c: up_c down_c [R R]: what the mixers of channels see of each other.
    down_t: [R n].
    up_t: [n R].
    cross_t: down_t up_t [R R].
    biases: of each z_i: [n|1 1 r] of a mixer of channels, [r 1 d|1] of one of tokens.
    bias_c: what biases add to y, [d].
    bias_t: [n 1 1].
    alphas: scalars.
  """

  down_c: Array | None
  up_c: Array | None
  cross_c: Array | None
  down_t: Array | None
  up_t: Array | None
  cross_t: Array | None
  biases: list[Array]
  bias_c: Array
  bias_t: Array
  alphas: list[Array]


def join(axes: Sequence[str], mixers: Sequence[Weights], shape: Sequence[int]) -> Joint:
  """Puts the weights of a group side by side.

  Args:
    axes: of each mixer, `CHANNELS` or `TOKENS`.
    mixers: their weights.
    shape: (n, b, d) of what they mix.
  """
  n, _, d = shape
  by = {axis: [m for m, a in zip(mixers, axes, strict=True) if a == axis] for axis in set(axes)}
  down = {axis: jnp.concatenate([m.down for m in some], 1) for axis, some in by.items()}
  up = {axis: jnp.concatenate([m.up for m in some], 0) for axis, some in by.items()}
  bias_c, bias_t = jnp.zeros((d,), mixers[0].up.dtype), jnp.zeros((n,), mixers[0].up.dtype)
  biases, seen = [], set()
  for axis, m in zip(axes, mixers, strict=True):
    along, across = (bias_c, bias_t) if axis == CHANNELS else (bias_t, bias_c)
    other = TOKENS if axis == CHANNELS else CHANNELS
    bias = m.down_bias + along @ m.down if axis in seen else m.down_bias
    bias = bias[None]
    if other in seen:
      bias = bias + across[:, None] * m.down.sum(0)
    biases.append(bias[:, None] if axis == CHANNELS else bias.T[:, None])
    added = m.alpha * m.up_bias
    bias_c, bias_t = (bias_c + added, bias_t) if axis == CHANNELS else (bias_c, bias_t + added)
    seen.add(axis)
  c, t = CHANNELS in by, TOKENS in by
  return Joint(
    down_c=down[CHANNELS] if c else None,
    up_c=up[CHANNELS] if c else None,
    cross_c=up[CHANNELS] @ down[CHANNELS] if c else None,
    down_t=down[TOKENS].T if t else None,
    up_t=up[TOKENS].T if t else None,
    cross_t=down[TOKENS].T @ up[TOKENS].T if t else None,
    biases=biases,
    bias_c=bias_c,
    bias_t=bias_t[:, None, None],
    alphas=[m.alpha for m in mixers],
  )


class Units:
  """Which of the hidden units of a group, side by side by axis, are those of mixer i."""

  def __init__(self, axes: Sequence[str], taps: Sequence[Array]):
    self.axes = axes
    self.rank = taps[0].shape[-1] if axes[0] == CHANNELS else taps[0].shape[0]

  def columns(self, i: int) -> slice:
    """Of mixer i among those of its axis."""
    k = self.axes[:i].count(self.axes[i])
    return slice(k * self.rank, (k + 1) * self.rank)

  def before(self, i: int, axis: str) -> slice:
    """Of the mixers of an axis that come before mixer i."""
    return slice(0, self.axes[:i].count(axis) * self.rank)

  def own(self, x: Any, i: int) -> Array:
    """The part of mixer i of what all mixers of its axis have; their units are the last axis of
    mixers of channels, the first one of those of tokens."""
    return x[..., self.columns(i)] if self.axes[i] == CHANNELS else x[self.columns(i)]

  def add(self, each: list[Any], axis: str, x: Array) -> None:
    """Adds its part of x, which the first mixers of an axis have side by side, to each of them."""
    mine = [i for i, a in enumerate(self.axes) if a == axis]
    for i in mine[: x.shape[-1 if axis == CHANNELS else 0] // self.rank]:
      each[i] += self.own(x, i)

  def joined(self, each: Sequence[Array], axis: str) -> Array:
    """Side by side what mixers of one axis have, of all or of the first ones."""
    some = [x for x, a in zip(each, self.axes, strict=False) if a == axis]
    return some[0] if len(some) == 1 else jnp.concatenate(some, -1 if axis == CHANNELS else 0)
