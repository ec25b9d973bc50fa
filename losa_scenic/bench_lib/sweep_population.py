"""A sweep as few runs: what can share a pass of the backbone becomes one population."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from losa_scenic.bench_lib import hyper
from losa_scenic.bench_lib.sweep import Run
from losa_scenic.common_lib import errors
from losa_scenic.train_lib import members, run_config
from losa_scenic.train_lib.member_folder import FOLDER


def grouped(runs: Sequence[Run], common: Mapping[str, Any], root: pathlib.Path) -> list[Run]:
  """The runs of a sweep as populations, one for each setting of what members cannot differ in.

  A table over data sets and ranks becomes a run for each data set, whose members are the ranks.

  Args:
    runs: of a sweep, with commands that end in a flag for each override.
    common: overrides that all runs share.
    root: the sweep's folder.

  Returns:
    Runs with `members`, in the order of the first member of each; what shares with nobody stays.

  Raises:
    errors.UserError: for overrides that no member can have, or a population in the sweep already.
  """
  groups: dict[str, list[Run]] = {}
  for run in runs:
    if 'config.population' in run.overrides:
      raise errors.UserError('--population makes populations: leave config.population out.')
    groups.setdefault(hyper.canonical(_split(run, common)[0]), []).append(run)
  return [
    _population(group, common, root) if len(group) > 1 else group[0] for group in groups.values()
  ]


def _split(run: Run, common: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """A run's own overrides: those that all members must have, and the others."""
  own = {key: value for key, value in run.overrides.items() if key not in common}
  shared = {key: value for key, value in own.items() if not members.may_differ(key)}
  return shared, {key: value for key, value in own.items() if key not in shared}


def _population(group: Sequence[Run], common: Mapping[str, Any], root: pathlib.Path) -> Run:
  shared = _split(group[0], common)[0]
  given = [_split(run, common)[1] for run in group]
  parsed = members.parse(given, run_config.default_config()) or []
  name = hyper.run_name(shared, {**common, 'config.population': parsed})
  overrides = {**common, **shared, 'config.population': parsed}
  start = group[0].command[: -len(group[0].overrides) or None]
  start = [*start[:-1], f'--workdir={root / name}']
  # A text for absl: a list would be written as a tuple, which means the same.
  flags = [hyper.flag(key, value) for key, value in overrides.items()]
  directories = [root / name / FOLDER / member for member in members.names(parsed)]
  inside = tuple(
    Run(run.name, directory, run.overrides, [])
    for run, directory in zip(group, directories, strict=True)
  )
  return Run(name, root / name, overrides, [*start, *flags], inside)
