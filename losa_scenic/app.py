"""Flags, locked config, seed and writer around a `main(rng, config, workdir, writer)`, as Scenic's.

A mistake that a user can mend ends with one message on stderr and exit code 1, as does a disk that
is full. 3: training has diverged; 4: nothing moved for too long; 128 + n: stopped by signal n.
"""

import difflib
import errno
import hashlib
import itertools
import json
import os
import pathlib
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

from losa_scenic.common_lib import allocator, cluster, errors, hosts
from losa_scenic.common_lib.types import Config
from losa_scenic.train_lib import run_config, stopping, writers
from losa_scenic.train_lib import workdir as workdir_lib

_PROFILE_STEPS = 10
_LEAVE_SECONDS, _LAST_SECONDS = 5.0, 1.0
# A disk that is full, over quota, read-only, or broken.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
_HELP = """\
usage: python -m losa_scenic.main --config=FILE.py [--config.KEY=VALUE ...] [--workdir=DIR]

  --config=FILE.py     the run: a Python file with get_config(); try configs/quickstart.py
  --config.KEY=VALUE   changes a field of it, e.g. --config.method=linear
                       --config.lr_configs.base_learning_rate=0.01
  --workdir=DIR        where checkpoints, curves and summary.json go; the same DIR continues an
                       interrupted run (default: runs/<config>/<method>-<dataset>-<hash>)
  --profile            traces ten steps for TensorBoard (--config.profile_steps=N: N of them)

Several processes of one run (found out under SLURM, Open MPI and Kubernetes):
  --coordinator_address=HOST:PORT --num_processes=N --process_id=0...N-1
"""


def run(
  main: Callable[..., None], argv: Sequence[str] | None = None, *, ends_process: bool | None = None
) -> None:
  """Parses the command line, calls `main`, and exits: 0 only if it returned.

  Args:
    main: takes rng, config, workdir and writer.
    argv: the program and its arguments; by default those of the process.
    ends_process: after a failure the process ends in any case, at once if it is one of several,
      and otherwise in a few seconds even if a thread is stuck in a read. By default only without
      `argv`: whoever gives that may go on.
  """
  status, said = 1, ''
  ends_process = argv is None if ends_process is None else ends_process
  if ends_process:
    allocator.keep_memory()
  try:
    given = sys.argv if argv is None else argv
    for arg in given:
      if arg.startswith('--workdir='):  # The flags know it only after a second of imports.
        workdir_lib.check_free(pathlib.Path(arg.partition('=')[2]))
    values, path = _flags(given)
    cluster.join(values.coordinator_address, values.num_processes, values.process_id)
    config, workdir = _checked(values, path)
    with workdir_lib.locked(workdir):
      pass  # Before the data is opened, which may take minutes.
    writer = writers.create_default_writer(workdir) if hosts.is_first() else writers.MultiWriter()
    main(rng=jax.random.key(config.rng_seed), config=config, workdir=workdir, writer=writer)
    return
  except errors.UserError as e:
    status, said = e.exit_code, f'error: {e}'
  except stopping.Stopped as e:
    status, said = e.exit_code, str(e)
  except KeyboardInterrupt:
    status, said = 130, 'interrupted; the same command continues from the last checkpoint, if any'
  except OSError as e:
    if e.errno not in _DISK:
      if not jax.distributed.is_initialized():
        raise
      traceback.print_exc()
    where = f' ({e.filename})' if e.filename else ''
    said = (
      f'error: {e.strerror}{where}. When that is mended, the same command continues from the last '
      'checkpoint.'
    )
  except Exception as e:
    if not jax.distributed.is_initialized():
      raise
    traceback.print_exc()
    said = f'error: {type(e).__name__} in process {jax.process_index()} of {jax.process_count()}'
  print(said, file=sys.stderr, flush=True)
  if jax.distributed.is_initialized() and ends_process:
    # Leaving in the usual way waits for the other processes, which may wait for this one. Process 0
    # goes last: JAX aborts those that lose it.
    if jax.process_index() == 0:
      time.sleep(_LAST_SECONDS)
    sys.stdout.flush()
    os._exit(status)
  if ends_process:
    _leave_soon(status)
  sys.exit(status)


def _leave_soon(status: int) -> None:
  """Sees to it that the process ends: a thread may be stuck in a read that never returns."""
  timer = threading.Timer(_LEAVE_SECONDS, os._exit, (status,))
  timer.daemon = True
  timer.start()


def parse(argv: Sequence[str]) -> tuple[Config, pathlib.Path]:
  """The config with its overrides, checked, and the workdir.

  Raises:
    errors.UserError: for anything wrong with the command line or the config file.
    SystemExit: after --help.
  """
  return _checked(*_flags(argv))


