"""Markdown tables from result rows: mean ± sample standard deviation (number of runs) in each cell.

With `--confidence=0.95`, ± is half the width of the confidence interval of the mean over the runs
(Student's t), and differences to the reference are those of the same seeds, with their own. Such an
interval is about seeds; that the test split is a sample, too, is not in it.

python -m losa_scenic.bench_lib.tables results.jsonl --rows=dataset --columns=method
    --value=test_accuracy --scale=100 --reference=linear
"""

import argparse
import collections
import dataclasses
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from losa_scenic.bench_lib import results
from losa_scenic.common_lib import errors

MISSING = '\N{EN DASH}'


@dataclasses.dataclass(frozen=True)
class Cell:
  """The runs of one row and column.

  Attributes:
    values: the value of each run, already scaled.
    seeds: their seeds; None where a run has none.
  """

  values: tuple[float, ...]
  seeds: tuple[Any, ...]

  @property
  def mean(self) -> float:
    """Mean over the runs."""
    return statistics.fmean(self.values)

  @property
  def deviation(self) -> float | None:
    """Sample standard deviation (n - 1), None for a single run, NaN if a value is not finite."""
    if len(self.values) < 2:
      return None
    finite = all(math.isfinite(value) for value in self.values)
    return statistics.stdev(self.values) if finite else math.nan

  def half_width(self, confidence: float) -> float | None:
    """Half the width of the confidence interval of the mean; None for a single run."""
    if self.deviation is None:
      return None
    from scipy import stats  # Takes a second to import.

    count = len(self.values)
    quantile = stats.t.ppf((1 + confidence) / 2, count - 1)
    return float(quantile) * self.deviation / math.sqrt(count)

  def minus(self, other: 'Cell') -> 'Cell':
    """The differences of the runs of the same seeds; without pairs a `UserError`."""
    mine, theirs = (dict(zip(c.seeds, c.values, strict=True)) for c in (self, other))
    both = [seed for seed in mine if seed in theirs and seed is not None]
    if not both or len(mine) < len(self.values) or len(theirs) < len(other.values):
      raise errors.UserError(
        'Intervals of differences need one run of each seed in both cells: choose with --where.'
      )
    return Cell(tuple(mine[seed] - theirs[seed] for seed in both), tuple(both))


Cells = Mapping[tuple[str, str], Cell]


def lookup(row: Mapping[str, Any], key: str, where: str = 'row') -> Any:
  """The entry `key` of a result row, or else its override 'config.<key>'.

  Raises:
    errors.UserError: if the row has neither, naming the nearest key.
  """
  for name in (key, f'config.{key}'):
    if name in row:
      return row[name]
  raise errors.unknown(f'key of {where}', key, row)


def cells(
  rows: Sequence[Mapping[str, Any]], row_key: str, column_key: str, value: str, scale: float = 1.0
) -> dict[tuple[str, str], Cell]:
  """Groups result rows by two keys.

  Args:
    rows: result rows as in results.jsonl.
    row_key: key that tells the rows of the table apart, e.g. 'dataset'.
    column_key: key that tells its columns apart, e.g. 'method'.
    value: key of the number to report, e.g. 'test_accuracy' in [0, 1].
    scale: factor for the number, e.g. 100 for percent.

  Returns:
    The cells by (row, column), in the order of first appearance.

  Raises:
    errors.UserError: if there are no rows, or one lacks a key or has no number as value.
  """
  if not rows:
    raise errors.UserError('There are no result rows to make a table of.')
  groups: dict[tuple[str, str], list[tuple[float, Any]]] = collections.defaultdict(list)
  for index, row in enumerate(rows, start=1):
    where = f'result row {index}'
    number = lookup(row, value, where)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
      raise errors.UserError(f"{where}: '{value}' must be a number, got {number!r}.")
    place = str(lookup(row, row_key, where)), str(lookup(row, column_key, where))
    groups[place].append((number * scale, row.get('seed', row.get('config.seed'))))
  return {place: Cell(*zip(*runs, strict=True)) for place, runs in groups.items()}


def table(
  rows: Sequence[Mapping[str, Any]],
  row_key: str,
  column_key: str,
  value: str,
  scale: float = 1.0,
  reference: str | None = None,
  digits: int = 2,
  confidence: float | None = None,
) -> str:
  """A markdown table of `cells`, its last line the mean of the row means; notes follow below it.

  Notes tell of means over some rows only, unequal numbers of runs, and runs of the same seed in
  one cell (which means that runs with different settings were mixed).

  Args:
    rows: see `cells`.
    row_key: see `cells`.
    column_key: see `cells`.
    value: see `cells`.
    scale: see `cells`.
    reference: a column; the others show their difference to it in brackets.
    digits: decimals.
    confidence: in (0, 1): intervals in the place of deviations; None for deviations.

  Returns:
    The text, without a newline at the end.

  Raises:
    errors.UserError: as `cells`, and for an unknown `reference`.
  """
  if confidence is not None and not 0 < confidence < 1:
    raise errors.UserError(f'--confidence must be in (0, 1), not {confidence}.')
  grid = cells(rows, row_key, column_key, value, scale)
  names = list(dict.fromkeys(row for row, _ in grid))
  columns = list(dict.fromkeys(column for _, column in grid))
  if reference is not None and reference not in columns:
    raise errors.unknown(
      f"column for --reference among the values of '{column_key}'", reference, columns
    )
  lines = [[row_key, *columns], ['---', *('---:' for _ in columns)]]
  for name in names:
    lines.append([name, *(_cell(grid, name, c, reference, digits, confidence) for c in columns)])
  lines.append(['mean', *(_mean(grid, names, c, reference, digits) for c in columns)])
  text = [
    f'| {" | ".join(entry.replace("|", chr(92) + "|") for entry in line)} |' for line in lines
  ]
  notes = _notes(grid, names, columns, reference)
  if confidence is not None:
    notes.append(f'- ±: {confidence:.0%} confidence interval of the mean over the seeds.')
  return '\n'.join(text + ['', *notes] if notes else text)


