"""Where arrays live: a mesh over all devices, batches split along 'data', the rest replicated."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Batch, PyTree


def make_mesh() -> Mesh:
  """A one-dimensional mesh ('data',) over all local devices.

  Raises:
    errors.UserError: in a run of several processes: each would read the whole batch.
  """
  if jax.process_count() > 1:
    raise errors.UserError(f'Runs of several processes ({jax.process_count()}) do not work yet.')
  return Mesh(np.asarray(jax.devices()), ('data',))


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds a copy."""
  return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
  """The leading axis is split over the devices."""
  return NamedSharding(mesh, PartitionSpec('data'))


def put(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
  """Places this process's part of a batch on its devices."""
  sharding = batched(mesh)
  return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
  """Places a copy of every leaf on every device."""
  return jax.device_put(tree, replicated(mesh))


def check_batch_size(name: str, size: int, mesh: Mesh) -> None:
  """Raises `UserError` unless every device gets equally many examples."""
  if size < 1 or size % mesh.size:
    raise errors.UserError(f'{name} {size} must be a positive multiple of {mesh.size} devices.')
