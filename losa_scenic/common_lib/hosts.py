"""What the processes of one run agree on: values, errors and arrays go from one to all.

All processes must call these functions in the same order. In a run of one process they cost
nothing. Values travel as JSON, arrays as bytes, so nothing is rounded on its way.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from losa_scenic.common_lib import errors

T = TypeVar('T')

# Arrays travel in pieces of this many bytes: one piece is copied once per device meanwhile.
_PIECE = 64 * 2**20


def is_first() -> bool:
  """Whether this is process 0: the one that writes files and speaks."""
  return jax.process_index() == 0


def on_first(fn: Callable[[], T]) -> T:
  """Calls `fn` on process 0 alone.

  Args:
    fn: returns what JSON can hold.

  Returns:
    Its result, on every process; in a run of several processes as JSON gives it back.

  Raises:
    errors.UserError: on every process, if `fn` raised one or an `OSError`.
  """
  if jax.process_count() == 1:
    return fn()
  told: dict[str, Any] = {}
  raised: BaseException | None = None
  if is_first():
    try:
      told['value'] = fn()
    except (errors.UserError, OSError) as e:
      told, raised = {'error': str(e)}, e
  told = json.loads(_from_first(json.dumps(told).encode()))
  if raised is not None:
    raised.add_note('Process 0 of the run found this; the others end too.')
    raise raised
  if 'error' in told:
    raise errors.UserError(f'Process 0 ended the run: {told["error"]}')
  return told['value']


def gather(value: T) -> list[T]:
  """Every process's value, by number of the process; each is something that JSON can hold."""
  if jax.process_count() == 1:
    return [value]
  mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(mine)))).reshape(-1)
  padded = np.zeros(int(sizes.max()), np.uint8)
  padded[: len(mine)] = mine
  rows = np.asarray(multihost_utils.process_allgather(padded))
  return [json.loads(rows[i, :size].tobytes()) for i, size in enumerate(sizes)]


def check_equal(what: Mapping[str, Any]) -> None:
  """Raises `UserError` on every process if a value is not the same on all.

  Args:
    what: name -> something that JSON can hold.
  """
  everywhere = gather(json.loads(json.dumps(what)))
  for key in everywhere[0]:
    others = [i for i, values in enumerate(everywhere) if values[key] != everywhere[0][key]]
    if others:
      raise errors.UserError(
        f'{key} differs between the processes of this run: {_short(everywhere[0][key])} in process '
        f'0, {_short(everywhere[others[0]][key])} in process {others[0]}. Start all with the same '
        'command, code and data.'
      )


def broadcast(
  arrays: Sequence[np.ndarray] | None, like: Sequence[tuple[tuple[int, ...], Any]]
) -> list[np.ndarray]:
  """Process 0's arrays on every process, bit for bit.

  Args:
    arrays: on process 0 the arrays; ignored on others.
    like: shape and dtype of each, known to all.

  Returns:
    The arrays: on process 0 those that were given.
  """
  if jax.process_count() == 1:
    return list(arrays or ())
  shapes = [(tuple(shape), np.dtype(dtype)) for shape, dtype in like]
  if not is_first():
    arrays = [np.empty(shape, dtype) for shape, dtype in shapes]
  assert arrays is not None
  for array, (shape, dtype) in zip(arrays, shapes, strict=True):
    if (array.shape, array.dtype) != (shape, dtype):
      raise ValueError(f'{array.shape} {array.dtype} is not {shape} {dtype}.')
  for group in _groups([array.nbytes for array in arrays]):
    members = [arrays[i] for i in group]
    packed = b''.join(np.ascontiguousarray(a).tobytes() for a in members) if is_first() else b''
    whole = np.frombuffer(_from_first(packed), np.uint8)
    at = 0
    for array in members:
      if not is_first():
        part = whole[at : at + array.nbytes]
        array[...] = part.view(array.dtype).reshape(array.shape)
      at += array.nbytes
  return list(arrays)


def _groups(sizes: Sequence[int]) -> list[list[int]]:
  """Positions in groups of about `_PIECE` bytes: many small arrays are one message."""
  groups: list[list[int]] = [[]]
  filled = 0
  for i, size in enumerate(sizes):
    if groups[-1] and filled + size > _PIECE:
      groups.append([])
      filled = 0
    groups[-1].append(i)
    filled += size
  return groups


def _from_first(data: bytes) -> bytes:
  """Process 0's bytes, on every process."""
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
  pieces = []
  for start in range(0, size, _PIECE):
    piece = np.zeros(min(_PIECE, size - start), np.uint8)
    if is_first():
      piece[:] = np.frombuffer(data, np.uint8, len(piece), start)
    pieces.append(np.asarray(multihost_utils.broadcast_one_to_all(piece)).tobytes())
  return b''.join(pieces)


def _short(value: Any) -> str:
  text = json.dumps(value)
  return text if len(text) <= 200 else f'{text[:200]}...'
