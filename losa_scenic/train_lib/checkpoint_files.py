"""One checkpoint as a folder: its arrays, what they are, and a SHA-256 of every file.

  <folder>/state.safetensors  the arrays by path, e.g. 'trainable/head/kernel'
  <folder>/meta.json          what is known of them; see `checkpoints`
  <folder>/manifest.json      size and SHA-256 of every other file, and a SHA-256 of that table

Nothing is read that was not verified before: a flipped bit would give wrong numbers without a word.
A folder is written beside its place, synced to disk and renamed: at any moment it is there in full
or not at all.
"""

import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy

_META, _MANIFEST, _STATE = 'meta.json', 'manifest.json', 'state.safetensors'
_TEMPORARY = '.tmp-'
_DAMAGED = '.damaged'


def write(folder: pathlib.Path, arrays: Mapping[str, np.ndarray], meta: str) -> None:
  """Writes a checkpoint.

  Args:
    folder: its place, which is free; the parent exists.
    arrays: by path, in C order.
    meta: the text of meta.json.

  Raises:
    Exception: OSError or SafetensorError, see `reason`. What was written is removed, if possible.
  """
  temporary = folder.with_name(_TEMPORARY + folder.name)
  try:
    _remove(temporary)
    temporary.mkdir()
    (temporary / _META).write_text(meta)
    safetensors.numpy.save_file(dict(arrays), temporary / _STATE)
    table = {name: _facts(temporary / name) for name in (_META, _STATE)}
    (temporary / _MANIFEST).write_bytes(_manifest(table))
    for name in (_META, _STATE, _MANIFEST, ''):
      sync(temporary / name)
    temporary.rename(folder)
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise
  sync(folder.parent)


def problem(folder: pathlib.Path) -> str | None:
  """What is wrong with a checkpoint's files, naming the first of them, or None.

  Raises:
    PermissionError: if a file may not be read: that is no damage.
  """
  try:
    raw = (folder / _MANIFEST).read_bytes()
    table = json.loads(raw)['files']
    # Written again from what was read: a byte that means nothing would show as well.
    if _manifest(table) != raw:
      return f'{_MANIFEST} is damaged (its SHA-256 differs)'
    found = _names(folder) - {_MANIFEST}
    lines = [f'{name} is not in the manifest' for name in sorted(found - set(table))]
    for name, facts in table.items():
      line = _compare(folder / name, facts) if name in found else 'is missing'
      if line:
        lines.append(f'{name} {line}')
  except FileNotFoundError as e:
    return f'{pathlib.Path(e.filename).relative_to(folder)} is missing'
  except PermissionError:
    raise
  except OSError as e:
    return f'{pathlib.Path(e.filename).relative_to(folder)} cannot be read ({e.strerror})'
  except (ValueError, KeyError, TypeError, RecursionError):
    return f'{_MANIFEST} is damaged (it is no manifest)'
  if not lines:
    return None
  return lines[0] + (f' (and {len(lines) - 1} more)' if len(lines) > 1 else '')


def is_older_format(folder: pathlib.Path) -> bool:
  """Whether a folder was written before there were manifests (format 2)."""
  return (folder / 'meta').is_dir() and not (folder / _MANIFEST).exists()


def read_meta(folder: pathlib.Path) -> dict[str, Any]:
  """The content of meta.json of a checkpoint without a `problem`."""
  return json.loads((folder / _META).read_text())


def read_arrays(folder: pathlib.Path, leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The arrays of a checkpoint without a `problem`.

  Args:
    folder: the checkpoint.
    leaves: path -> (shape, dtype name), of all.

  Raises:
    ValueError: if they are not those.
  """
  arrays = safetensors.numpy.load_file(folder / _STATE)
  found = {path: [list(a.shape), a.dtype.name] for path, a in arrays.items()}
  if found != {path: [list(shape), dtype] for path, (shape, dtype) in leaves.items()}:
    raise ValueError(f'{folder / _STATE} holds other arrays than {_META} says.')
  return arrays


def steps(directory: pathlib.Path) -> list[int]:
  """Steps of the checkpoints in a directory, in order; none if it is not there."""
  names = os.listdir(directory) if directory.is_dir() else ()
  return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)


def damaged(directory: pathlib.Path) -> list[str]:
  """Names of what was set aside in a directory."""
  names = os.listdir(directory) if directory.is_dir() else ()
  return sorted(name for name in names if _DAMAGED in name)


def set_aside(folder: pathlib.Path) -> str:
  """Renames a damaged checkpoint, so that it is no longer one; returns its new name."""
  name, number = folder.name + _DAMAGED, 1
  while (folder.parent / name).exists():
    number += 1
    name = f'{folder.name}{_DAMAGED}-{number}'
  folder.rename(folder.parent / name)
  sync(folder.parent)
  return name


def delete(folder: pathlib.Path) -> None:
  """Deletes a checkpoint; killed in the middle, it leaves none that looks whole."""
  doomed = folder.with_name(f'{_TEMPORARY}deleted-{folder.name}')
  _remove(doomed)
  folder.rename(doomed)
  _remove(doomed)


def clean(directory: pathlib.Path) -> None:
  """Removes what a killed `write` or `delete` left."""
  for leftover in directory.glob(f'{_TEMPORARY}*'):
    _remove(leftover)


def sync(path: pathlib.Path) -> None:
  """Waits until a file, or the list of names of a directory, is on disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def reason(e: Exception) -> str:
  """What the system says went wrong, or else the first line of the error."""
  if isinstance(e, OSError) and e.strerror:
    return e.strerror
  system = re.search(r'os error (\d+)', str(e))  # In the words of safetensors.
  first_line = str(e).strip().partition('\n')[0]
  return os.strerror(int(system[1])) if system else f'{type(e).__name__}: {first_line}'[:300]


def _names(folder: pathlib.Path) -> set[str]:
  """All files below a folder, relative to it."""

  def unreadable(e: OSError) -> None:
    raise e

  return {
    pathlib.Path(place, name).relative_to(folder).as_posix()
    for place, _, names in os.walk(folder, onerror=unreadable)
    for name in names
  }


def _facts(file: pathlib.Path) -> list:
  """[size in bytes, SHA-256]."""
  try:
    with open(file, 'rb') as opened:
      digest = hashlib.file_digest(opened, 'sha256').hexdigest()
      return [opened.tell(), digest]
  except OSError as e:
    e.filename = file  # An error in the middle of reading has none.
    raise


def _compare(file: pathlib.Path, facts: list) -> str | None:
  size, digest = _facts(file)
  if size != facts[0]:
    return f'is damaged ({size:,} bytes, not {facts[0]:,})'
  return None if digest == facts[1] else 'is damaged (its SHA-256 differs)'


def _manifest(table: Mapping[str, list]) -> bytes:
  """The one way to write a manifest down."""
  digest = hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()
  return (json.dumps({'files': table, 'sha256': digest}, sort_keys=True, indent=1) + '\n').encode()


def _remove(folder: pathlib.Path) -> None:
  if folder.is_dir():
    shutil.rmtree(folder)
  else:
    folder.unlink(missing_ok=True)
