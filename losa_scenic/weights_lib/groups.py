"""The parameters among everything that a JAX training run saved."""

from collections.abc import Iterable, Mapping
from typing import Any

from losa_scenic.weights_lib import tensors

# In this order: new checkpoints of big_vision and Scenic, then what older ones call the optimizer.
PREFIXES = ('params', 'opt/target', 'optimizer/target')


def take_params(found: Mapping[str, tensors.Tensor], other: Iterable[str] = ()) -> tensors.Contents:
  """Leaves optimizer state and counters out, and strips the prefix of the parameters.

  Args:
    found: all tensors of a checkpoint; parts of a name are joined by '/'.
    other: names of entries that are no tensors.

  Returns:
    The tensors below the first of `PREFIXES` that there is, without it, or all of them if there is
    none. metadata['taken'] is that prefix; metadata['other'] are the sorted groups left out.
  """
  taken = next((p for p in PREFIXES if any(n.startswith(p + '/') for n in found)), None)
  left = set(other)
  metadata: dict[str, Any] = {}
  if taken is not None:
    depth = taken.count('/') + 1
    inside = {n for n in left if n.startswith(taken + '/')}
    outside = {n for n in {*found, *left} if not n.startswith(taken + '/')}
    left = inside | {'/'.join(n.split('/')[:depth]) for n in outside}
    found = {
      n[len(taken) + 1 :]: tensor for n, tensor in found.items() if n.startswith(taken + '/')
    }
    metadata['taken'] = taken
  if left:
    metadata['other'] = sorted(left)
  return tensors.Contents(dict(found), metadata)
