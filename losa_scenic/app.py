"""Flags, locked config, seed and writer around a `main(rng, config, workdir, writer)`, as Scenic's.

A mistake that a user can mend ends with one message on stderr and exit code 1.
"""

import difflib
import hashlib
import itertools
import json
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Config
from losa_scenic.train_lib import run_config, writers
from losa_scenic.train_lib import workdir as workdir_lib

_HELP = """\
usage: python -m losa_scenic.main --config=FILE.py [--config.KEY=VALUE ...] [--workdir=DIR]

  --config=FILE.py     the run: a Python file with get_config(); try configs/quickstart.py
  --config.KEY=VALUE   changes a field of it, e.g. --config.method=linear
                       --config.lr_configs.base_learning_rate=0.01
  --workdir=DIR        where checkpoints, curves and summary.json go; the same DIR continues an
                       interrupted run (default: runs/<config>/<method>-<dataset>-<hash>)
"""


def run(main: Callable[..., None], argv: Sequence[str] | None = None) -> None:
  """Parses the command line, calls `main`, and exits: 0 only if it returned."""
  try:
    config, workdir = parse(sys.argv if argv is None else argv)
    writer = writers.create_default_writer(workdir)
    main(rng=jax.random.key(config.rng_seed), config=config, workdir=workdir, writer=writer)
  except errors.UserError as e:
    print(f'error: {e}', file=sys.stderr)
    sys.exit(1)
  except KeyboardInterrupt:
    print('interrupted; the same command continues from the last checkpoint', file=sys.stderr)
    sys.exit(130)


def parse(argv: Sequence[str]) -> tuple[Config, pathlib.Path]:
  """The config with its overrides, checked, and the workdir.

  Raises:
    errors.UserError: for anything wrong with the command line or the config file.
    SystemExit: after --help.
  """
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
  run_config.check(config)
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
