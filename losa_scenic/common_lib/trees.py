"""Parameter trees as flat {path: leaf} tables: count, compare, describe, hash."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from losa_scenic.common_lib.types import Params


def flatten(tree: Params) -> dict[str, Any]:
  """{'a': {'b': x}} -> {'a/b': x}."""
  return traverse_util.flatten_dict(dict(tree), sep='/')


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """{'a/b': x} -> {'a': {'b': x}}."""
  return traverse_util.unflatten_dict(dict(flat), sep='/')


def count(tree: Any) -> int:
  """Number of scalars in all leaves (arrays or `jax.ShapeDtypeStruct`s)."""
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def describe(tree: Params) -> dict[str, list]:
  """{path: [shape, dtype name]}, as JSON can hold it; works on shapes without data."""
  return {
    path: [list(leaf.shape), np.dtype(leaf.dtype).name]
    for path, leaf in sorted(flatten(tree).items())
  }


def differences(want: Mapping[str, Any], have: Mapping[str, Any], limit: int = 8) -> list[str]:
  """Human-readable lines on how two {path: description} tables differ; empty if they agree."""
  lines = [f'missing: {path} {want[path]}' for path in sorted(set(want) - set(have))]
  lines += [f'unexpected: {path} {have[path]}' for path in sorted(set(have) - set(want))]
  lines += [
    f'{path}: expected {want[path]}, found {have[path]}'
    for path in sorted(set(want) & set(have))
    if list(want[path]) != list(have[path])
  ]
  return lines[:limit] + ([f'... and {len(lines) - limit} more'] if len(lines) > limit else [])


def digest(tree: Params) -> str:
  """SHA-256 over paths, shapes, dtypes and bytes of all leaves, independent of their order."""
  sha = hashlib.sha256()
  for path, leaf in sorted(flatten(tree).items()):
    value = np.ascontiguousarray(np.asarray(leaf))
    sha.update(f'{path} {value.shape} {value.dtype.name}\n'.encode())
    sha.update(value.tobytes())
  return sha.hexdigest()
