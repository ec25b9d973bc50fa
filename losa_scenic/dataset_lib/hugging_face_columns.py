"""Which columns of a table of Hugging Face's `datasets` are the images and the labels."""

import pathlib
from typing import Any

import numpy as np

from losa_scenic.common_lib import errors

# Names that make a column of whole numbers or texts the labels, if there are several.
_LABEL_NAMES = ('label', 'labels', 'class', 'category', 'target')

# Part -> (name of the split, `datasets.Dataset`).
Tables = dict[str, tuple[str, Any]]


def _kind(feature: Any) -> str:
  """'image', 'bytes', 'class', 'integer', 'text' or ''."""
  import datasets

  if isinstance(feature, datasets.Image):
    return 'image'
  if isinstance(feature, datasets.ClassLabel):
    return 'class'
  if isinstance(feature, dict):
    return 'bytes' if set(feature) == {'bytes', 'path'} else ''
  dtype = getattr(feature, 'dtype', '') if isinstance(feature, datasets.Value) else ''
  if dtype in ('binary', 'large_binary'):
    return 'bytes'
  if dtype in ('string', 'large_string'):
    return 'text'
  return 'integer' if dtype.startswith(('int', 'uint')) else ''


def image_column(folder: pathlib.Path, table: Any, given: str | None) -> str:
  """The column that is given, else the only one of images, else the only one of encoded bytes.

  Args:
    folder: of the set, for messages.
    table: a `datasets.Dataset`.
    given: the user's choice; it may also be a column of paths.

  Raises:
    errors.UserError: for an unknown column, one that holds no images, or a choice to make.
  """
  kinds = {name: _kind(feature) for name, feature in table.features.items()}
  if given:
    errors.one_of(f'column (image_column) in {folder}:', given, kinds)
    if kinds[given] not in ('image', 'bytes', 'text'):
      raise errors.UserError(
        f"{folder}: column '{given}' holds no images: {table.features[given]}."
      )
    return given
  for wanted in ('image', 'bytes'):
    found = [name for name, kind in kinds.items() if kind == wanted]
    if len(found) == 1:
      return found[0]
    if found:
      break
  raise _choose(folder, 'image', kinds)


def label_column(folder: pathlib.Path, table: Any, given: str | None, image: str) -> str:
  """The column that is given, else the only one that can be.

  That is the only ClassLabel; else the only one of whole numbers or texts; else the only one of
  those with a usual name.

  Args:
    folder: of the set, for messages.
    table: a `datasets.Dataset`.
    given: the user's choice.
    image: the image column.

  Raises:
    errors.UserError: for an unknown column, one that holds no labels, or a choice to make.
  """
  kinds = {name: _kind(feature) for name, feature in table.features.items() if name != image}
  if given:
    errors.one_of(f'column (label_column) in {folder}:', given, kinds)
    if kinds[given] not in ('class', 'integer', 'text'):
      raise errors.UserError(
        f"{folder}: column '{given}' holds no labels: {table.features[given]}."
      )
    return given
  classes = [name for name, kind in kinds.items() if kind == 'class']
  others = [name for name, kind in kinds.items() if kind in ('integer', 'text')]
  named = [name for name in others if name.lower() in _LABEL_NAMES]
  for found in (classes,) if classes else (others, named):
    if len(found) == 1:
      return found[0]
  raise _choose(folder, 'label', kinds)


def _choose(folder: pathlib.Path, what: str, kinds: dict[str, str]) -> errors.UserError:
  columns = ', '.join(f'{name} ({kind or "other"})' for name, kind in kinds.items())
  return errors.UserError(
    f'{folder}: it is not clear which column is the {what}: give '
    f'--config.dataset_configs.{what}_column=NAME, one of {columns}.'
  )


def labels(
  folder: pathlib.Path, tables: Tables, column: str
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
  """Labels of each part as integers, and the class names.

  Args:
    folder: of the set, for messages.
    tables: part -> (name of the split, `datasets.Dataset`), 'train' among them.
    column: of the labels; every table has it.

  Returns:
    Integers [n] of each part, and the names: those of the ClassLabel, the sorted texts of the
    training images, or '0', '1', .. up to the largest number.

  Raises:
    errors.UserError: naming the split, and the row or label that is wrong.
  """
  kinds = {part: _kind(table.features[column]) for part, (_, table) in tables.items()}
  if len(set(kinds.values())) > 1:
    raise errors.UserError(f"{folder}: column '{column}' is of different kinds: {kinds}.")
  cells = {}
  for part, (split, table) in tables.items():
    cells[part] = table.select_columns([column]).with_format('arrow')[:][column]
    if cells[part].null_count:
      raise errors.UserError(
        f"{folder}/{split}: {cells[part].null_count} rows have no '{column}': remove them, or "
        f'choose another split with --config.dataset_configs.{part}_name=NAME.'
      )
  if kinds['train'] == 'text':
    return _from_texts(folder, tables, {part: cell.to_pylist() for part, cell in cells.items()})
  values = {part: cell.to_numpy() for part, cell in cells.items()}
  for part, (split, _) in tables.items():
    if values[part].min() < 0:
      raise errors.UserError(
        f'{folder}/{split}: there are labels below 0, as of images without labels: choose another '
        f'split with --config.dataset_configs.{part}_name=NAME.'
      )
  if kinds['train'] == 'class':
    return values, _common_names(folder, tables, column)
  largest = max(int(of_part.max()) for of_part in values.values())
  total = sum(len(of_part) for of_part in values.values())
  if largest >= total:
    raise errors.UserError(
      f"{folder}: column '{column}' holds {largest}, but there are only {total} images: labels "
      'must count from 0.'
    )
  return values, tuple(str(number) for number in range(largest + 1))


def _from_texts(
  folder: pathlib.Path, tables: Tables, texts: dict[str, list[str]]
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
  names = tuple(sorted(set(texts['train'])))
  number_of = {name: number for number, name in enumerate(names)}
  for part, (split, _) in tables.items():
    for i, text in enumerate(texts[part]):
      if text not in number_of:
        raise errors.unknown(f'class in {folder}/{split}[{i}] (not in train):', text, names)
  return {p: np.array([number_of[t] for t in texts[p]], np.int32) for p in texts}, names


def _common_names(folder: pathlib.Path, tables: Tables, column: str) -> tuple[str, ...]:
  names = tuple(tables['train'][1].features[column].names)
  for split, table in tables.values():
    if tuple(table.features[column].names) != names:
      raise errors.UserError(
        f"{folder}/{split}: the class names of '{column}' are not those of the training images."
      )
  return names
