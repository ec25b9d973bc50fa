"""The images of a run that could not be read, each listed once; too many end the run."""

import csv
import os
import pathlib
import sys
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from losa_scenic.common_lib import errors

_SHOWN = 5  # said on the terminal; the others are only in the file


class Problem(NamedTuple):
  """One image that could not be read.

  Attributes:
    split: 'train', 'valid' or 'test'.
    index: its position there.
    id: its name.
    reason: what is wrong with it.
  """

  split: str
  index: int
  id: str
  reason: str


class BadFiles:
  """Collects problems; once it knows a file, keeps them there as CSV.

  It is the main process's: loader processes tell it what they met.

  Attributes:
    problems: everything seen, by (split, id).
    path: the file; None before `keep_in`.
  """

  def __init__(self, counts: Mapping[str, int], max_bad_fraction: float) -> None:
    """Nothing is bad yet.

    Args:
      counts: number of images of each split.
      max_bad_fraction: more problems than this share of a split are an error.
    """
    self.problems: dict[tuple[str, str], Problem] = {}
    self.path: pathlib.Path | None = None
    self._counts, self._max_bad_fraction = dict(counts), max_bad_fraction

  def keep_in(self, path: str | os.PathLike[str]) -> None:
    """Reads what an interrupted run listed in `path`, and lists there from now on.

    The file exists only if something is bad. It is written anew for each new problem, so it is
    whole whenever a run is killed.

    Raises:
      errors.UserError: if there is such a file and it is no list of problems.
    """
    self.path = pathlib.Path(path)
    found = list(self.problems.values())
    self.problems = {}
    if self.path.exists():
      try:
        with self.path.open(newline='', encoding='utf-8', errors='surrogateescape') as file:
          for row in csv.DictReader(file, strict=True):
            problem = Problem(row['split'], int(row['index']), row['id'], row['reason'])
            self.problems[problem.split, problem.id] = problem
      except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise errors.UserError(f'{path}: not a list of unreadable images ({error!r}).') from error
    self.add(found)

  def add(self, problems: Iterable[Problem]) -> None:
    """Lists the problems that are new, and says the first few on stderr.

    Raises:
      errors.UserError: if there are now more of a split than allowed.
    """
    met = {(p.split, p.id): p for p in problems}
    new = [problem for key, problem in met.items() if key not in self.problems]
    for problem in new:
      self.problems[problem.split, problem.id] = problem
      if len(self.problems) <= _SHOWN:
        text = f'bad image ({problem.split}): {problem.id}: {problem.reason}'
        print(text.encode(errors='backslashreplace').decode(), file=sys.stderr)
    if new and self.path is not None:
      self._write(self.path)
    for problem in met.values():  # Those that are known too: a run over its limit is no other run.
      self._check(problem)

  def _write(self, path: pathlib.Path) -> None:
    unfinished = path.with_name(f'{path.name}.tmp')
    with unfinished.open('w', newline='', encoding='utf-8', errors='surrogateescape') as file:
      writer = csv.writer(file)
      writer.writerow(Problem._fields)
      writer.writerows(self.problems.values())
    os.replace(unfinished, path)

  def _check(self, problem: Problem) -> None:
    """Raises if there are too many of the problem's split."""
    total = self._counts[problem.split]
    bad = sum(split == problem.split for split, _ in self.problems)
    allowed = int(self._max_bad_fraction * total)
    if bad > allowed:
      raise errors.UserError(
        f'{problem.id}: {problem.reason}. That is unreadable image {bad} of the {total:,} in the '
        f'{problem.split} split, and at most {allowed} are allowed '
        f'(dataset_configs.max_bad_fraction = {self._max_bad_fraction:g}).'
      )
