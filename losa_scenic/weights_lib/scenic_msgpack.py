"""Scenic's `checkpoint_N` and other files of flax.serialization: one tree of arrays, in msgpack.

The format has no table of contents: the file is read as a whole when it is opened.
"""

import mmap
import pathlib
from typing import Any

import numpy as np
from flax import serialization

from losa_scenic.common_lib import errors
from losa_scenic.weights_lib import groups, tensors


def read(path: pathlib.Path) -> tensors.Contents:
  """Reads a checkpoint.

  Args:
    path: the file.

  Returns:
    The parameters, see `groups.take_params`; names joined by '/'. Leaves that are no arrays
    (step counters, text) are named in metadata['other'].

  Raises:
    errors.UserError: if it is damaged or no tree of arrays.
  """
  try:
    with (
      open(path, 'rb') as stream,
      mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as encoded,
    ):
      # Mapped, because the pages can be given back; and a buffer is all that msgpack asks for.
      tree = serialization.msgpack_restore(encoded)  # pyright: ignore[reportArgumentType]
    if not isinstance(tree, dict):
      raise errors.UserError(f'{path}: not a checkpoint; its msgpack holds no tree of arrays.')
    found: dict[str, tensors.Tensor] = {}
    other: list[str] = []
    _flatten(path, tree, '', found, other)
    return groups.take_params(found, other)
  except errors.UserError:
    raise
  # Damaged files make msgpack and flax raise nearly anything: ValueError, TypeError, KeyError.
  except Exception as error:
    message = str(error)[:200] or type(error).__name__
    raise errors.UserError(f'{path}: not a readable msgpack checkpoint ({message}).') from None


def _is_numeric(dtype: np.dtype) -> bool:
  return dtype.kind in 'biufc' or dtype == tensors.BFLOAT16


def _flatten(
  path: pathlib.Path,
  tree: dict[Any, Any],
  prefix: str,
  found: dict[str, tensors.Tensor],
  other: list[str],
) -> None:
  for key, value in tree.items():
    name = f'{prefix}{key}'
    if isinstance(value, dict):
      _flatten(path, value, f'{name}/', found, other)
    elif isinstance(value, np.ndarray | np.generic) and _is_numeric(value.dtype):
      if name in found:
        raise errors.UserError(f"{path}: '{name}' stands twice in this checkpoint.")
      found[name] = tensors.ArrayTensor(np.asarray(value))
    else:
      other.append(name)
