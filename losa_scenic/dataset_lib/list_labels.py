"""Labels of list files as numbers, and the names of the classes."""

import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import list_rows


def is_numbered(parts: dict[str, list_rows.Rows]) -> bool:
  """Whether the labels are whole numbers; `class_ids` refuses a mixture."""
  return bool(list_rows.INTEGER.fullmatch(parts['train'].labels[0]))


def class_ids(
  parts: dict[str, list_rows.Rows], names: tuple[str, ...] | None
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
  """Labels as numbers, and the names of the classes.

  Args:
    parts: the rows of each part, 'train' among them. All labels are whole numbers, or none is.
    names: the class names in order. None: whole numbers are names themselves, from 0 to the largest
      of all parts; other labels are sorted, and training files must know each of them.

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
  origin = (
    'classes in the file of class names'
    if names
    else f'classes of the training {parts["train"].noun}s'
  )
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
  parts: dict[str, list_rows.Rows], rows: list[tuple[str, int]], names: tuple[str, ...] | None
) -> None:
  """Raises `UserError` unless all labels are whole numbers or all are names.

  '0.0' .. '11.0', as a program writes whole numbers that it has read as decimals, are no names:
  sorted they would be 0.0, 1.0, 10.0. Names like '0.5' must be in the file of class names.
  """
  is_integer = [bool(list_rows.INTEGER.fullmatch(parts[part].labels[i])) for part, i in rows]
  if all(is_integer):
    return
  part, i = rows[is_integer.index(False)]
  where = f"{parts[part].where(i)}: label '{parts[part].labels[i]}'"
  texts = {label for listed in parts.values() for label in listed.labels}
  if not texts <= set(names or ()) and all(map(list_rows.NUMBER.fullmatch, texts)):
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


def _numbered(parts: dict[str, list_rows.Rows], numbers: dict[str, list[int]]) -> tuple[str, ...]:
  """Names '0', '1', .. up to the largest label, unless that is a slip of the pen."""
  largest, part = max((max(values), part) for part, values in numbers.items())
  total = sum(len(values) for values in numbers.values())
  if largest >= total:
    where = parts[part].where(numbers[part].index(largest))
    raise errors.UserError(
      f'{where}: label {largest}, but there are only {total} {parts[part].noun}s. Labels count '
      'from 0; if there really are so many classes, name them in classes.txt.'
    )
  return tuple(str(number) for number in range(largest + 1))
