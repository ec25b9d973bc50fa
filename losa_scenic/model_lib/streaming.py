"""Frozen layers that stay in the host's memory and visit the device one after the other.

The weights of a layer are one row of a buffer [depth 1 size] in pinned host memory. The encoder is
a loop that carries the row of the next layer, `now` when its turn comes:

  cut `now` into the layer's weights     a copy on the device; `now` is free from here on
  start copying row i + 1 into `now`     asynchronous: one transfer by the copy engine
  run layer i                            all its products and its attention
  wait for the copy

So the device holds two layers, the cut one and the one that arrives. What this rests on, all of it
seen in programs that XLA compiles for GPUs:
- One row a layer. With a buffer for each weight most copies end before the first product starts.
- The barrier between the cut weights and the buffer that is read. Without it the copy starts before
  the cut, and the loop needs a third layer's memory and another copy.
- An index that is the loop's counter plus a constant; `dynamic_slice` clamps the last one. From any
  other, even min(i + 1, depth - 1), XLA makes a kernel that reads the host's memory by itself and
  takes multiprocessors from the products.
The last layer starts a copy too, of itself: one transfer in depth is for nothing.

Unrolled layers do the same one after the other. Each has a buffer of its own, since from a row that
is known beforehand XLA makes such a kernel too; nothing is copied for nothing; and what a side
network reads of a layer is read before the next one runs, so that no outputs pile up.

Only for encoders without a backward pass: a layer's weights are gone when the next one runs.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from losa_scenic.common_lib import errors, trees
from losa_scenic.common_lib.types import Array, Params, PyTree
from losa_scenic.model_lib import packing
from losa_scenic.model_lib.packing import Layout

MEMORIES = ('device', 'host')

# `layer(its weights, tokens [b n d], its part of the per-layer values)` -> tokens [b n d] and what
# it collects by name, each with a leading axis of b.
Layer = Callable[[dict[str, Any], Array, PyTree], tuple[Array, dict[str, Array]]]
# `read(layer, what it collected)` -> what is wanted of it by name.
Read = Callable[[int, dict[str, Array]], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Stream:
  """How an encoder runs layers that are in the host's memory.

  Attributes:
    layout: of the packed weights.
    microbatches: parts of the batch that pass a layer one after the other, in each of its visits: a
      large batch hides the transfer, and activations take the memory of a part. A divisor of the
      batch on each device.
  """

  layout: Layout
  microbatches: int = 1

  def run(
    self, packed: Array, layer: Layer, x: Float[Array, 'b n d'], per_layer: PyTree = None
  ) -> tuple[Float[Array, 'b n d'], dict[str, Any]]:
    """Runs all layers in a loop of the program.

    Args:
      packed: the buffer [depth 1 size], in memory of the host.
      layer: what a layer does.
      x: tokens.
      per_layer: values with a leading axis [depth], or None.

    Returns:
      The last layer's tokens, and {name: what layers collected, stacked}.

    Raises:
      errors.UserError: if the micro-batches do not divide the batch.
    """
    layer = self._visit(layer, x)

    def body(carry: tuple[Array, Array, Array], own: PyTree) -> tuple[Any, dict[str, Array]]:
      i, x, now = carry
      params, source = jax.lax.optimization_barrier((self.layout.cut(now), packed))
      ahead = _fetch(source, i + jnp.uint32(1))
      x, seen = layer(params, x, own)
      return (i + jnp.uint32(1), x, ahead), seen

    first = jnp.uint32(0), x, _fetch(packed, jnp.uint32(0))
    (_, x, _), seen = jax.lax.scan(body, first, per_layer, length=self.layout.depth)
    return x, seen

  def run_apart(
    self,
    rows: Sequence[Array],
    layer: Layer,
    x: Float[Array, 'b n d'],
    per_layer: PyTree = None,
    read: Read | None = None,
  ) -> tuple[Float[Array, 'b n d'], list[dict[str, Any]]]:
    """`run` for layers that each have a buffer of their own.

    Args:
      rows: of each layer [1 size], in memory of the host.
      layer: see `run`.
      x: see `run`.
      per_layer: see `run`.
      read: see `one_by_one`.

    Returns:
      As `one_by_one`.

    Raises:
      errors.UserError: as `run`.
    """

    def fetch(_: int, row: Array) -> Array:
      return jax.device_put(row, jax.memory.Space.Device)

    return one_by_one(rows, fetch, self.layout.cut, self._visit(layer, x), x, per_layer, read)

  def _visit(self, layer: Layer, x: Array) -> Layer:
    """The layer, in as many parts as wanted."""
    parts = self.microbatches
    if x.shape[0] % parts:
      raise errors.UserError(
        f'stream_microbatches {parts} must divide the batch of {x.shape[0]} that a layer sees.'
      )
    return layer if parts == 1 else functools.partial(_in_parts, parts, layer)


def one_by_one(
  stored: Sequence[Any],
  fetch: Callable[[int, Any], Any],
  cut: Callable[[Any], dict[str, Any]],
  layer: Layer,
  x: Float[Array, 'b n d'],
  per_layer: PyTree = None,
  read: Read | None = None,
) -> tuple[Float[Array, 'b n d'], list[dict[str, Any]]]:
  """Runs frozen layers whose weights come from elsewhere, each while the one before it runs.

  Args:
    stored: of each layer, where it is kept.
    fetch: (layer, what is stored of it) -> that on the device, whole.
    cut: what was fetched -> the layer's weights.
    layer: what a layer does.
    x: tokens.
    per_layer: values with a leading axis [depth], or None.
    read: called for each layer with what it collected, which is gone when the next one runs.

  Returns:
    The last layer's tokens, without a gradient, and of each layer what was read of it, or else what
    it collected.
  """
  found, last, now = [], len(stored) - 1, fetch(0, stored[0])
  for i in range(len(stored)):
    params, ahead = jax.lax.optimization_barrier((cut(now), stored[min(i + 1, last)]))
    now = None if i == last else fetch(i + 1, ahead)
    x, values = layer(params, x, jax.tree.map(lambda a, i=i: a[i], per_layer))
    values = values if read is None else read(i, values)
    # The next layer waits for its weights, and for what is read of this one.
    x, now, values = jax.lax.optimization_barrier((jax.lax.stop_gradient(x), now, values))
    x = jax.lax.stop_gradient(x)
    found.append(values)
  return x, found


def _fetch(packed: Array, i: Array) -> Array:
  """Row i of the host's buffer, on the device, [1 size]."""
  # An unsigned index: of others the sign is looked at first, which hides the counter from XLA.
  zero = jnp.uint32(0)
  row = jax.lax.dynamic_slice(packed, (i, zero, zero), (1, *packed.shape[1:]))
  return jax.device_put(row[0], jax.memory.Space.Device)