def _flags(argv: Sequence[str]) -> tuple[Any, pathlib.Path]:
  """The flags' values, and the config file."""
  if any(arg in ('--help', '-h', '--helpfull') for arg in argv):
    print(_HELP, end='')
    sys.exit(0)
  path = _config_path(argv)
  if not path:
    raise errors.UserError(f'--config=FILE.py is required.\n{_HELP}')
  if not path.is_file():
    raise errors.UserError(f'There is no config file {path} (--config).')
  values = flags.FlagValues()
  config_flags.DEFINE_config_file(
    'config', None, 'The run.', lock_config=True, flag_values=values, sys_argv=list(argv)
  )
  flags.DEFINE_string('workdir', None, 'Outputs.', flag_values=values)
  flags.DEFINE_bool('profile', False, 'Trace some steps.', flag_values=values)
  flags.DEFINE_string('coordinator_address', None, 'Of process 0.', flag_values=values)
  for name in ('num_processes', 'process_id'):
    flags.DEFINE_integer(name, None, 'Of this run.', flag_values=values)
  sys.modules.pop('config_config', None)  # Else a second parse would see the first one's file.
  try:
    rest = values(list(argv))
    config: Any = values.config
  except Exception as e:  # A config file is a program: it may raise anything.
    raise _as_user_error(e, path, argv) from e
  if len(rest) > 1:
    raise errors.UserError(
      f'Unexpected argument {rest[1]!r}; options look like --config.KEY=VALUE.'
    )
  if not isinstance(config, ml_collections.ConfigDict):
    raise errors.UserError(f'{path}: get_config() must return an ml_collections.ConfigDict.')
  return values, path


def _checked(values: Any, path: pathlib.Path) -> tuple[Config, pathlib.Path]:
  """The config and the workdir that flags name."""
  config = values.config
  run_config.check(config)
  if values.profile and not config.profile_steps:
    config.profile_steps = _PROFILE_STEPS
  overrides = config_flags.get_override_values(values['config'])
  run_config.check_overrides(config, overrides)
  return config, pathlib.Path(values.workdir or default_workdir(path.stem, config))


def _config_path(argv: Sequence[str]) -> pathlib.Path | None:
  """The file of --config=FILE[:ARGUMENT] or --config FILE, or None."""
  for arg, following in itertools.zip_longest(argv[1:], argv[2:], fillvalue=''):
    name, equals, value = arg.partition('=')
    if name in ('--config', '-config'):
      value = (value if equals else following).partition(':')[0]
      return pathlib.Path(value) if value else None
  return None


def default_workdir(name: str, config: Config) -> pathlib.Path:
  """runs/<name>/<method>-<dataset>-<hash of the config>: the same command, the same directory."""
  fields = run_config.resolve(config).to_dict()
  content = json.dumps(workdir_lib.what_matters(fields, run_config.MAY_CHANGE), sort_keys=True)
  digest = hashlib.sha256(content.encode()).hexdigest()[:8]
  return pathlib.Path('runs') / name / f'{config.method}-{config.dataset_name}-{digest}'


def _as_user_error(e: Exception, path: pathlib.Path, argv: Sequence[str]) -> errors.UserError:
  """What a config file, ml_collections or absl raises, in one message."""
  for arg in argv:
    given = re.fullmatch(r'--?(?:no)?config\.([^=]+)(=.*)?', arg, re.DOTALL)
    if given:
      _check_known(given[1])
  cause: BaseException | None = e
  while cause is not None:  # ml_collections raises anew, with a traceback for a text.
    if isinstance(cause, errors.UserError):
      return cause
    line = _line_in(path, cause)
    if line:
      return errors.UserError(f'{path}:{line}: {_describe(cause)}')
    cause = cause.__cause__ or cause.__context__
  text = [line.strip() for line in str(e).splitlines() if line.strip()]
  if isinstance(e, AttributeError) and "'get_config'" in str(e):
    return errors.UserError(f'{path} defines no get_config().')
  if 'parsing config file' in str(e):
    return errors.UserError(f'{path}: {text[-1]}')
  return errors.UserError(' '.join(text))


def _check_known(key: str) -> None:
  """Raises `UserError` for a key 'block.field' that the schema does not have."""
  block, done = run_config.default_config(), ''
  for part in key.split('.'):
    if not isinstance(block, ml_collections.ConfigDict) or (done and not len(block)):
      return
    if part not in block:
      raise errors.unknown('config key', done + part, (done + name for name in block))
    block, done = block[part], f'{done}{part}.'


def _line_in(path: pathlib.Path, e: BaseException) -> int | None:
  """The last line of the config file that the exception passed through."""
  if isinstance(e, SyntaxError) and e.filename and pathlib.Path(e.filename).name == path.name:
    return e.lineno
  lines = [
    frame.lineno
    for frame in traceback.extract_tb(e.__traceback__)
    if pathlib.Path(frame.filename).absolute() == path.absolute()
  ]
  return lines[-1] if lines else None


def _describe(e: BaseException) -> str:
  key = re.search(r'Key "([^"]+)" does not exist', str(e))
  if isinstance(e, (AttributeError, KeyError)) and key:
    keys = {name.rpartition('.')[2]: name for name in reversed(_all_keys())}
    near = difflib.get_close_matches(key[1], keys, n=1)
    hint = f" Did you mean '{keys[near[0]]}'?" if near else ''
    return f"Unknown config key '{key[1]}'.{hint}"
  text = e.msg if isinstance(e, SyntaxError) else str(e)
  return f'{type(e).__name__}: {" ".join(text.split())}'


def _all_keys() -> list[str]:
  def walk(block: Config, prefix: str) -> list[str]:
    keys = []
    for key in block:
      value = block[key]
      keys.append(prefix + key)
      if isinstance(value, ml_collections.ConfigDict):
        keys += walk(value, f'{prefix}{key}.')
    return keys

  return walk(run_config.default_config(), '')
