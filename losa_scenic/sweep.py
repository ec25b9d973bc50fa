"""Runs the sweep that a config file describes in `get_hyper`: `python -m losa_scenic.sweep`."""

import argparse
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Mapping, Sequence

from losa_scenic import app
from losa_scenic.bench_lib import hyper, results, sweep_population
from losa_scenic.bench_lib import sweep as engine
from losa_scenic.common_lib import errors
from losa_scenic.train_lib import run_config
from losa_scenic.train_lib import workdir as workdir_lib

MAIN_MODULE = 'losa_scenic.main'
_DESCRIPTION = """\
Trains every run that get_hyper(hyper) of a config file describes, each in a process of its own:

  python -m losa_scenic.main --config=FILE --workdir=DIR/NAME --config.KEY=VALUE ...

NAME is made of the run's overrides. Runs that are finished (summary.json) are skipped and the
others resume, so the same command continues a sweep that was stopped. DIR/results.jsonl gets a row
for each finished run, for `python -m losa_scenic.bench_lib.tables`; DIR/NAME/run.log holds what a
run printed. With --population, runs that differ only in what comes after the frozen backbone (see
docs/population.md) are one process, and DIR/results.jsonl has the same rows. Exit code: 0 all
finished, 1 some failed, 2 wrong usage, 128 + signal when stopped.
"""
_EXAMPLES = """\
overrides for every run:
  --config.KEY=VALUE     as for losa_scenic.main; KEY must not be one that get_hyper sweeps over

environment:
  Runs get the environment of this command. With --devices, slot i sees device number
  i modulo the number of devices (CUDA_VISIBLE_DEVICES). Where slots share a device (more slots
  than devices, or several slots without --devices), runs get XLA_PYTHON_CLIENT_PREALLOCATE=false
  unless the variable is set, so that the first one does not take the memory of the others.
  Runs share compiled programs through DIR/.jax_cache (JAX_COMPILATION_CACHE_DIR, unless set).

examples:
  python -m losa_scenic.sweep --config=FILE.py --workdir=DIR --dry-run
  python -m losa_scenic.sweep --config=FILE.py:ARG --workdir=DIR --slots=4 --devices=0,1
  python -m losa_scenic.sweep --config=FILE.py --workdir=DIR --population
"""


def plan(
  config: str,
  workdir: str | os.PathLike[str],
  overrides: Mapping[str, object] | None = None,
  main_module: str = MAIN_MODULE,
  population: bool = False,
) -> tuple[list[engine.Run], int]:
  """Works out the runs of a sweep; starts and writes nothing.

  Args:
    config: config file with `get_hyper`, with ':argument' if it takes one.
    workdir: sweep directory on a local disk.
    overrides: flags by key for every run.
    main_module: module that trains, run as `python -m`.
    population: train what can share a pass of the backbone in one run, see `sweep_population`.

  Returns:
    The runs in order, and the number of repetitions left out.

  Raises:
    errors.UserError: for a bad config or `get_hyper`, a key that is both swept and in
      `overrides`, or a `workdir` that is remote, a file, or belongs to another config.
  """
  if '://' in os.fspath(workdir):
    raise errors.UserError(f"--workdir must be a local folder, got '{os.fspath(workdir)}'.")
  root, common = pathlib.Path(workdir).expanduser().absolute(), dict(overrides or {})
  if root.exists() and not root.is_dir():
    raise errors.UserError(f"--workdir '{root}' is a file, not a folder.")
  if (root / 'sweep.json').exists():
    owner = results.read_object(root / 'sweep.json').get('config')
    if owner != _identity(config):
      raise errors.UserError(
        f"'{root}' holds a sweep of '{owner}', not of '{_identity(config)}': choose another"
        ' --workdir.'
      )
  sweep, repeated = hyper.expand(config)
  runs = []
  for own in sweep:
    if both := sorted(own.keys() & common.keys()):
      raise errors.UserError(
        f"'{both[0]}' is given for every run, but get_hyper of '{config}' sweeps over it."
      )
    name, merged = hyper.run_name(own, common), {**common, **own}
    command = [sys.executable, '-m', main_module, f'--config={config}', f'--workdir={root / name}']
    command += [hyper.flag(key, value) for key, value in merged.items()]
    runs.append(engine.Run(name, root / name, merged, command))
  return sweep_population.grouped(runs, common, root) if population else runs, repeated