def fetched(params: Params, after: Float[Array, 'b n d']) -> dict[str, Any]:
  """Parameters whose weight matrices may be in the host's memory, on the device.

  Args:
    params: of a module outside of the layers.
    after: copies start when it is there; before, the memory belongs to layers.
  """
  flat = trees.flatten(params)
  hosted = {path: leaf for path, leaf in flat.items() if packing.is_hosted(path)}
  hosted, _ = jax.lax.optimization_barrier((hosted, jax.lax.stop_gradient(after)))
  return trees.unflatten(flat | jax.device_put(hosted, jax.memory.Space.Device))


def _in_parts(
  parts: int, layer: Layer, params: dict[str, Any], x: Float[Array, 'b n d'], own: PyTree
) -> tuple[Array, dict[str, Array]]:
  """`layer` of every `parts`-th example at a time; results take their places in whole arrays."""

  # Neighbours are in different parts: each device splits its own share of a batch, none moves.
  def apart(a: Array) -> Array:
    return a.reshape(a.shape[0] // parts, parts, *a.shape[1:])

  def whole(a: Array) -> Array:
    return a.reshape(-1, *a.shape[2:])

  def one(k: Array, whole: Array) -> tuple[Array, dict[str, Array]]:
    return layer(params, jax.lax.dynamic_index_in_dim(whole, k, axis=1, keepdims=False), own)

  def put(a: Array, part: Array, k: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(a, part.astype(a.dtype), k, axis=1)

  def step(carry: tuple[Array, dict[str, Array]], k: Array) -> tuple[Any, None]:
    x, seen = carry
    y, values = one(k, x)
    return (put(x, y, k), {name: put(seen[name], values[name], k) for name in seen}), None

  x = apart(x)
  _, shapes = jax.eval_shape(one, jax.ShapeDtypeStruct((), jnp.int32), x)
  # Where it fits, x itself is the array to be filled: zeros would be written first.
  seen = {
    name: x
    if (s.shape, s.dtype) == ((x.shape[0], *x.shape[2:]), x.dtype)
    else jnp.zeros((s.shape[0], parts, *s.shape[1:]), s.dtype)
    for name, s in shapes.items()
  }
  (x, seen), _ = jax.lax.scan(step, (x, seen), jnp.arange(parts))
  return whole(x), {name: whole(value) for name, value in seen.items()}


def check(memory: str, microbatches: int, *, spares_backbone: bool, fsdp: int) -> bool:
  """Whether frozen layers are streamed.

  Args:
    memory: the config's `frozen_memory`.
    microbatches: the config's `stream_microbatches`.
    spares_backbone: whether the method only runs the encoder forward.
    fsdp: devices that shall share the frozen weights.

  Raises:
    errors.UserError: for a combination that cannot be, or an option that would have no effect.
  """
  errors.one_of('frozen_memory', memory, MEMORIES)
  errors.check_at_least('stream_microbatches', microbatches, 1)
  if memory == 'device':
    if microbatches > 1:
      raise errors.UserError(
        f"stream_microbatches {microbatches} would have no effect: it is for frozen_memory 'host'. "
        'For parts of a batch one after the other use grad_accum_steps.'
      )
    return False
  if not spares_backbone:
    raise errors.UserError(
      "frozen_memory 'host' is for methods that only run the encoder forward, such as losa or "
      "linear; this one needs gradients inside it: use 'device'."
    )
  if fsdp != 1:
    raise errors.UserError(
      f"mesh.fsdp={fsdp} splits frozen weights over devices, and frozen_memory 'host' has them in "
      "the host's memory: use one of the two."
    )
  return True
