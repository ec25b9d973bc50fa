"""Files of selected features: which entries of a vector of features stay, and what made them.

A JSON file is {format_version, identity, kept, ...}: `identity` says of which features the indices
`kept` are, and must be the reader's; other entries are for people. A .npy file holds bare indices.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from losa_scenic.common_lib import errors

FORMAT_VERSION = 1


def content(identity: Mapping[str, Any], kept: Sequence[int], **more: Any) -> dict[str, Any]:
  """The JSON object of a file."""
  return {
    'format_version': FORMAT_VERSION,
    'identity': dict(identity),
    'kept': [int(i) for i in kept],
    **more,
  }


def read(path: pathlib.Path, identity: Mapping[str, Any], total: int) -> tuple[int, ...]:
  """The kept features of a file, in increasing order.

  Args:
    path: a JSON file as above, or a .npy file with a vector of indices.
    identity: of the features that are to be selected from; not compared with a .npy file.
    total: how many those are.

  Raises:
    errors.UserError: if the file cannot be read, is of other features, or does not hold different
      indices below `total`.
  """
  try:
    kept = np.load(path) if path.suffix == '.npy' else _kept(path, identity)
  except FileNotFoundError:
    raise errors.UserError(f'There is no selection {path}.') from None
  except errors.UserError:
    raise
  except (OSError, EOFError, ValueError) as e:
    raise errors.UserError(f'Cannot read the selection {path}: {e}') from None
  if kept.ndim != 1 or not kept.size or kept.dtype.kind not in 'iu':
    raise errors.UserError(f'The selection {path} is no list of indices.')
  if kept.min() < 0 or kept.max() >= total or len(np.unique(kept)) != kept.size:
    raise errors.UserError(
      f'The selection {path} must hold different indices in 0..{total - 1}; it holds {kept.size}, '
      f'from {kept.min()} to {kept.max()}.'
    )
  return tuple(np.sort(kept).tolist())


def _kept(path: pathlib.Path, identity: Mapping[str, Any]) -> np.ndarray:
  file = json.loads(path.read_text())
  if not isinstance(file, dict) or file.get('format_version') != FORMAT_VERSION:
    raise errors.UserError(f'{path} is no selection of version {FORMAT_VERSION}.')
  theirs = _flat(file.get('identity'))
  mine = _flat(json.loads(json.dumps(dict(identity))))
  wrong = [
    f'{key} {theirs.get(key)} there, {mine.get(key)} here'
    for key in sorted(set(mine) | set(theirs))
    if theirs.get(key) != mine.get(key)
  ]
  if wrong:
    raise errors.UserError(f'The selection {path} is of other features: {"; ".join(wrong)}.')
  return np.asarray(file.get('kept'))


def _flat(value: Any, prefix: str = '') -> dict[str, Any]:
  if not isinstance(value, dict):
    return {prefix.rstrip('.'): value}
  table: dict[str, Any] = {}
  for key, item in value.items():
    table |= _flat(item, f'{prefix}{key}.')
  return table
