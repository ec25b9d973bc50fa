"""All mixers of LoSA, one group after the other: see `mixer_group`.

Unrolled: each mixer has its own weights, and what it reads of the backbone, mostly read when the
backbone's layer ran. Scanned: weights and outputs of layers are stacked, and a loop of the program
reads the outputs of a group and computes it; what is compiled is one group, however many there are.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from losa_scenic.adapt_lib import mixer_group, tap_products
from losa_scenic.adapt_lib.mixer import Weights, each
from losa_scenic.adapt_lib.token_products import tokens_first
from losa_scenic.common_lib.types import Array
from losa_scenic.model_lib import attention


class Form(NamedTuple):
  """How mixers are computed: what are no arrays.

  Attributes:
    axes: of each mixer, `CHANNELS` or `TOKENS`.
    gelu: 'tanh' or 'erf'.
    size: mixers of a group.
    wanted: how many leading tokens of the last y are; None for all. The last group makes no others.
    reversible: keep no y but the last one for the backward pass.
    fused: see `mixer_group.Form`.
  """

  axes: tuple[str, ...]
  gelu: str
  size: int
  wanted: int | None = None
  reversible: bool = False
  fused: bool = False

  def groups(self) -> list[tuple[mixer_group.Form, slice]]:
    """Of each group: its own form, and which mixers it has."""
    slices = [slice(i, i + self.size) for i in range(0, len(self.axes), self.size)]
    groups = [(self.of_group(some), some) for some in slices]
    last, some = groups[-1]
    return [*groups[:-1], (last._replace(wanted=self.wanted), some)]

  def of_group(self, some: slice) -> mixer_group.Form:
    """Of some mixers that make all tokens."""
    return mixer_group.Form(self.axes[some], self.gelu, None, self.reversible, self.fused)


def unrolled(
  form: Form,
  mixers: Sequence[Weights],
  y: Float[Array, 'n b d'],
  taps: Sequence[tap_products.Tap],
) -> Float[Array, 'm b d']:
  """y_i = g_i(b_i + y_{i-1}) + y_{i-1} for mixers in a row.

  Args:
    form: of all.
    mixers: their weights, float32.
    y: y_0.
    taps: what each mixer reads of the backbone. Of one that keeps nothing, the gradient of W_d
      lacks the part that reading has in it.

  Returns:
    What is wanted of y after the last mixer, in the dtype of y, which is that of all products.
  """
  seen, kept = [tap.seen for tap in taps], [tap.kept for tap in taps]
  return _unrolled(form, list(mixers), y, seen, kept)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unrolled(
  form: Form, mixers: list[Weights], y: Array, seen: list[Array], kept: list[Any]
) -> Array:
  return _forward(form, mixers, y, seen, kept)[0]


def _forward(
  form: Form, mixers: list[Weights], y: Array, seen: list[Array], kept: list[Any]
) -> tuple[Array, Any]:
  starts: list[Array] = []
  of_groups: list[Any] = []
  for group, some in form.groups():
    starts.append(y)
    y, of_group = _group_forward(group, attention.on_cpu(), mixers[some], y, seen[some])
    of_groups.append((of_group, kept[some]))
  if form.reversible:
    starts = starts[-1:] if len(y) < len(starts[-1]) else [y]
  return y, (mixers, starts, of_groups)


def _backward(
  form: Form, residuals: Any, dy: Array
) -> tuple[list[Weights], Array, list[Array], None]:
  mixers, starts, of_groups = residuals
  gradients: list[Weights] = []
  dzs: list[Array] = []
  y = starts[-1]
  for k, (group, some) in reversed(list(enumerate(form.groups()))):
    if not form.reversible:
      y = starts[k]
    # One group after the other: nothing of it is made before, and nothing of size y is left after.
    given = jax.lax.optimization_barrier((mixers[some], y, of_groups[k], dy))
    of_mixers, of_taps, y, dy = _group_backward(group, attention.on_cpu(), *given)
    if k:
      y, dy, of_mixers, of_taps = jax.lax.optimization_barrier((y, dy, of_mixers, of_taps))
    else:
      # y_0 is often frozen. Its gradient is then not made, unless a barrier needs it.
      of_mixers, of_taps = jax.lax.optimization_barrier((of_mixers, of_taps))
    gradients, dzs = of_mixers + gradients, of_taps + dzs
  return gradients, dy, dzs, None


_unrolled.defvjp(_forward, _backward)


# Groups that are alike are traced once. What is traced for a CPU is another form.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _group_forward(
  group: mixer_group.Form, on_cpu: bool, mixers: list[Weights], y: Array, seen: list[Array]
) -> tuple[Array, mixer_group.Kept]:
  del on_cpu
  return mixer_group.forward(group, _stacked(group.axes, mixers), y, seen)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _group_backward(
  group: mixer_group.Form, on_cpu: bool, mixers: list[Weights], y: Array, kept: Any, dy: Array
) -> tuple[list[Weights], list[Array], Array, Array]:
  del on_cpu
  weights = _stacked(group.axes, mixers)
  gradient, dzs, y, dy = _with_reading(group, weights, y, kept, dy)
  return in_turn(group.axes, {axis: each(w) for axis, w in gradient.items()}), dzs, y, dy


def _with_reading(
  group: mixer_group.Form, weights: Mapping[str, Weights], y: Array, kept: Any, dy: Array
) -> tuple[dict[str, Weights], list[Array], Array, Array]:
  """`mixer_group.backward`, with the gradients of down projections from what they read."""
  of_group, outputs = kept
  gradient, dzs, y, dy = mixer_group.backward(group, weights, y, of_group, dy)
  for axis, own in gradient.items():
    mine = [i for i, other in enumerate(group.axes) if other == axis]
    if outputs[mine[0]] is not None:
      found = [tap_products.down_gradient(outputs[i], dzs[i], axis) for i in mine]
      gradient[axis] = own._replace(down=own.down + jnp.stack(found))
  return gradient, dzs, y, dy


def _stacked(axes: Sequence[str], mixers: Sequence[Weights]) -> dict[str, Weights]:
  """The inverse of `in_turn`."""
  by = {axis: [m for m, own in zip(mixers, axes, strict=True) if own == axis] for axis in axes}
  return {axis: jax.tree.map(lambda *w: jnp.stack(w), *own) for axis, own in by.items()}


class _Group(NamedTuple):
  """A group of the loop: its form, how many sites are read in turn, and if in 8 bits for later."""

  form: mixer_group.Form
  sites: int
  rounded: bool


def scanned(
  form: Form,
  weights: Mapping[str, Weights],
  y: Float[Array, 'n b d'],
  outputs: Sequence[Float[Array, 'k b n d']],
  *,
  rounded: bool = False,
) -> Float[Array, 'm b d']:
  """`unrolled` for weights and outputs of the backbone that are stacked; the latter are frozen.

  Args:
    form: of all; groups have whole periods of axes and of sites.
    weights: of each axis, those of its mixers, with a leading axis [mixers].
    y: y_0.
    outputs: of each site that is read, those of the layers that are; sites in turn at each layer.
    rounded: keep the outputs in 8 bits, for gradients of down projections.

  Returns:
    As `unrolled`.
  """
  outputs = [jax.lax.stop_gradient(each) for each in outputs]
  # The last group is done apart where it differs: has fewer mixers, or makes fewer tokens.
  loops = (len(form.axes) - (form.wanted is not None)) // form.size
  many, sites = loops * form.size, len(outputs)
  counts = {axis: form.axes[:many].count(axis) for axis in weights}
  both = {axis: _split(own, counts[axis]) for axis, own in weights.items()}
  if loops:
    one = form.of_group(slice(form.size))
    where = jnp.arange(many // sites).reshape(loops, -1)
    of_groups = jax.tree.map(
      lambda w: w.reshape(loops, -1, *w.shape[1:]), {axis: own for axis, (own, _) in both.items()}
    )
    y = _scanned(_Group(one, sites, rounded), of_groups, y, outputs, where)
  if many == len(form.axes):
    return y
  axes = form.axes[many:]
  mixers = in_turn(axes, {axis: each(own) for axis, (_, own) in both.items()})
  bs = [outputs[i % sites][i // sites] for i in range(many, len(form.axes))]
  taps = read(axes, mixers, bs, rounded=rounded)
  return unrolled(form._replace(axes=axes), mixers, y, taps)


def read(
  axes: Sequence[str], mixers: Sequence[Weights], bs: Sequence[Array], *, rounded: bool
) -> list[tap_products.Tap]:
  """What each of some mixers reads, see `tap_products.read`."""
  return [
    tap_products.read(b, own.down, axis, rounded=rounded)
    for axis, own, b in zip(axes, mixers, bs, strict=True)
  ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scanned(
  group: _Group,
  weights: Mapping[str, Weights],
  y: Array,
  outputs: Sequence[Array],
  taps: Int[Array, 'groups k'],
) -> Array:
  return _scan_forward(group, weights, y, outputs, taps)[0]


def _scan_forward(
  group: _Group, weights: Any, y: Array, outputs: Sequence[Array], taps: Array
) -> tuple[Array, Any]:
  def body(y: Array, given: Any) -> tuple[Array, Any]:
    own, taps = given
    mixers = in_turn(group.form.axes, {axis: each(w) for axis, w in own.items()})
    found = read(group.form.axes, mixers, _outputs(group, outputs, taps), rounded=group.rounded)
    after, kept = mixer_group.forward(group.form, own, y, [tap.seen for tap in found])
    rounded = [tap.kept for tap in found] if group.rounded else None
    return after, (kept, None if group.form.reversible else y, rounded)

  y, kept = jax.lax.scan(body, y, (weights, taps))
  whole = None if group.rounded else outputs
  return y, (weights, y if group.form.reversible else None, whole, taps, kept)


def _scan_backward(group: _Group, residuals: Any, dy: Array) -> tuple[Any, ...]:
  weights, last, outputs, taps, kept = residuals

  def body(carry: Any, given: Any) -> tuple[Any, Any]:
    (after, dy), (own, taps, (of_group, start, bs)) = carry, given
    if outputs is not None:
      bs = [tokens_first(b) for b in _outputs(group, outputs, taps)]
    y = after if group.form.reversible else start
    gradient, _, y, dy = _with_reading(group.form, own, y, (of_group, bs), dy)
    return (y if group.form.reversible else None, dy), gradient

  (_, dy), gradient = jax.lax.scan(body, (last, dy), (weights, taps, kept), reverse=True)
  return gradient, dy, None, None


_scanned.defvjp(_scan_forward, _scan_backward)


def in_turn(axes: Sequence[str], by: Mapping[str, Sequence[Any]]) -> list[Any]:
  """What the mixers of each axis have -> that of all mixers in turn."""
  by_axis = {axis: iter(own) for axis, own in by.items()}
  return [next(by_axis[axis]) for axis in axes]


def _split(weights: Weights, count: int) -> tuple[Weights, Weights]:
  """The first mixers, and the others; the gradient of both is put together once."""
  pairs = [jax.lax.split(w, (count, len(w) - count)) for w in weights]
  first, others = zip(*pairs, strict=True)
  return Weights(*first), Weights(*others)


def _outputs(group: _Group, outputs: Sequence[Array], taps: Array) -> list[Float[Array, 'b n d']]:
  """What each mixer of a group reads."""
  return [
    jax.lax.dynamic_index_in_dim(outputs[i % group.sites], taps[i // group.sites], 0, False)
    for i in range(len(group.form.axes))
  ]
