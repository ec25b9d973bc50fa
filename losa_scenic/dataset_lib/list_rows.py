"""Rows of list files: a path and a label each, from text or from tables.

Tables have a header. Without one, as released for many sets of clips, a table is read whose lines
are 'path,label' or 'path label' with whole numbers as the labels.
"""

import csv
import math
import os
import pathlib
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, TextIO

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import sources
from losa_scenic.dataset_lib.frame_sampling import WHOLE, Segment

DELIMITERS = {'.csv': ',', '.tsv': '\t'}
EXTENSIONS = ('.txt', *DELIMITERS)
# What a column may be called.
COLUMNS = {
  'path': ('path', 'file', 'filename', 'file_name', 'image', 'image_path'),
  'label': ('label', 'class', 'category', 'target'),
  'split': ('split',),
}
# Beside these, of clips: the part of the file that is meant, in seconds; either may be empty.
CLIP_COLUMNS = {
  **COLUMNS,
  'path': ('path', 'file', 'filename', 'file_name', 'clip', 'clip_path', 'video', 'video_path'),
  'start': ('start', 'start_time', 'time_start'),
  'end': ('end', 'end_time', 'time_end'),
}
_REQUIRED = ('path', 'label')
_TIMES = {'start', 'end'}
# What a split column may say, and the part that is meant.
PARTS = {'train': 'train', 'val': 'val', 'valid': 'val', 'validate': 'val', 'validation': 'val'}
PARTS['test'] = 'test'

# What is written as a label: a whole number, any number.
INTEGER = re.compile(r'[+-]?[0-9]{1,18}')
NUMBER = re.compile(r'[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?')


def by_part(names: Iterable[str], pattern: re.Pattern[str]) -> dict[str, list[str]]:
  """The names that match, by part.

  Args:
    names: of files, in order.
    pattern: of a whole name; its first group is the part, as `PARTS` knows it in small letters.

  Returns:
    'train', 'val', 'test' -> names, those only that have any.
  """
  found: dict[str, list[str]] = {}
  for name in names:
    match = pattern.fullmatch(name)
    if match:
      found.setdefault(PARTS[match[1].lower()], []).append(name)
  return found


class Rows(NamedTuple):
  """The rows of one part.

  Attributes:
    file: where they are listed.
    lines: the number of each row's (last) line, from 1.
    paths: of the files, without './' and the like: two spellings of a path are one file.
    labels: as they are written.
    segments: the part of each file that is meant.
    noun: what a file is called in messages.
  """

  file: pathlib.Path
  lines: list[int]
  paths: list[str]
  labels: list[str]
  segments: list[Segment]
  noun: str = 'image'

  def where(self, i: int) -> str:
    """'file:line' of a row."""
    return f'{self.file}:{self.lines[i]}'

  def names(self) -> list[str]:
    """A name of each row, with its segment if it has one."""
    rows = zip(self.paths, self.segments, strict=True)
    return [p if s == WHOLE else f'{p} {s.start}-{s.end}' for p, s in rows]


class _Row(NamedTuple):
  line: int
  path: str
  label: str
  part: str | None = None
  segment: Segment = WHOLE


def read(
  file: pathlib.Path,
  root: pathlib.Path,
  part: str | None = None,
  *,
  columns: Mapping[str, tuple[str, ...]] = COLUMNS,
  noun: str = 'image',
) -> dict[str, Rows]:
  """Reads a list file.

  Args:
    file: text with 'path label' in each line, or CSV or TSV; UTF-8.
    root: the folder that the paths are relative to; they may begin with its absolute name.
    part: 'train', 'val' or 'test' if the file lists one part alone; None for a file whose column
      'split' may name the part of each row. Rows of no part are 'train'.
    columns: what the columns may be called: of 'path' and 'label', which a table must have, and of
      'split', 'start' and 'end'. Others are not read.
    noun: what a file is called in messages.

  Returns:
    The rows of each part that has any, in the order of the file.

  Raises:
    errors.UserError: naming file and line of what cannot be read, of a path outside `root`, of
      times that are no part of a clip, and of a path that a part lists with two labels; or the file
      if it has no rows.
  """
  parts: dict[str, Rows] = {}
  inside = os.path.join(os.path.abspath(root), '')
  seen: dict[tuple[str, str, Segment], str] = {}
  try:
    with open(file, encoding='utf-8-sig', newline='') as stream:
      is_table = file.suffix.lower() in DELIMITERS
      for row in _table_rows(file, stream, columns) if is_table else _text_rows(file, stream):
        where = f'{file}:{row.line}'
        if part and row.part not in (None, part):
          raise errors.UserError(
            f"{where}: split '{row.part}', but this file is the list of the {part} {noun}s."
          )
        path = row.path.removeprefix(inside)
        try:
          sources.check_inside(path, root)
        except errors.UserError as error:
          raise errors.UserError(f'{where}: {error}') from error
        path, name = posixpath.normpath(path), row.part or part or 'train'
        label = seen.setdefault((name, path, row.segment), row.label)
        if label != row.label:
          raise errors.UserError(
            f"{where}: {path} has label '{row.label}', but '{label}' further up."
          )
        rows = parts.setdefault(name, Rows(file, [], [], [], [], noun))
        rows.lines.append(row.line)
        rows.paths.append(path)
        rows.labels.append(row.label)
        rows.segments.append(row.segment)
  except (OSError, UnicodeDecodeError) as error:
    raise errors.UserError(f'{file}: cannot be read as UTF-8 text ({error}).') from error
  if not parts:
    raise errors.UserError(f'{file}: it lists no {noun}s.')
  return parts