def slot_environments(slots: int, devices: Sequence[str] = ()) -> list[dict[str, str]]:
  """Environment variables that each slot adds to the environment of its runs.

  Slot i sees device `devices[i % len(devices)]` through CUDA_VISIBLE_DEVICES. Where slots share a
  device (more slots than devices, or several slots and no devices listed), JAX is told not to
  reserve most of its memory at start: XLA_PYTHON_CLIENT_PREALLOCATE=false, unless the variable is
  set already.

  Args:
    slots: number of runs at a time.
    devices: device ids as CUDA_VISIBLE_DEVICES takes them; none leaves that variable alone.

  Returns:
    One dict a slot.

  Raises:
    errors.UserError: for less than one slot, or a device id that is empty or repeated.
  """
  if slots < 1:
    raise errors.UserError(f'--slots must be at least 1, got {slots}.')
  if len(set(devices)) < len(devices) or not all(devices):
    raise errors.UserError(f'--devices needs different, non-empty ids, got {",".join(devices)!r}.')
  added: dict[str, str] = {}
  if slots > max(len(devices), 1) and 'XLA_PYTHON_CLIENT_PREALLOCATE' not in os.environ:
    added['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'
  if not devices:
    return [dict(added) for _ in range(slots)]
  return [{**added, 'CUDA_VISIBLE_DEVICES': devices[i % len(devices)]} for i in range(slots)]


def core_shares(slots: int) -> list[list[int]]:
  """Splits the cores that this process may use into a share for each slot, as equal as can be.

  Raises:
    errors.UserError: if there are fewer cores than slots.
  """
  cores = sorted(os.sched_getaffinity(0))
  if len(cores) < slots:
    raise errors.UserError(f'--split-cores: {len(cores)} cores for {slots} slots.')
  return [cores[i * len(cores) // slots : (i + 1) * len(cores) // slots] for i in range(slots)]


def dry_run(runs: Sequence[engine.Run]) -> str:
  """A shell script of the commands that a sweep would run, with finished runs as comments.

  Args:
    runs: from `plan`.

  Returns:
    The script's text.

  Raises:
    errors.UserError: if a run's directory holds other overrides.
  """
  lines, waiting = [], 0
  for run in runs:
    if results.read_summary(run.directory, run.overrides) is not None:
      lines.append(f'# skip, finished: {run.name}')
      continue
    waiting += 1
    lines.append(f'# {"continue" if run.directory.exists() else "start"}: {run.name}')
    lines.append(shlex.join(run.command))
  lines.append(f'# {waiting} to run, {len(runs) - waiting} finished')
  return '\n'.join(lines)


def check_finished(runs: Sequence[engine.Run]) -> None:
  """Raises `UserError` if a finished run had another config than its command has now."""
  for run in runs:
    if results.read_summary(run.directory, run.overrides) is not None:
      config, _ = app.parse(['losa_scenic.main', *run.command[3:]])
      fields = run_config.resolve(config).to_dict()
      workdir_lib.check_same_run(run.directory, fields, run_config.MAY_CHANGE)


def run_sweep(
  config: str,
  workdir: str | os.PathLike[str],
  *,
  slots: int = 1,
  overrides: Mapping[str, object] | None = None,
  devices: Sequence[str] = (),
  save_results: str | os.PathLike[str] | None = None,
  main_module: str = MAIN_MODULE,
  grace_seconds: float = 20.0,
  split_cores: bool = False,
  population: bool = False,
) -> int:
  """Runs what is unfinished of a sweep and gathers the results; call it again to continue.

  Args:
    config: see `plan`.
    workdir: see `plan`.
    slots: how many runs at a time.
    overrides: see `plan`.
    devices: see `slot_environments`.
    save_results: where to copy results.jsonl, each time that it is written.
    main_module: see `plan`.
    grace_seconds: how long runs may take to end when the sweep is stopped.
    split_cores: bind each slot to its own share of the processor cores.
    population: see `plan`.

  Returns:
    Exit code: 0 if every run is finished, 1 if any failed, 128 + signal number if stopped.

  Raises:
    errors.UserError: as `plan` and `slot_environments`; if another sweep runs in `workdir`; if a
      run's directory holds other overrides, or a finished run of a config that has changed since.
  """
  environments = slot_environments(slots, devices)
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    cache = str(pathlib.Path(workdir).expanduser().absolute() / '.jax_cache')
    environments = [{**one, 'JAX_COMPILATION_CACHE_DIR': cache} for one in environments]
  runs, repeated = plan(config, workdir, overrides, main_module, population)
  root = pathlib.Path(workdir).expanduser().absolute()
  root.mkdir(parents=True, exist_ok=True)
  targets = [root / 'results.jsonl']
  if save_results:
    targets.append(pathlib.Path(save_results).expanduser())
  if main_module == MAIN_MODULE:
    check_finished(runs)
  with engine.lock(root / 'sweep.lock'):
    results.write_object(root / 'sweep.json', {'config': _identity(config)})
    if repeated:
      print(f'{repeated} repeated runs left out.')
    others = {path.parent for path in root.glob('*/overrides.json')} - {r.directory for r in runs}
    if others:
      print(f'{len(others)} directories here belong to no run of this sweep: not in the results.')
    cores = core_shares(slots) if split_cores else ()
    return engine.execute(runs, environments, targets, grace_seconds, cores)


def split_overrides(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
  """Takes the `--config.KEY=VALUE` and `--noconfig.KEY` flags out of a command line.

  Args:
    arguments: the command line without the program.

  Returns:
    The values by key, e.g. {'config.seed': '1'}, and the other arguments.

  Raises:
    errors.UserError: for a key without a value, or given twice.
  """
  overrides: dict[str, str] = {}
  rest = []
  for argument in arguments:
    match = re.fullmatch(r'--(no)?(config\.[^=]*)(?:=(.*))?', argument, re.DOTALL)
    if not match:
      rest.append(argument)
      continue
    negated, key, value = match.groups()
    if bool(negated) == (value is not None):
      raise errors.UserError(f"'{argument}' must have the form --config.KEY=VALUE.")
    if key in overrides:
      raise errors.UserError(f"'--{key}' is given twice.")
    overrides[key] = 'False' if negated else str(value)
  return overrides, rest


def main(arguments: Sequence[str] | None = None, main_module: str = MAIN_MODULE) -> int:
  """The command line.

  Args:
    arguments: arguments without the program; by default those of the process.
    main_module: see `plan`.

  Returns:
    The exit code, see `run_sweep`; 2 for a user's mistake.
  """
  parser = argparse.ArgumentParser(
    prog='python -m losa_scenic.sweep',
    description=_DESCRIPTION,
    epilog=_EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument('--config', required=True, metavar='FILE[:ARG]', help='has get_hyper(hyper)')
  parser.add_argument('--workdir', required=True, metavar='DIR', help='folder of the sweep')
  parser.add_argument('--slots', type=int, default=1, metavar='N', help='runs at a time (1)')
  parser.add_argument('--devices', metavar='ID,ID', help='GPUs to share out between the slots')
  parser.add_argument('--split-cores', action='store_true', help='bind each slot to its own cores')
  parser.add_argument('--save-results', metavar='FILE', help='copy results.jsonl to FILE as well')
  parser.add_argument('--population', action='store_true', help='one run where a pass is shared')
  parser.add_argument('--dry-run', action='store_true', help='print the commands, start nothing')
  try:
    overrides, rest = split_overrides(sys.argv[1:] if arguments is None else arguments)
    given = parser.parse_args(rest)
    devices = given.devices.split(',') if given.devices is not None else ()
    if given.dry_run:
      slot_environments(given.slots, devices)
      runs, _ = plan(given.config, given.workdir, overrides, main_module, given.population)
      print(dry_run(runs))
      return 0
    return run_sweep(
      given.config,
      given.workdir,
      slots=given.slots,
      overrides=overrides,
      devices=devices,
      save_results=given.save_results,
      split_cores=given.split_cores,
      population=given.population,
      main_module=main_module,
    )
  except (errors.UserError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2


def _identity(config: str) -> str:
  """What tells two configs apart wherever they lie: file name and argument."""
  path, colon, argument = config.partition(':')
  return f'{pathlib.Path(path).name}{colon}{argument}'


if __name__ == '__main__':
  sys.exit(main())