def main(arguments: Sequence[str] | None = None) -> int:
  """The command line.

  Args:
    arguments: arguments without the program; by default those of the process.

  Returns:
    Exit code: 0, or 2 for a user's mistake.
  """
  parser = argparse.ArgumentParser(
    prog='python -m losa_scenic.bench_lib.tables',
    description='Prints a markdown table of mean ± sample standard deviation (number of runs).',
    epilog="Keys are those of the rows; 'method' also finds the override 'config.method'.",
    allow_abbrev=False,
  )
  parser.add_argument('files', nargs='+', metavar='results.jsonl', help='rows are pooled')
  parser.add_argument('--rows', required=True, metavar='KEY', help='e.g. dataset')
  parser.add_argument('--columns', required=True, metavar='KEY', help='e.g. method')
  parser.add_argument('--value', required=True, metavar='KEY', help='e.g. test_accuracy')
  parser.add_argument('--scale', type=float, default=1.0, help='factor, 100 for percent (1)')
  parser.add_argument('--reference', metavar='COLUMN', help='show differences to this column')
  parser.add_argument('--digits', type=int, default=2, help='decimals (2)')
  parser.add_argument(
    '--confidence', type=float, metavar='P', help='intervals, e.g. 0.95, in the place of deviations'
  )
  parser.add_argument(
    '--where', action='append', default=[], metavar='KEY=VALUE', help='use only rows like this'
  )
  given = parser.parse_args(arguments)
  try:
    rows = [row for file in given.files for row in results.read_rows(file)]
    for condition in given.where:
      rows = _filtered(rows, condition)
    print(
      table(
        rows,
        given.rows,
        given.columns,
        given.value,
        given.scale,
        given.reference,
        given.digits,
        given.confidence,
      )
    )
  except (errors.UserError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


def _filtered(rows: Sequence[results.Row], condition: str) -> list[results.Row]:
  key, equals, wanted = condition.partition('=')
  if not equals:
    raise errors.UserError(f"--where needs KEY=VALUE, got '{condition}'.")
  found = [str(lookup(row, key, f'result row {i}')) for i, row in enumerate(rows, start=1)]
  if wanted not in found:
    raise errors.unknown(f"value of '{key}'", wanted, set(found))
  return [row for row, value in zip(rows, found, strict=True) if value == wanted]


def _cell(
  grid: Cells,
  row: str,
  column: str,
  reference: str | None,
  digits: int,
  confidence: float | None,
) -> str:
  def spread(cell: Cell) -> str:
    half = cell.deviation if confidence is None else cell.half_width(confidence)
    return '' if half is None else f' ± {half:.{digits}f}'

  cell = grid.get((row, column))
  if cell is None:
    return MISSING
  text = f'{cell.mean:.{digits}f}{spread(cell)} ({len(cell.values)})'
  base = grid.get((row, reference)) if reference is not None else None
  if base is None or column == reference:
    return text
  if confidence is None:
    return f'{text} [{cell.mean - base.mean:+.{digits}f}]'
  pairs = cell.minus(base)
  return f'{text} [{pairs.mean:+.{digits}f}{spread(pairs)}]'


def _mean(
  grid: Cells, names: Sequence[str], column: str, reference: str | None, digits: int
) -> str:
  present = [name for name in names if (name, column) in grid]
  mark = '' if len(present) == len(names) else '*'
  text = f'{statistics.fmean(grid[name, column].mean for name in present):.{digits}f}{mark}'
  both = [name for name in present if (name, reference) in grid]
  if reference is not None and column != reference and both:
    gains = [grid[name, column].mean - grid[name, reference].mean for name in both]
    text += f' [{statistics.fmean(gains):+.{digits}f}]'
  return text


def _notes(
  grid: Cells, names: Sequence[str], columns: Sequence[str], reference: str | None
) -> list[str]:
  notes = []
  if reference is not None:
    notes.append(f"[±x]: difference to '{reference}', over the rows that both have.")
  for column in columns:
    missing = [name for name in names if (name, column) not in grid]
    if missing:
      share = f'{len(names) - len(missing)} of {len(names)} rows'
      notes.append(f"\\* mean of '{column}' over {share}: no runs for {', '.join(missing)}.")
  counts = collections.Counter(len(cell.values) for cell in grid.values())
  if len(counts) > 1:
    usual = max(counts, key=lambda n: (counts[n], n))
    odd = [f'{r}/{c}: {len(v.values)}' for (r, c), v in grid.items() if len(v.values) != usual]
    notes.append(f'Unequal numbers of runs: {usual} a cell, but {", ".join(odd)}.')
  for (row, column), cell in grid.items():
    repeats = collections.Counter(str(seed) for seed in cell.seeds if seed is not None)
    repeated = [seed for seed, count in repeats.items() if count > 1]
    if repeated:
      notes.append(
        f'{row}/{column} pools several runs of seed {", ".join(repeated)}: other settings differ,'
        ' or runs were counted twice; choose with --where.'
      )
  return [f'- {note}' for note in notes]


if __name__ == '__main__':
  sys.exit(main())
