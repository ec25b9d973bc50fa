"""The images of a run that could not be read, each listed once; too many end the run."""

import csv
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

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

  It is the main process's: loader processes tell it what they met. In a run of several hosts what
  one has met counts when all have heard of it, through `share`: they go on, or end, together.

  Attributes:
    problems: everything seen, by (split, id); of several hosts, all that was shared.
    path: the file; None before `keep_in`, and on all hosts but the first.
  """

  def __init__(
    self, counts: Mapping[str, int], max_bad_fraction: float, *, host: int = 0, hosts: int = 1
  ) -> None:
    """Nothing is bad yet.

    Args:
      counts: number of images of each split, of all hosts together.
      max_bad_fraction: more problems than this share of a split are an error.
      host: number of this host; the first, 0, writes and speaks for all.
      hosts: number of hosts.
    """
    self.problems: dict[tuple[str, str], Problem] = {}
    self.path: pathlib.Path | None = None
    self._counts, self._max_bad_fraction = dict(counts), max_bad_fraction
    self._host, self._hosts = host, hosts
    # To be shared: what an interrupted run listed, and what was met since the last time.
    self._former: list[Problem] = []
    self._met: dict[tuple[str, str], Problem] = {}

  def keep_in(self, path: str | os.PathLike[str]) -> None:
    """Reads what an interrupted run listed in `path`, and lists there from now on.

    The file exists only if something is bad. It is written anew for each new problem, so it is
    whole whenever a run is killed. Of several hosts only the first reads and writes; on others this
    does nothing.

    Raises:
      errors.UserError: if there is such a file and it is no list of problems.
    """
    if self._host:
      return
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
    self._former = list(self.problems.values())
    self.add(found)

  def add(self, problems: Iterable[Problem]) -> None:
    """Lists the problems that are new, and says the first few on stderr.

    In a run of several hosts it only keeps them for `share`.

    Raises:
      errors.UserError: if there are now more of a split than allowed.
    """
    met = {(p.split, p.id): p for p in problems}
    if self._hosts > 1:
      self._met |= met
      return
    self._list(met)
    for problem in met.values():  # Those that are known too: a run over its limit is no other run.
      self._check(problem)

  def share(self, gather: Callable[[Any], list[Any]]) -> None:
    """Lists what any host has met since the last time; all call it at the same points.

    With a single host it does nothing.

    Args:
      gather: something that JSON can hold -> that of every host, in order of their numbers.

    Raises:
      errors.UserError: if there are now more of a split than allowed; the same on all hosts.
    """
    if self._hosts == 1:
      return
    shared = gather([list(map(list, part)) for part in (self._former, self._met.values())])
    former = [Problem(*fields) for part, _ in shared for fields in part]
    met = [Problem(*fields) for _, part in shared for fields in part]
    self._former, self._met = [], {}
    # The first host knows the former ones already; here all come to the same list in one order.
    self.problems = {(p.split, p.id): p for p in former} | self.problems
    self._list({(p.split, p.id): p for p in met})
    for problem in met:
      self._check(problem)

  def _list(self, met: Mapping[tuple[str, str], Problem]) -> None:
    """Takes up and writes the problems that are new; says the first few."""
    new = [problem for key, problem in met.items() if key not in self.problems]
    for problem in new:
      self.problems[problem.split, problem.id] = problem
      if len(self.problems) <= _SHOWN and not self._host:
        text = f'bad image ({problem.split}): {problem.id}: {problem.reason}'
        print(text.encode(errors='backslashreplace').decode(), file=sys.stderr)
    if new and self.path is not None:
      self._write(self.path)

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
