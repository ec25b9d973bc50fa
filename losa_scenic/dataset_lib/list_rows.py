"""Rows of list files: a path and a label each, from text or from tables with a header."""

import csv
import pathlib
import posixpath
import re
from collections.abc import Iterator
from typing import NamedTuple, TextIO

import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import sources

DELIMITERS = {'.csv': ',', '.tsv': '\t'}
EXTENSIONS = ('.txt', *DELIMITERS)
# What a column may be called.
COLUMNS = {
  'path': ('path', 'file', 'filename', 'file_name', 'image', 'image_path'),
  'label': ('label', 'class', 'category', 'target'),
  'split': ('split',),
}
# What a split column may say, and the part that is meant.
PARTS = {'train': 'train', 'val': 'val', 'valid': 'val', 'validation': 'val', 'test': 'test'}

_INTEGER = re.compile(r'[+-]?[0-9]{1,18}')
_NUMBER = re.compile(r'[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?')


class Rows(NamedTuple):
  """The rows of one part.

  Attributes:
    file: where they are listed.
    lines: the number of each row's (last) line, from 1.
    paths: of the images, without './' and the like: two spellings of a path are one image.
    labels: as they are written.
  """

  file: pathlib.Path
  lines: list[int]
  paths: list[str]
  labels: list[str]

  def where(self, i: int) -> str:
    """'file:line' of a row."""
    return f'{self.file}:{self.lines[i]}'


class _Row(NamedTuple):
  line: int
  path: str
  label: str
  part: str | None = None


def read(file: pathlib.Path, root: pathlib.Path, part: str | None = None) -> dict[str, Rows]:
  """Reads a list file.

  Args:
    file: text with 'path label' in each line, or CSV or TSV with a header; UTF-8.
    root: the folder that the paths are relative to.
    part: 'train', 'val' or 'test' if the file lists one part alone; None for a file whose column
      'split' may name the part of each row. Rows of no part are 'train'.

  Returns:
    The rows of each part that has any, in the order of the file.

  Raises:
    errors.UserError: naming file and line of what cannot be read, of a path outside `root`, and of
      a path that a part lists with two labels; or the file if it has no rows.
  """
  parts: dict[str, Rows] = {}
  seen: dict[tuple[str, str], str] = {}
  try:
    with open(file, encoding='utf-8-sig', newline='') as stream:
      is_table = file.suffix.lower() in DELIMITERS
      for row in _table_rows(file, stream) if is_table else _text_rows(file, stream):
        where = f'{file}:{row.line}'
        if part and row.part not in (None, part):
          raise errors.UserError(
            f"{where}: split '{row.part}', but this file is the list of the {part} images."
          )
        try:
          sources.check_inside(row.path, root)
        except errors.UserError as error:
          raise errors.UserError(f'{where}: {error}') from error
        path, name = posixpath.normpath(row.path), row.part or part or 'train'
        label = seen.setdefault((name, path), row.label)
        if label != row.label:
          raise errors.UserError(
            f"{where}: {path} has label '{row.label}', but '{label}' further up."
          )
        rows = parts.setdefault(name, Rows(file, [], [], []))
        rows.lines.append(row.line)
        rows.paths.append(path)
        rows.labels.append(row.label)
  except (OSError, UnicodeDecodeError) as error:
    raise errors.UserError(f'{file}: cannot be read as UTF-8 text ({error}).') from error
  if not parts:
    raise errors.UserError(f'{file}: it lists no images.')
  return parts


def _text_rows(file: pathlib.Path, stream: TextIO) -> Iterator[_Row]:
  for number, line in enumerate(stream, 1):
    # The label is the last field: a path may contain spaces.
    fields = line.strip().rsplit(None, 1)
    if not fields:
      continue
    if len(fields) < 2 or not _INTEGER.fullmatch(fields[1]):
      raise errors.UserError(
        f"{file}:{number}: a line must be 'path label' with a whole number as the label, not "
        f'{line.strip()!r}. (Lists with class names: CSV with a header.)'
      )
    yield _Row(number, *fields)


def _table_rows(file: pathlib.Path, stream: TextIO) -> Iterator[_Row]:
  reader = csv.reader(stream, delimiter=DELIMITERS[file.suffix.lower()], strict=True)
  columns: dict[str, int] | None = None
  width = 0
  try:
    for cells in reader:
      if not cells:
        continue
      if columns is None:
        columns, width = _columns(file, cells), len(cells)
        continue
      where = f'{file}:{reader.line_num}'
      if len(cells) != width:
        raise errors.UserError(f'{where}: {len(cells)} cells in a table of {width} columns.')
      row = {key: cells[column].strip() for key, column in columns.items()}
      for key, cell in row.items():
        if not cell:
          raise errors.UserError(f"{where}: the cell '{key}' is empty.")
      part = row.get('split')
      if part is not None:
        part = PARTS[errors.one_of(f'split in {where}:', part.lower(), PARTS)]
      yield _Row(reader.line_num, row['path'], row['label'], part)
  except csv.Error as error:
    raise errors.UserError(f'{file}:{reader.line_num}: {error}.') from error