def _text_rows(file: pathlib.Path, stream: TextIO) -> Iterator[_Row]:
  for number, line in enumerate(stream, 1):
    # The label is the last field: a path may contain spaces.
    fields = line.strip().rsplit(None, 1)
    if not fields:
      continue
    if len(fields) < 2 or not INTEGER.fullmatch(fields[1]):
      raise errors.UserError(
        f"{file}:{number}: a line must be 'path label' with a whole number as the label, not "
        f'{line.strip()!r}. (Lists with class names: CSV with a header.)'
      )
    yield _Row(number, fields[0], fields[1])


def _table_rows(
  file: pathlib.Path, stream: TextIO, allowed: Mapping[str, tuple[str, ...]]
) -> Iterator[_Row]:
  reader = csv.reader(stream, delimiter=DELIMITERS[file.suffix.lower()], strict=True)
  columns: dict[str, int] | None = None
  width = 0
  try:
    for cells in reader:
      if not cells:
        continue
      if columns is None:
        if len(cells) == 1 and _is_row(cells[0].rsplit(None, 1)):
          stream.seek(0)
          yield from _text_rows(file, stream)
          return
        columns, width = _columns(file, cells, allowed), len(cells)
        if not _is_row(cells):
          continue
      where = f'{file}:{reader.line_num}'
      if len(cells) != width:
        raise errors.UserError(f'{where}: {len(cells)} cells in a table of {width} columns.')
      row = {key: cells[column].strip() for key, column in columns.items()}
      for key, cell in row.items():
        if not cell and key not in _TIMES:
          raise errors.UserError(f"{where}: the cell '{key}' is empty.")
      part = row.get('split')
      if part is not None:
        part = PARTS[errors.one_of(f'split in {where}:', part.lower(), PARTS)]
      segment = _segment(where, row) if row.keys() & _TIMES else WHOLE
      yield _Row(reader.line_num, row['path'], row['label'], part, segment)
  except csv.Error as error:
    raise errors.UserError(f'{file}:{reader.line_num}: {error}.') from error


def _is_row(cells: list[str]) -> bool:
  """Whether a table's first line is no header but a path and a label."""
  return len(cells) == 2 and bool(INTEGER.fullmatch(cells[1].strip()))


def _segment(where: str, row: Mapping[str, str]) -> Segment:
  """The part of a clip that a row means; the whole clip if it says nothing."""
  times = {key: row[key] for key in ('start', 'end') if row.get(key)}
  for key, text in times.items():
    if not (NUMBER.fullmatch(text) and 0 <= float(text) < math.inf):
      raise errors.UserError(
        f"{where}: {key} '{text}' is no time: it must be a number of seconds, at least 0."
      )
  start = float(times.get('start', 0))
  end = float(times['end']) if 'end' in times else None
  if end is not None and start >= end:
    raise errors.UserError(
      f'{where}: the clip must end after its start, not last from {start:g} to {end:g} s.'
    )
  return Segment(start, end)


def _columns(
  file: pathlib.Path, header: list[str], allowed: Mapping[str, tuple[str, ...]]
) -> dict[str, int]:
  """The columns of those of `allowed` that there are; 'path' and 'label' must be."""
  if _is_row(header):
    return {'path': 0, 'label': 1}
  names = [name.strip().lower() for name in header]
  columns = {}
  for key, synonyms in allowed.items():
    found = [i for i, name in enumerate(names) if name in synonyms]
    if len(found) == 1:
      columns[key] = found[0]
    elif found or key in _REQUIRED:
      count = 'more than one column' if found else 'no column'
      raise errors.UserError(
        f'{file}:1: {count} for the {key} (one of {", ".join(synonyms)}); the header has: '
        f'{", ".join(header)}. (Without a header: two columns, path and a whole number.)'
      )
  return columns
