"""Where arrays live: one mesh of all devices of all processes, and one table of rules.

  what                                             where
  batches                                          split over all devices, by their leading axis
  frozen weights of the encoder's layers           split over 'fsdp', by the first axis it divides;
                                                   if packed, in the host's memory, for each device
  other frozen weights, all that trains, its       a copy on every device
  optimizer's state, model state, rng, metrics

Both axes of the mesh split a batch: 'fsdp' only says among how many devices a copy of the frozen
layers is divided. Each layer gathers its weights when it runs (see `gather`).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from losa_scenic.common_lib import errors, trees
from losa_scenic.common_lib.types import Array, Batch, Params, PyTree
from losa_scenic.model_lib import packing

AXES = ('data', 'fsdp')
_LAYER = re.compile(r'backbone/encoder/layers(_\d+)?/.*')


def make_mesh(shape: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
  """The mesh ('data', 'fsdp') of all devices; each process has its part of a batch in one piece.

  Args:
    shape: devices along each axis; -1 for one of them means the rest. By default 'data' is the
      rest and 'fsdp' is 1.
    devices: row by row; by default those of all processes.

  Raises:
    errors.UserError: for an unknown axis, a size that is none, or sizes that do not make up the
      number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = {'data': -1, 'fsdp': 1}
  for axis, size in shape.items():
    if isinstance(size, bool) or not isinstance(size, int) or size < -1 or size == 0:
      raise errors.UserError(
        f'mesh.{axis} must be a number of devices, or -1 for all the rest, not {size!r}.'
      )
    sizes[errors.one_of('mesh axis', axis, AXES)] = size
  given = ', '.join(f'{axis}={size}' for axis, size in sizes.items())
  rest = [axis for axis, size in sizes.items() if size == -1]
  if len(rest) > 1:
    raise errors.UserError(f'mesh {given}: only one axis can be -1, which means all the rest.')
  named = int(np.prod([size for size in sizes.values() if size != -1]))
  if len(devices) % named or (not rest and len(devices) != named):
    known = ' or '.join(f'data={len(devices) // n}, fsdp={n}' for n in _divisors(len(devices)))
    raise errors.UserError(
      f'mesh {given} does not make up the number of devices, {len(devices)}: give {known}.'
    )
  sizes |= {axis: len(devices) // named for axis in rest}
  return Mesh(np.asarray(devices).reshape([sizes[axis] for axis in AXES]), AXES)


def _divisors(n: int) -> list[int]:
  return [k for k in range(1, n + 1) if n % k == 0]


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds a copy."""
  return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
  """The leading axis is split over the devices."""
  return NamedSharding(mesh, PartitionSpec(AXES))


def frozen_shardings(shapes: Params, mesh: Mesh) -> dict[str, Any]:
  """Where each leaf of the frozen tree lives.

  Args:
    shapes: the frozen parameters of an adapted model, or their shapes.
    mesh: as `make_mesh` makes it.

  Raises:
    errors.UserError: if the mesh has an axis 'fsdp', but there is no weight to split.
  """
  table = {
    path: NamedSharding(mesh, _spec(path, leaf.shape, mesh.shape['fsdp']))
    for path, leaf in trees.flatten(shapes).items()
  }
  for path in packing.hosted(shapes):
    table[path] = replicated(mesh).with_memory_kind(packing.HOST)
  if mesh.shape['fsdp'] > 1 and all(where.is_fully_replicated for where in table.values()):
    frozen = any(_LAYER.fullmatch(path) for path in table)
    why = 'no axis of them can be divided so' if frozen else 'this method trains them all'
    raise errors.UserError(
      f"mesh.fsdp={mesh.shape['fsdp']} splits the frozen weights of the backbone's layers, but "
      f'{why}: leave it at 1.'
    )
  return trees.unflatten(table)


def _spec(path: str, shape: Sequence[int], parts: int) -> PartitionSpec:
  """The rule for one frozen leaf of a layer: its first axis that can be divided, else none.

  By their first axis, gathered parts lie one after the other in memory. By any other, XLA's GPU
  compiler would first copy all layers into another order, which takes as much memory again.
  """
  layer = _LAYER.fullmatch(path)
  if parts == 1 or layer is None:
    return PartitionSpec()
  # The leading axis of stacked layers is the loop's: splitting it would gather all layers at once.
  for axis in range(0 if layer[1] else 1, len(shape)):
    if shape[axis] % parts == 0:
      return PartitionSpec(*[None] * axis, 'fsdp')
  return PartitionSpec()


def gather(shardings: Params, mesh: Mesh) -> Callable[[str, Params], dict[str, Any]] | None:
  """What the weights of a layer pass through before they are used: split ones become whole.

  Args:
    shardings: of the frozen tree, from `frozen_shardings`.
    mesh: that of `shardings`.

  Returns:
    `fn(name of the layer, its parameters)` for `Encoder.gather`, or None if nothing is split.
  """
  where = trees.flatten(shardings)
  split = {path for path, sharding in where.items() if not sharding.is_fully_replicated}

  def whole(layer: str, params: Params) -> dict[str, Any]:
    flat = trees.flatten(params)
    for path in flat:
      if f'backbone/encoder/{layer}/{path}' in split:
        # Else the compiler may leave weights in parts and sum up activations instead.
        flat[path] = jax.lax.with_sharding_constraint(flat[path], replicated(mesh))
    return trees.unflatten(flat)

  return whole if split else None


def place(value: np.ndarray, sharding: Sharding) -> Array:
  """An array that every process has, on the devices; each device receives its part alone.

  Other processes are not asked whether they have the same.
  """
  return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def put(batch: Batch, mesh: Mesh) -> dict[str, Array]:
  """Places this process's part of a batch on its devices."""
  sharding = batched(mesh)
  return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
  """Places a copy of every leaf on every device. All processes must have the same."""
  return jax.tree.map(lambda leaf: place(np.asarray(leaf), replicated(mesh)), tree)


def fetch(tree: PyTree) -> PyTree:
  """The whole arrays, in the memory of every process.

  Every process must call it if some leaf is split over several processes.
  """

  def whole(leaf: Any) -> np.ndarray:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
      return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

  return jax.tree.map(whole, tree)


def check_batch_size(
  name: str, size: int, mesh: Mesh, parts: int = 1, microbatches: int = 1
) -> None:
  """Raises `UserError` unless every device gets equally many examples, in each of all parts."""
  if size < 1 or size % (mesh.size * parts * microbatches):
    times = f' x {parts} grad_accum_steps' if parts > 1 else ''
    times += f' x {microbatches} stream_microbatches' if microbatches > 1 else ''
    raise errors.UserError(
      f'{name} {size} must be a positive multiple of {mesh.size} devices{times}.'
    )
