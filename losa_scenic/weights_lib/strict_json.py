"""JSON that means one thing only: a doubled key is an error, not whichever came last."""

import collections
import json
import pathlib
from typing import Any

from losa_scenic.common_lib import errors

_MAX_BYTES = 64 * 2**20


def parse(data: bytes, name: str) -> dict[str, Any]:
  """Reads a JSON object.

  Args:
    data: UTF-8 text.
    name: what to call it in an error.

  Raises:
    errors.UserError: if it is no JSON object, or a key stands in it twice.
  """
  try:
    found = json.loads(data.decode('utf-8'), object_pairs_hook=lambda pairs: _unique(pairs, name))
  except errors.UserError:
    raise
  # Numbers of thousands of digits are a ValueError, endless brackets a RecursionError.
  except (ValueError, RecursionError) as error:
    raise errors.UserError(f'{name}: not valid JSON ({error}).') from None
  if not isinstance(found, dict):
    raise errors.UserError(f'{name}: not a JSON object.')
  return found


def read(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON file; see `parse`.

  Raises:
    errors.UserError: also if the file is missing or larger than 64 MiB.
  """
  try:
    with open(path, 'rb') as stream:
      data = stream.read(_MAX_BYTES + 1)
  except OSError as error:
    raise errors.UserError(f'{path}: cannot be read ({error.strerror}).') from None
  if len(data) > _MAX_BYTES:
    raise errors.UserError(f'{path}: too large for a JSON file (over {_MAX_BYTES:,} bytes).')
  return parse(data, str(path))


def _unique(pairs: list[tuple[str, Any]], name: str) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) != len(pairs):
    doubled, _ = collections.Counter(key for key, _ in pairs).most_common(1)[0]
    raise errors.UserError(f"{name}: '{doubled}' stands twice in it.")
  return found
