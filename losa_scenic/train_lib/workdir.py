"""The directory of one run: locked while the run lives, its config written down and compared."""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from losa_scenic.common_lib import errors, hosts

_ATTEMPTS = 5


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
  """Holds the run's lock; the operating system frees it however the process ends.

  Of several processes the first holds it for all.

  Raises:
    errors.UserError: if the directory cannot be written, or a live run holds it.
  """
  with contextlib.ExitStack() as held:
    hosts.on_first(lambda: _lock(workdir, held))
    yield


def check_free(workdir: pathlib.Path) -> None:
  """Raises `UserError` if a live run holds the workdir, long before `locked` would.

  What comes before it may take minutes. Any process may look; nothing is written.
  """
  with contextlib.ExitStack() as held:
    try:
      file = held.enter_context((workdir / '.lock').open())
    except OSError:
      return  # No run has been here, or `locked` will say what is wrong.
    _flock(file, workdir)


def _lock(workdir: pathlib.Path, held: contextlib.ExitStack) -> None:
  """Takes the lock, to be freed with `held`."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    file = held.enter_context((workdir / '.lock').open('a+'))
  except OSError as e:
    raise errors.UserError(f'Cannot write to the workdir {workdir}: {e.strerror}.') from None
  _flock(file, workdir)
  file.truncate(0)
  file.write(f'host {socket.gethostname()}, process {os.getpid()}')
  file.flush()


def _flock(file: TextIO, workdir: pathlib.Path) -> None:
  """Locks a file until it is closed, however the process ends."""
  for attempt in reversed(range(_ATTEMPTS)):
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      return
    except BlockingIOError:
      if attempt:
        time.sleep(0.05)  # Another command may only be looking.
        continue
      file.seek(0)
      owner = file.read().strip() or 'another process'
      raise errors.UserError(
        f'The workdir {workdir} is in use by a live run ({owner}). Wait for it, or choose '
        'another --workdir.'
      ) from None
    except OSError as e:
      raise errors.UserError(
        f'Cannot lock the workdir {workdir} ({e.strerror}): its file system knows no locks. Choose '
        'a --workdir on another one.'
      ) from None


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON atomically: readers see the old file or the new one."""
  temporary = path.with_name(f'.{path.name}.tmp')
  with temporary.open('w') as file:
    file.write(json.dumps(value, indent=1, sort_keys=True) + '\n')
    file.flush()
    os.fsync(file.fileno())  # Else a power cut may leave an empty file under the new name.
  temporary.replace(path)


def what_matters(config: Mapping[str, Any], may_change: tuple[str, ...]) -> dict[str, Any]:
  """The fields of a config without those that may change, at any depth ('block.field')."""
  below = {name.partition('.')[0]: [] for name in may_change if '.' in name}
  for name in may_change:
    block, dot, rest = name.partition('.')
    if dot:
      below[block].append(rest)
  return {
    key: what_matters(value, tuple(below[key])) if key in below else value
    for key, value in config.items()
    if key not in may_change
  }


def check_same_run(
  workdir: pathlib.Path, config: Mapping[str, Any], may_change: tuple[str, ...]
) -> None:
  """Compares the config with the one that a former run wrote into the workdir, if any.

  A former run that left neither a checkpoint nor a summary is not in the way.

  Raises:
    errors.UserError: naming the fields that differ, other than those in `may_change`.
  """
  path = workdir / 'config.json'
  saved = any(folder.name.isdigit() for folder in workdir.glob('checkpoints/last/*'))
  if not path.exists() or not (saved or (workdir / 'summary.json').exists()):
    return
  try:
    former = json.loads(path.read_text())
  except (OSError, json.JSONDecodeError) as e:
    raise errors.UserError(
      f'Cannot read {path}: {e}. Delete it if this command is that of the run.'
    ) from None
  now = json.loads(json.dumps(dict(config)))
  lines = list(_differences(former, now, may_change))
  if lines:
    raise errors.UserError(
      '\n  '.join(
        [
          f'The workdir {workdir} holds a run with another config (there -> here):',
          *lines[:10],
          'Use the same config to continue that run, or choose another --workdir.',
        ]
      )
    )


def _differences(
  former: Mapping[str, Any], now: Mapping[str, Any], skip: tuple[str, ...], prefix: str = ''
) -> Iterator[str]:
  for key in sorted(set(former) | set(now)):
    a, b = former.get(key), now.get(key)
    if prefix + key in skip:
      continue
    if isinstance(a, dict) and isinstance(b, dict):
      yield from _differences(a, b, skip, f'{prefix}{key}.')
    elif a != b:
      yield f'{prefix}{key}: {json.dumps(a)} -> {json.dumps(b)}'