def _columns(file: pathlib.Path, header: list[str]) -> dict[str, int]:
  """The column of 'path', of 'label' and, if there is one, of 'split'."""
  names = [name.strip().lower() for name in header]
  columns = {}
  for key, allowed in COLUMNS.items():
    found = [i for i, name in enumerate(names) if name in allowed]
    if len(found) == 1:
      columns[key] = found[0]
    elif found or key != 'split':
      count = 'more than one column' if found else 'no column'
      raise errors.UserError(
        f'{file}:1: {count} for the {key} (one of {", ".join(allowed)}); the header has: '
        f'{", ".join(header)}.'
      )
  return columns


def is_numbered(parts: dict[str, Rows]) -> bool:
  """Whether the labels are whole numbers; `class_ids` refuses a mixture."""
  return bool(_INTEGER.fullmatch(parts['train'].labels[0]))


def class_ids(
  parts: dict[str, Rows], names: tuple[str, ...] | None
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
  """Labels as numbers, and the names of the classes.

  Args:
    parts: the rows of each part, 'train' among them. All labels are whole numbers, or none is.
    names: the class names in order. None: whole numbers are names themselves, from 0 to the largest
      of all parts; other labels are sorted, and training images must know each of them.

  Returns:
    int32 [n] for each part, and the class names.

  Raises:
    errors.UserError: naming file and line of a label that is out of range, unknown, of the other
      kind, or a number that is not whole.
  """
  rows = [(part, i) for part, listed in parts.items() for i in range(len(listed.labels))]
  _check_kind(parts, rows, names)
  if is_numbered(parts):
    numbers = {part: [int(label) for label in listed.labels] for part, listed in parts.items()}
    names = names or _numbered(parts, numbers)
    for part, i in rows:
      if not 0 <= numbers[part][i] < len(names):
        raise errors.UserError(
          f'{parts[part].where(i)}: label {numbers[part][i]} is outside 0..{len(names) - 1} '
          f'({len(names)} classes).'
        )
    return {part: np.array(values, np.int32) for part, values in numbers.items()}, names
  origin = 'classes in the file of class names' if names else 'classes of the training images'
  names = names or tuple(sorted(set(parts['train'].labels)))
  number_of = {name: number for number, name in enumerate(names)}
  for listed in parts.values():
    for i, label in enumerate(listed.labels):
      if label not in number_of:
        raise errors.unknown(f'class in {listed.where(i)} (not among the {origin}):', label, names)
  ids = {
    part: np.array([number_of[label] for label in listed.labels], np.int32)
    for part, listed in parts.items()
  }
  return ids, names


def _check_kind(
  parts: dict[str, Rows], rows: list[tuple[str, int]], names: tuple[str, ...] | None
) -> None:
  """Raises `UserError` unless all labels are whole numbers or all are names.

  '0.0' .. '11.0', as a program writes whole numbers that it has read as decimals, are no names:
  sorted they would be 0.0, 1.0, 10.0. Names like '0.5' must be in the file of class names.
  """
  is_integer = [bool(_INTEGER.fullmatch(parts[part].labels[i])) for part, i in rows]
  if all(is_integer):
    return
  part, i = rows[is_integer.index(False)]
  where = f"{parts[part].where(i)}: label '{parts[part].labels[i]}'"
  texts = {label for listed in parts.values() for label in listed.labels}
  if not texts <= set(names or ()) and all(map(_NUMBER.fullmatch, texts)):
    raise errors.UserError(
      f'{where}: labels that are numbers must be whole and written without a point: 0, 1, 2.. '
      'If they are the names of classes, list them in their order in classes.txt.'
    )
  if any(is_integer):
    part, i = rows[is_integer.index(not is_integer[0])]
    raise errors.UserError(
      f"{parts[part].where(i)}: label '{parts[part].labels[i]}': some labels are whole numbers and "
      'some are names; write all as numbers or all as names.'
    )


def _numbered(parts: dict[str, Rows], numbers: dict[str, list[int]]) -> tuple[str, ...]:
  """Names '0', '1', .. up to the largest label, unless that is a slip of the pen."""
  largest, part = max((max(values), part) for part, values in numbers.items())
  total = sum(len(values) for values in numbers.values())
  if largest >= total:
    where = parts[part].where(numbers[part].index(largest))
    raise errors.UserError(
      f'{where}: label {largest}, but there are only {total} images. Labels count from 0; if there '
      'really are so many classes, name them in classes.txt.'
    )
  return tuple(str(number) for number in range(largest + 1))
