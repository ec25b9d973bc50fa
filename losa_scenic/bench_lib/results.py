"""Result files: JSON lines (one row a finished run) and single JSON objects, written atomically."""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from losa_scenic.common_lib import errors

Row = dict[str, Any]
PathLike = str | os.PathLike[str]

_TAIL_BYTES = 16384


def read_rows(path: PathLike) -> list[Row]:
  """Reads a file of JSON lines; blank lines are skipped.

  Args:
    path: the file.

  Returns:
    One dict a line, in file order.

  Raises:
    errors.UserError: if the file is missing or not UTF-8, or a line is not a JSON object; the
      message starts with `file:line`.
  """
  rows = []
  for number, line in enumerate(_read_text(path).split('\n'), start=1):
    if line.strip():
      rows.append(_parse(line, where=f'{os.fspath(path)}:{number}'))
  return rows


def write_rows(path: PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
  """Replaces the file by these rows in one step: a reader sees the old file or the new one.

  Args:
    path: the file; its folder is made if missing.
    rows: dicts of JSON values.

  Raises:
    errors.UserError: if a row holds something that JSON has no form for.
  """
  text = ''.join(f'{_dump(row, os.fspath(path))}\n' for row in rows)
  _replace(path, text)


def read_object(path: PathLike) -> Row:
  """Reads a file that holds one JSON object.

  Raises:
    errors.UserError: if the file is missing, not UTF-8 or not a JSON object, naming it.
  """
  return _parse(_read_text(path), where=os.fspath(path))


def write_object(path: PathLike, value: Mapping[str, Any]) -> None:
  """Replaces the file by this JSON object in one step, indented for reading.

  Raises:
    errors.UserError: if the object holds something that JSON has no form for.
  """
  _replace(path, _dump(value, os.fspath(path), indent=2) + '\n')


def read_summary(directory: PathLike, overrides: Mapping[str, Any]) -> Row | None:
  """The summary.json of a sweep's run, or None while the run is unfinished.

  Args:
    directory: the run's directory.
    overrides: what its overrides.json must hold; the file may be missing, as it is where a user
      started the command of a dry run by hand.

  Raises:
    errors.UserError: if the directory belongs to other overrides or a file in it is damaged.
  """
  stored, summary = (pathlib.Path(directory) / f'{name}.json' for name in ('overrides', 'summary'))
  found = read_object(stored) if stored.exists() else overrides
  if json.dumps(found, sort_keys=True) != json.dumps(overrides, sort_keys=True):
    raise errors.UserError(
      f"'{os.fspath(directory)}' holds a run with other overrides: {found}; this sweep has"
      f' {dict(overrides)}. Remove the directory or choose another --workdir.'
    )
  return read_object(summary) if summary.exists() else None


def tail(path: PathLike, offset: int = 0, lines: int = 15) -> str:
  """The last lines of a log, indented; of a line that a progress bar rewrote, the last state.

  Args:
    path: the log.
    offset: byte from which on the log counts.
    lines: how many lines at most.
  """
  if not pathlib.Path(path).exists():
    return '  | (the log is gone)'
  with pathlib.Path(path).open('rb') as file:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(offset, size - _TAIL_BYTES))
    text = file.read().decode('utf-8', errors='replace')
  kept = [line.rstrip('\r').rsplit('\r')[-1] for line in text.rstrip().split('\n')[-lines:]]
  return '\n'.join(f'  | {line}' for line in kept)


def _read_text(path: PathLike) -> str:
  try:
    return pathlib.Path(path).read_text(encoding='utf-8')
  except FileNotFoundError:
    raise errors.UserError(f"No such file: '{os.fspath(path)}'.") from None
  except IsADirectoryError:
    raise errors.UserError(f"'{os.fspath(path)}' is a folder, not a file.") from None
  except UnicodeDecodeError as error:
    raise errors.UserError(f"'{os.fspath(path)}' is not UTF-8 text: {error}.") from None


def _parse(text: str, where: str) -> Row:
  try:
    value = json.loads(text)
  except json.JSONDecodeError as error:
    raise errors.UserError(f'{where}: not valid JSON ({error}).') from None
  if not isinstance(value, dict):
    kind = type(value).__name__
    raise errors.UserError(f'{where}: expected a JSON object {{...}}, got a {kind}.')
  return value


def _dump(value: Mapping[str, Any], where: str, indent: int | None = None) -> str:
  try:
    return json.dumps(value, ensure_ascii=False, indent=indent)
  except TypeError as error:
    raise errors.UserError(f'{where}: cannot write {value!r} as JSON ({error}).') from None


def _replace(path: PathLike, text: str) -> None:
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  try:
    temporary.write_text(text, encoding='utf-8')
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
