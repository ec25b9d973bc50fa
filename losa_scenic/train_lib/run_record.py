"""`run.json`: when, where, by what and with what a run was started, and how each start ended."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax

import losa_scenic
from losa_scenic.common_lib import hosts
from losa_scenic.train_lib import workdir as workdir_lib

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'safetensors', 'numpy', 'grain')
_GIT_SECONDS = 1.0


class RunRecord:
  """Writes `<workdir>/run.json`: {'starts': [...]}, an entry each time a process starts the run.

  Every process may call it; process 0 alone reads and writes. The file is replaced whole each time,
  so a reader sees the old one or the new one. An entry holds

    started, ended: UTC, ISO 8601; `ended` is null while the run lives, and after a kill.
    how: 'finished', 'stopped by SIGTERM', 'error: ...'; null as `ended` is.
    from_step: of the checkpoint that it continues from; null at the first start.
    step: where it ended.
    host, process_id, command
    processes, devices, device_kind, mesh: of the whole run.
    versions: of the packages, Python and the platform.
    git: see `git_state`.
    config: resolved.
  """

  def __init__(self, workdir: pathlib.Path):
    """Nothing is written yet."""
    self._path = pathlib.Path(workdir) / 'run.json'
    self._starts: list[dict[str, Any]] = []

  def start(
    self, config: Mapping[str, Any], mesh_shape: Mapping[str, int], step: int | None
  ) -> None:
    """Adds an entry.

    Args:
      config: resolved; `ConfigDict.to_dict()` of one.
      mesh_shape: devices along each axis.
      step: that the run continues from, None at the first start.

    Raises:
      OSError: if the file cannot be written.
    """
    if not hosts.is_first():
      return
    self._starts = [
      *_former(self._path),
      {
        'started': _now(),
        'from_step': step,
        'host': socket.gethostname(),
        'process_id': os.getpid(),
        'command': shlex.join(sys.orig_argv),
        'processes': jax.process_count(),
        'devices': jax.device_count(),
        'device_kind': jax.devices()[0].device_kind,
        'mesh': {axis: int(size) for axis, size in mesh_shape.items()},
        'versions': versions(),
        'git': git_state(),
        'config': json.loads(json.dumps(dict(config), default=str)),
        'ended': None,
        'how': None,
        'step': None,
      },
    ]
    self._write()

  def end(self, how: str, step: int | None) -> None:
    """Completes the entry of `start`; does nothing where there is none, or where it cannot.

    Args:
      how: in words.
      step: steps done.
    """
    if not self._starts:
      return
    self._starts[-1] |= {'ended': _now(), 'how': how, 'step': step}
    try:
      self._write()
    except OSError as e:
      print(f'{self._path} was not completed: {e.strerror or e}.', file=sys.stderr)

  def _write(self) -> None:
    workdir_lib.write_json(self._path, {'starts': self._starts})


def versions() -> dict[str, str | None]:
  """Versions of this package, those it rests on, Python and the platform; None: not installed."""
  return {
    'losa_scenic': losa_scenic.__version__,
    **{name: _version(name) for name in _PACKAGES},
    'python': platform.python_version(),
    'platform': platform.platform(),
  }


def git_state(package: pathlib.Path | None = None) -> dict[str, Any] | None:
  """The commit that the code is at; takes a second at most.

  Args:
    package: a folder of code, by default that of this package, at the top of a checkout.

  Returns:
    {'commit': SHA-1, None before the first one, 'dirty': whether files of the package differ from
    it or are unknown to git}; None if the package is in no checkout of its own, or git is missing,
    fails, or does not answer in time.
  """
  package = pathlib.Path(losa_scenic.__file__).parent if package is None else package
  root = package.resolve().parent
  if not (root / '.git').exists():  # An installed package may lie in somebody else's checkout.
    return None
  environment = {k: v for k, v in os.environ.items() if not k.startswith('GIT_')}
  # Another user may own the checkout; and nothing else is to be started, which could hang.
  command = ['git', '-c', f'safe.directory={root}', '-c', 'core.fsmonitor=false']
  command += ['--no-optional-locks', 'status', '--porcelain=v2', '--branch']
  command += ['--ignore-submodules=all', '--', package.name]
  try:
    answer = subprocess.run(
      command,
      cwd=root,
      env=environment,
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
      errors='replace',
      timeout=_GIT_SECONDS,
      check=True,
    ).stdout.splitlines()
  except (OSError, subprocess.SubprocessError):
    return None
  commit = next((line.split()[2] for line in answer if line.startswith('# branch.oid ')), None)
  dirty = any(not line.startswith('#') for line in answer)
  return {'commit': None if commit == '(initial)' else commit, 'dirty': dirty}


def _former(path: pathlib.Path) -> list[dict[str, Any]]:
  """The entries of an earlier file; one that is damaged is set aside."""
  try:
    starts = json.loads(path.read_text())['starts']
    if all(isinstance(entry, dict) for entry in starts):
      return list(starts)
  except FileNotFoundError:
    return []
  except (OSError, ValueError, KeyError, TypeError):
    pass
  aside = path.with_name(f'{path.name}.damaged')
  path.replace(aside)
  print(f'{path} is damaged: it is {aside.name} now, and a new one begins.', file=sys.stderr)
  return []


def _version(name: str) -> str | None:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
