"""The images of a run that could not be read, each listed once."""

import csv
import os
import pathlib
import sys
from collections.abc import Iterable
from typing import NamedTuple

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

  Attributes:
    problems: everything seen, by (split, index).
    path: the file; None before `keep_in`.
  """

  def __init__(self) -> None:
    """Nothing is bad yet."""
    self.problems: dict[tuple[str, int], Problem] = {}
    self.path: pathlib.Path | None = None

  def keep_in(self, path: str | os.PathLike[str]) -> None:
    """Reads what an interrupted run listed in `path`, and lists there from now on.

    The file exists only if something is bad.
    """
    self.path = pathlib.Path(path)
    known = list(self.problems.values())
    self.problems = {}
    if self.path.exists():
      with self.path.open(newline='', encoding='utf-8') as file:
        for row in csv.DictReader(file):
          problem = Problem(row['split'], int(row['index']), row['id'], row['reason'])
          self.problems[problem.split, problem.index] = problem
    self.add(known)

  def add(self, problems: Iterable[Problem]) -> None:
    """Lists the problems that are new, and says the first few on stderr."""
    new = [p for p in problems if (p.split, p.index) not in self.problems]
    for problem in new:
      self.problems[problem.split, problem.index] = problem
      if len(self.problems) <= _SHOWN:
        print(f'bad image ({problem.split}): {problem.id}: {problem.reason}', file=sys.stderr)
    if new and self.path is not None:
      fresh = not self.path.exists()
      with self.path.open('a', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        if fresh:
          writer.writerow(Problem._fields)
        writer.writerows(new)
