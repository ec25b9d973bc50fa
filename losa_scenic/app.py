"""Flags, locked config, seed and writer around a `main(rng, config, workdir, writer)`, as Scenic's.

A mistake that a user can mend ends with one message on stderr and exit code 1.
"""

import hashlib
import json
import pathlib
import re
import sys
from collections.abc import Callable, Sequence

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

from losa_scenic.common_lib import errors
from losa_scenic.train_lib import run_config, writers

_HELP = """usage: python -m losa_scenic.main --config=FILE.py [--workdir=DIR] [--config.KEY=VALUE ...]

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


def parse(argv: Sequence[str]) -> tuple[ml_collections.ConfigDict, pathlib.Path]:
  """The config with its overrides, checked, and the workdir.

  Raises:
    errors.UserError: for anything wrong with the command line or the config file.
    SystemExit: after --help.
  """
  if any(arg in ('--help', '-h', '--helpfull') for arg in argv):
    print(_HELP, end='')
    sys.exit(0)
  values = flags.FlagValues()
  config_flags.DEFINE_config_file('config', None, 'The run.', lock_config=True, flag_values=values)
  flags.DEFINE_string('workdir', None, 'Outputs.', flag_values=values)
  try:
    rest = values(list(argv))
    config = values.config
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as e:
    raise _as_user_error(e) from e
  if len(rest) > 1:
    raise errors.UserError(
      f'Unexpected argument {rest[1]!r}; options look like --config.KEY=VALUE.'
    )
  if config is None:
    raise errors.UserError(f'--config=FILE.py is required.\n{_HELP}')
  run_config.check(config)
  overrides = config_flags.get_override_values(values['config'])
  run_config.check_overrides(config, overrides)
  name = pathlib.Path(config_flags.get_config_filename(values['config']).split(':')[0]).stem
  return config, pathlib.Path(values.workdir or default_workdir(name, config))


def default_workdir(name: str, config: ml_collections.ConfigDict) -> pathlib.Path:
  """runs/<name>/<method>-<dataset>-<hash of the config>: the same command, the same directory."""
  content = json.dumps(run_config.resolve(config).to_dict(), sort_keys=True)
  digest = hashlib.sha256(content.encode()).hexdigest()[:8]
  return pathlib.Path('runs') / name / f'{config.method}-{config.dataset_name}-{digest}'


def _as_user_error(e: Exception) -> errors.UserError:
  """What ml_collections and absl raise for a bad config or flag, in one message."""
  if isinstance(e, errors.UserError):
    return e
  text = ' '.join(str(e).split())
  key = re.search(r'Key "([^"]+)" does not exist|No (?:field|key) .*?"([^"]+)"', text)
  if key:
    return errors.unknown('config key', key[1] or key[2], _all_keys())
  return errors.UserError(text)


def _all_keys() -> list[str]:
  def walk(block: ml_collections.ConfigDict, prefix: str) -> list[str]:
    keys = []
    for key in block:
      value = block[key]
      keys.append(prefix + key)
      if isinstance(value, ml_collections.ConfigDict):
        keys += walk(value, f'{prefix}{key}.')
    return keys

  return walk(run_config.default_config(), '')
