"""What the mixers of a group see of each other: see `mixer_group`.

Arrays of units are [n b r] of mixers of channels, [r b d] of mixers of tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from losa_scenic.adapt_lib.group_weights import CHANNELS, OTHER, TOKENS, Joint, Units
from losa_scenic.adapt_lib.token_products import (
  along_channels_gradient,
  along_tokens,
  along_tokens_gradient,
)
from losa_scenic.common_lib.types import Array


def across_alike(w: Mapping[str, Joint], units: Units, i: int, later: list[int], h: Array) -> Array:
  """D U_i h_i, as later mixers of the axis of mixer i see it."""
  own, columns, cross = units.columns([i]), units.columns(later), w[units.axes[i]].cross
  if units.axes[i] == CHANNELS:
    return h @ cross[own, columns]
  return along_tokens(cross[columns, own], h)


def down_across(w: Mapping[str, Joint], units: Units, later: list[int], h: Array) -> Array:
  """D h for later mixers of the other axis than that of h."""
  columns, down = units.columns(later), w[units.axes[later[0]]].down
  if units.axes[later[0]] == CHANNELS:
    return h @ down[:, columns]
  return along_tokens(down[columns], h)


def up_across(w: Mapping[str, Joint], units: Units, i: int, crossed: Any) -> Array:
  """What mixer i sees of those before it of the other axis, from D_i h of them."""
  other = OTHER[units.axes[i]]
  up, columns = w[other].up, units.before(other, i)
  if other == TOKENS:
    return along_tokens(up[:, columns], crossed)
  return crossed @ up[columns]


class Crossing(NamedTuple):
  """Gradients of weights that mixers of different axes see each other through, by axis.

  Of `Joint.down` and `Joint.up`; 0.0 where there are none.
  """

  down: dict[str, Any]
  up: dict[str, Any]


def through_hidden(
  units: Units,
  w: Mapping[str, Joint],
  hs: Sequence[Array],
  alphas: Sequence[Array],
  slopes: Sequence[Array],
  crossed: Sequence[Array | None],
  dhs: list[Array],
) -> tuple[list[Array], list[Array], Crossing]:
  """The gradients of all h and z, from what each h has from y alone; last mixer first."""
  axes = units.axes
  pieces: list[list[Array]] = [[] for _ in axes]
  dzs: list[Any] = [None] * len(axes)
  downs: dict[str, Any] = dict.fromkeys(w, 0.0)
  ups: dict[str, Any] = dict.fromkeys(w, 0.0)
  for i in reversed(range(len(axes))):
    axis, other = axes[i], OTHER[axes[i]]
    if pieces[i]:
      d = units.joined(pieces[i], other)
      of_down, of_h = _down_across_backward(w, units, units.of(other, i + 1), hs[i], d)
      downs[other] += _widened(of_down, w[other].down, after=True)
      dhs[i] += of_h
    dzs[i] = alphas[i] * dhs[i] * slopes[i]
    if alike := units.of(axis, 0, i):
      add(dhs, units.parts(_across_alike_backward(w, units, i, alike, dzs[i]), alike))
    if others := units.of(other, 0, i):
      of_up, d = _up_across_backward(w, units, i, crossed[i], dzs[i])
      ups[other] += _widened(of_up, w[other].up, after=False)
      for k, piece in units.parts(d, others):
        pieces[k].insert(0, piece)
  return dhs, dzs, Crossing(downs, ups)


def _across_alike_backward(
  w: Mapping[str, Joint], units: Units, i: int, before: list[int], dz: Array
) -> Array:
  """The gradient of the h of mixers before mixer i, of its axis; `cross` gets its own elsewhere."""
  own, earlier, cross = units.columns([i]), units.columns(before), w[units.axes[i]].cross
  if units.axes[i] == CHANNELS:
    return dz @ cross[earlier, own].T
  return along_tokens(cross[own, earlier].T, dz)


def _down_across_backward(
  w: Mapping[str, Joint], units: Units, later: list[int], h: Array, d: Array
) -> tuple[Array, Array]:
  """The gradients of D of the later mixers, and of h, in `down_across`."""
  columns, down = units.columns(later), w[units.axes[later[0]]].down
  if units.axes[later[0]] == CHANNELS:
    return along_channels_gradient(h, d), d @ down[:, columns].T
  return along_tokens_gradient(d, h), along_tokens(down[columns].T, d)


def _up_across_backward(
  w: Mapping[str, Joint], units: Units, i: int, crossed: Any, dz: Array
) -> tuple[Array, Array]:
  """The gradients of U of the mixers before, and of `crossed`, in `up_across`."""
  other = OTHER[units.axes[i]]
  up, columns = w[other].up, units.before(other, i)
  if other == TOKENS:
    return along_tokens_gradient(dz, crossed), along_tokens(up[:, columns].T, dz)
  return along_channels_gradient(crossed, dz), dz @ up[columns].T


def _widened(x: Array, like: Array, *, after: bool) -> Array:
  """A matrix in the last columns and rows of one of another's shape, or in the first ones."""
  more = [size - own for size, own in zip(like.shape, x.shape, strict=True)]
  return jnp.pad(x, [(k, 0) if after else (0, k) for k in more])


def add(sums: list[Any], parts: list[tuple[int, Array]]) -> None:
  for i, part in parts:
    sums[i] += part
