"""The mixers of LoSA, a few in a row at a time, computed through their hidden units.

A mixer adds little to what it reads: y_i = y_{i-1} + U_i h_i, where h_i has r channels (or r
tokens) only. So what a later mixer sees of it, D_j U_i h_i, needs nothing of the size of y: of a
group of mixers y is read once before and written once after, by products wide enough to be quick,
and in between there are hidden units alone,

  z_i = D_i b_i + D_i y_0 + sum_{j<i} (D_i U_j) h_j + biases,  h_i = alpha_i GELU(z_i)
  y   = y_0 + sum_i U_i h_i + biases.

The gradient is written by hand, in the same form: G_i, that of y_i, is never made either. What is
kept for it is every z_i, and y_0 of each group; or only the last y, from which each y_0 is had
again by subtraction. Exact: only the order of sums differs from mixers one by one.

Tokens stand first, [n b d]; c below are mixers of channels (D [d r], hidden units [n b r]), t those
of tokens (D [n r], hidden units [r b d]).
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from losa_scenic.adapt_lib.group_weights import CHANNELS, TOKENS, Joint, Units, join
from losa_scenic.adapt_lib.mixer import Weights
from losa_scenic.adapt_lib.token_products import (
  along_channels_gradient,
  along_tokens,
  along_tokens_gradient,
  wide,
)
from losa_scenic.common_lib.activations import GELU
from losa_scenic.common_lib.types import Array, DType


class _Form(NamedTuple):
  """How mixers are computed; the arguments of `mix` that are no arrays."""

  axes: tuple[str, ...]
  gelu: str
  size: int
  wanted: int | None
  reversible: bool

  def groups(self) -> list[tuple['_Form', slice]]:
    """Of each group: its own form, and which mixers it has."""
    slices = [slice(i, i + self.size) for i in range(0, len(self.axes), self.size)]
    groups = [(self._replace(axes=self.axes[some], wanted=None), some) for some in slices]
    last, some = groups[-1]
    return [*groups[:-1], (last._replace(wanted=self.wanted), some)]


def mix(
  axes: Sequence[str],
  mixers: Sequence[Weights],
  taps: Sequence[Array],
  y: Float[Array, 'n b d'],
  gelu: str,
  size: int,
  wanted: int | None = None,
  *,
  reversible: bool = False,
) -> Float[Array, 'm b d']:
  """y_i = g_i(b_i + y_{i-1}) + y_{i-1} for mixers in a row.

  Args:
    axes: of each mixer, `CHANNELS` or `TOKENS`.
    mixers: their weights, float32.
    taps: D_i b_i, what each reads of the backbone: [n b r] or [r b d].
    y: y_0.
    gelu: 'tanh' or 'erf'.
    size: mixers of a group.
    wanted: how many leading tokens of the last y are; None for all. The last group makes no others.
    reversible: keep no y but the last one for the backward pass.

  Returns:
    Those tokens of y after the last mixer, in the dtype of y, which is that of all products.
  """
  return _mix(_Form(tuple(axes), gelu, size, wanted, reversible), list(mixers), y, list(taps))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix(form: _Form, mixers: list[Weights], y: Array, taps: list[Array]) -> Array:
  return _forward(form, mixers, y, taps)[0]


def _forward(form: _Form, mixers: list[Weights], y: Array, taps: list[Array]) -> tuple[Array, Any]:
  starts, zs = [], []
  for group, some in form.groups():
    starts.append(y)
    y, own = _group(group, mixers[some], y, taps[some])
    zs += own
  if form.reversible:
    starts = starts[-1:] if len(y) < len(starts[-1]) else [y]
  return y, (mixers, starts, zs)


def _backward(form: _Form, kept: Any, dy: Array) -> tuple[list[Weights], Array, list[Array]]:
  mixers, starts, zs = kept
  gradients: list[Weights] = []
  dzs: list[Array] = []
  y = starts[-1]
  for k, (group, some) in reversed(list(enumerate(form.groups()))):
    if not form.reversible:
      y = starts[k]
    # One group after the other: nothing of it is made before, and nothing of size y is left after.
    own, y, own_zs, dy = jax.lax.optimization_barrier((mixers[some], y, zs[some], dy))
    of_mixers, of_taps, y, dy = _group_backward(group, own, y, own_zs, dy)
    if k:
      y, dy, of_mixers, of_taps = jax.lax.optimization_barrier((y, dy, of_mixers, of_taps))
    else:
      # y_0 is often frozen. Its gradient is then not made, unless a barrier needs it.
      of_mixers, of_taps = jax.lax.optimization_barrier((of_mixers, of_taps))
    gradients, dzs = of_mixers + gradients, of_taps + dzs
  return gradients, dy, dzs


_mix.defvjp(_forward, _backward)


def _group(
  form: _Form, mixers: list[Weights], y: Array, taps: list[Array]
) -> tuple[Array, list[Array]]:
  """What is wanted of y after a group, and its z."""
  axes = form.axes
  units, w = Units(axes, taps), _cast(join(axes, mixers, y.shape), y.dtype)
  seen = {}
  if CHANNELS in axes:
    seen[CHANNELS] = y @ w.down_c
  if TOKENS in axes:
    seen[TOKENS] = along_tokens(w.down_t, y)
  zs: list[Array] = []
  hs: list[Array] = []
  for i, axis in enumerate(axes):
    z = units.own(seen[axis], i) + taps[i] + w.biases[i]
    for other in _kinds(axes[:i]):
      z += _across(w, units, i, other, units.joined(hs, other))
    zs.append(z)
    hs.append(w.alphas[i] * GELU[form.gelu](z))
  h = {axis: units.joined(hs, axis) for axis in _kinds(axes)}
  y = y[: form.wanted]
  for one in _added(w, h, form.wanted):
    y += one
  return y, zs


def _added(w: Any, h: Mapping[str, Array], m: int | None) -> list[Array]:
  """What hidden units add to the first m tokens of y, or to all."""
  terms = []
  if CHANNELS in h:
    terms.append(h[CHANNELS][:m] @ w.up_c + w.bias_c)
  if TOKENS in h:
    terms.append(along_tokens(w.up_t[:m], h[TOKENS]) + w.bias_t[:m])
  return terms


def _across(w: Any, units: Units, i: int, axis: str, h: Array) -> Array:
  """D_i U h: what mixer i sees of the hidden units h of the mixers of an axis before it."""
  before = units.before(i, axis)
  if axis == units.axes[i]:
    if axis == CHANNELS:
      return h @ w.cross_c[before, units.columns(i)]
    return along_tokens(w.cross_t[units.columns(i), before], h)
  if axis == CHANNELS:
    return along_tokens(units.own(w.down_t, i), h) @ w.up_c[before]
  return along_tokens(w.up_t[:, before], h @ units.own(w.down_c, i))


def _group_backward(
  form: _Form, mixers: list[Weights], y: Array, zs: list[Array], dy: Array
) -> tuple[list[Weights], list[Array], Array, Array]:
  """Gradients of the weights and of the taps, y before the group, and its gradient.

  `y` is that before the group, or if it is reversed that after it; `dy` of the tokens wanted.
  """
  axes, n, m = form.axes, len(y), len(dy)
  # Made again: kept, what all groups have would be as much as their weights.
  joint, pull = jax.vjp(functools.partial(join, axes, shape=y.shape), mixers)
  units, w = Units(axes, zs), _cast(joint, y.dtype)
  gradient: dict[str, Any] = jax.tree.map(jnp.zeros_like, joint)._asdict()
  active, slopes = zip(*(_value_and_slope(form.gelu, z) for z in zs), strict=True)
  hs = [alpha * a for alpha, a in zip(w.alphas, active, strict=True)]
  h = {axis: units.joined(hs, axis) for axis in _kinds(axes)}
  for one in _added(w, h, n) if form.reversible and m == n else ():
    y -= one
  dhs: list[Any] = [0.0] * len(axes)
  if CHANNELS in axes:
    gradient['up_c'] = along_channels_gradient(h[CHANNELS][:m], dy)
    gradient['bias_c'] = _sum_to(dy, (y.shape[2],))
    units.add(dhs, CHANNELS, _padded(dy @ w.up_c.T, n))
  if TOKENS in axes:
    gradient['up_t'] = _padded(along_tokens_gradient(dy, h[TOKENS]), n)
    gradient['bias_t'] = _padded(_sum_to(dy, (m, 1, 1)), n)
    units.add(dhs, TOKENS, along_tokens(w.up_t[:m].T, dy))
  dzs: list[Any] = [None] * len(axes)
  for i in reversed(range(len(axes))):
    dzs[i] = w.alphas[i] * dhs[i] * slopes[i]
    for other in _kinds(axes[:i]):
      before = units.before(i, other)
      part = h[other][..., before] if other == CHANNELS else h[other][before]
      units.add(dhs, other, _across_backward(gradient, w, units, i, other, part, dzs[i]))
  gradient['biases'] = [_sum_to(dz, b.shape) for dz, b in zip(dzs, joint.biases, strict=True)]
  gradient['alphas'] = [_sum_to(a * dh, ()) for a, dh in zip(active, dhs, strict=True)]
  dy = _padded(dy, n)
  if CHANNELS in axes:
    dz = units.joined(dzs, CHANNELS)
    gradient['down_c'] += along_channels_gradient(y, dz)
    gradient['cross_c'] = _later(along_channels_gradient(h[CHANNELS], dz), units.rank)
    dy += dz @ w.down_c.T
  if TOKENS in axes:
    dz = units.joined(dzs, TOKENS)
    gradient['down_t'] += along_tokens_gradient(dz, y)
    gradient['cross_t'] = _later(along_tokens_gradient(h[TOKENS], dz), units.rank).T
    dy += along_tokens(w.down_t.T, dz)
  return pull(Joint(**gradient))[0], dzs, y, dy


def _across_backward(
  gradient: dict[str, Any], w: Any, units: Units, i: int, axis: str, h: Array, dz: Array
) -> Array:
  """The gradient of h in `_across`, given that of its result.

  Adds those of the weights to `gradient`, but for `cross_c` and `cross_t`, which are made of all
  mixers at once.
  """
  before, own = units.before(i, axis), units.columns(i)
  if axis == units.axes[i]:
    if axis == CHANNELS:
      return dz @ w.cross_c[before, own].T
    return along_tokens(w.cross_t[own, before].T, dz)
  if axis == CHANNELS:
    down = w.down_t[own]
    inner = along_tokens(down, h)
    gradient['up_c'] = gradient['up_c'].at[before].add(along_channels_gradient(inner, dz))
    dz = dz @ w.up_c[before].T
    gradient['down_t'] = gradient['down_t'].at[own].add(along_tokens_gradient(dz, h))
    return along_tokens(down.T, dz)
  down = w.down_c[:, own]
  inner = h @ down
  up = gradient['up_t'].at[:, before]
  gradient['up_t'] = up.add(along_tokens_gradient(dz, inner))
  dz = along_tokens(w.up_t[:, before].T, dz)
  gradient['down_c'] = gradient['down_c'].at[:, own].add(along_channels_gradient(h, dz))
  return dz @ down.T


def _kinds(axes: Sequence[str]) -> list[str]:
  return [axis for axis in (CHANNELS, TOKENS) if axis in axes]


def _cast(joint: Joint, dtype: DType) -> Any:
  return jax.tree.map(lambda x: x.astype(dtype), joint)


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
