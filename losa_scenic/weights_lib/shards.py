"""Checkpoints in several files, held together by an index of tensor names."""

import pathlib
from collections.abc import Callable

from losa_scenic.common_lib import errors
from losa_scenic.weights_lib import strict_json, tensors


def read(
  path: pathlib.Path, open_shard: Callable[[pathlib.Path], tensors.Contents]
) -> tuple[tensors.Contents, tuple[pathlib.Path, ...]]:
  """Reads an index and the tables of contents of the files that it lists.

  Args:
    path: NAME.safetensors.index.json or NAME.bin.index.json.
    open_shard: reads the table of contents of one of its files.

  Returns:
    All tensors, and the files, sorted.

  Raises:
    errors.UserError: if a file is missing or named in another folder, or the index and the files
      do not list exactly the same tensors.
  """
  listed = strict_json.read(path).get('weight_map')
  if not isinstance(listed, dict) or not listed:
    raise errors.UserError(f"{path}: an index of weights needs a 'weight_map' of tensor to file.")
  by_file: dict[str, set[str]] = {}
  for tensor, name in listed.items():
    if not isinstance(name, str) or not name or name in ('.', '..') or set(name) & set('/\\\0'):
      raise errors.UserError(f"{path}: '{tensor}' stands in {name!r}, which is no plain file name.")
    by_file.setdefault(name, set()).add(tensor)
  found: dict[str, tensors.Tensor] = {}
  files = tuple(path.parent / name for name in sorted(by_file))
  missing = [file.name for file in files if not file.is_file()]
  if missing:
    raise errors.UserError(f'{path}: missing beside it: {", ".join(missing)}.')
  for file in files:
    contents = open_shard(file)
    lacking = sorted(by_file[file.name] - set(contents.tensors))
    if lacking:
      raise errors.UserError(f'{path}: {file.name} lacks {_some(lacking)}, which it should hold.')
    surplus = sorted(set(contents.tensors) - by_file[file.name])
    if surplus:
      raise errors.UserError(f'{path}: {file.name} also holds {_some(surplus)}, not listed there.')
    found.update(contents.tensors)
  return tensors.Contents(found), files


def _some(names: list[str]) -> str:
  more = f' and {len(names) - 5} more' if len(names) > 5 else ''
  return ', '.join(f"'{name}'" for name in names[:5]) + more
