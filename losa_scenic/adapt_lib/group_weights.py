"""The weights of a group of mixers side by side, and which of them are whose.

See `mixer_group`: [R] below are the hidden units of all mixers of one axis.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from losa_scenic.adapt_lib.mixer import Weights
from losa_scenic.common_lib.types import Array

CHANNELS, TOKENS = 'channels', 'tokens'
OTHER = {CHANNELS: TOKENS, TOKENS: CHANNELS}


class Joint(NamedTuple):
  """Of the mixers of an axis of a group: what depends on weights alone, as it meets [n b d].

  Attributes:
    down: [d R] of channels, [R n] of tokens.
    up: [R d], [n R].
    cross: what hidden units are to those of the mixers of the same axis: up down [R R], down up
      [R R].
    z_bias: what is added to z: [n|1 1 R], [R 1 d|1].
    y_bias: what is added to y: [d], [n 1 1].
  """

  down: Array
  up: Array
  cross: Array
  z_bias: Array
  y_bias: Array


def join(axes: Sequence[str], weights: Mapping[str, Weights]) -> dict[str, Joint]:
  """Puts the weights of a group side by side, by axis.

  Args:
    axes: of each mixer, `CHANNELS` or `TOKENS`.
    weights: of each axis, those of its mixers, with a leading axis [m].
  """
  added = {axis: w.alpha[:, None] * w.up_bias for axis, w in weights.items()}
  joint = {}
  for axis, w in weights.items():
    size = w.down.shape[1]
    # Columns are units, of both axes.
    down, up = jnp.swapaxes(w.down, 0, 1).reshape(size, -1), w.up.reshape(-1, size)
    z_bias = _biases(axes, axis, added, down, w.down_bias.reshape(-1))
    y_bias = added[axis].sum(0)
    if axis == CHANNELS:
      joint[axis] = Joint(down, up, up @ down, z_bias[:, None], y_bias)
    else:
      down, up = down.T, up.T
      joint[axis] = Joint(down, up, down @ up, z_bias.T[:, None], y_bias[:, None, None])
  return joint


def _biases(
  axes: Sequence[str],
  axis: str,
  added: Mapping[str, Array],
  down: Float[Array, 's R'],
  own: Float[Array, ' R'],
) -> Float[Array, 'o R']:
  """What is added to z along the other axis, if there are mixers of it: else one row.

  Their own biases, and what those of the mixers before have added to y; that is `added`, of each
  axis [mixers size]. Of sums in the gradient XLA on CPUs would make one kernel with all gradients
  of `down`, so that has matrix products alone.
  """
  rank = len(own) // axes.count(axis)
  exact = functools.partial(jnp.matmul, precision='highest')
  own = own + (_before(axes, axis, axis, rank) * exact(added[axis], down)).sum(0)
  if OTHER[axis] not in added:
    return own[None]
  others = added[OTHER[axis]]
  sums = exact(jnp.ones((len(others), len(down)), down.dtype), down)
  sums = _before(axes, OTHER[axis], axis, rank) * sums
  ones = jnp.ones((others.shape[1], 1), others.dtype)
  return exact(jnp.concatenate([ones, others.T], 1), jnp.concatenate([own[None], sums]))


def _before(axes: Sequence[str], one: str, other: str, rank: int) -> np.ndarray:
  """Whether each mixer of an axis comes before that of each unit of an axis: 1, else 0."""
  where = {axis: np.flatnonzero([own == axis for own in axes]) for axis in (one, other)}
  return np.repeat(where[one][:, None] < where[other], rank, 1).astype(np.float32)


class Units:
  """Which of the hidden units of a group, side by side by axis, are those of which mixers.

  Units are the last axis of what mixers of channels have, the first one of those of tokens.
  """

  def __init__(self, axes: Sequence[str], rank: int):
    self.axes = axes
    self.rank = rank

  def of(self, axis: str, start: int = 0, stop: int | None = None) -> list[int]:
    """The mixers of an axis among those from `start` to before `stop`."""
    return [i for i in range(len(self.axes))[start:stop] if self.axes[i] == axis]

  def columns(self, which: Sequence[int]) -> slice:
    """Of mixers of one axis that follow each other, among all of it."""
    first = self.axes[: which[0]].count(self.axes[which[0]])
    return slice(first * self.rank, (first + len(which)) * self.rank)

  def before(self, axis: str, i: int) -> slice:
    """Of the mixers of an axis that come before mixer i, among all of it."""
    return slice(0, self.axes[:i].count(axis) * self.rank)

  def parts(self, x: Array, which: Sequence[int]) -> list[tuple[int, Array]]:
    """Each of some mixers of one axis, and its part of x, which they have side by side."""
    slices = [slice(k * self.rank, (k + 1) * self.rank) for k in range(len(which))]
    return [(i, self.cut(x, self.axes[i], s)) for i, s in zip(which, slices, strict=True)]

  def cut(self, x: Array, axis: str, columns: slice) -> Array:
    """Some of the units of an axis."""
    return x[..., columns] if axis == CHANNELS else x[columns]

  def own(self, by_axis: Mapping[str, Array]) -> list[Array]:
    """What each mixer has of what all have side by side, by axis."""
    return [self.cut(by_axis[axis], axis, self.columns([i])) for i, axis in enumerate(self.axes)]

  def joined(self, values: Sequence[Array], axis: str) -> Array:
    """Side by side what some mixers of an axis have."""
    if len(values) == 1:
      return values[0]
    return jnp.concatenate(values, -1 if axis == CHANNELS else 0)

  def by_axis(self, each: Sequence[Array]) -> dict[str, Array]:
    """The inverse of `own`."""
    return {axis: self.joined([each[i] for i in self.of(axis)], axis) for axis in self.axes}
