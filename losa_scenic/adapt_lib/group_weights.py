"""The weights of a group of mixers side by side, and which of them are whose.

See `mixer_group`: [R] below are the hidden units of all mixers of one axis.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from losa_scenic.adapt_lib.mixer import Weights
from losa_scenic.common_lib.types import Array

CHANNELS, TOKENS = 'channels', 'tokens'
OTHER = {CHANNELS: TOKENS, TOKENS: CHANNELS}


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
    bias = m.down_bias + along @ m.down if axis in seen else m.down_bias
    bias = bias[None]
    if OTHER[axis] in seen:
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
  """Which of the hidden units of a group, side by side by axis, are those of which mixers.

  Units are the last axis of what mixers of channels have, the first one of those of tokens.
  """

  def __init__(self, axes: Sequence[str], taps: Sequence[Array]):
    self.axes = axes
    self.rank = taps[0].shape[-1] if axes[0] == CHANNELS else taps[0].shape[0]

  def of(self, axis: str, start: int = 0, stop: int | None = None) -> list[int]:
    """The mixers of an axis among those from `start` to before `stop`."""
    return [i for i in range(len(self.axes))[start:stop] if self.axes[i] == axis]

  def columns(self, which: Sequence[int]) -> slice:
    """Of mixers of one axis that follow each other, among all of it."""
    first = self.axes[: which[0]].count(self.axes[which[0]])
    return slice(first * self.rank, (first + len(which)) * self.rank)

  def parts(self, x: Array, which: Sequence[int]) -> list[tuple[int, Array]]:
    """Each of some mixers of one axis, and its part of x, which they have side by side."""
    slices = [slice(k * self.rank, (k + 1) * self.rank) for k in range(len(which))]
    own = [
      x[..., s] if self.axes[i] == CHANNELS else x[s] for i, s in zip(which, slices, strict=True)
    ]
    return list(zip(which, own, strict=True))

  def joined(self, values: Sequence[Array], axis: str) -> Array:
    """Side by side what some mixers of an axis have."""
    if len(values) == 1:
      return values[0]
    return jnp.concatenate(values, -1 if axis == CHANNELS else 0)
