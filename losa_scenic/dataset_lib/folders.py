"""What the sets that are files on a disk share: the root, the files in it and `classes.txt`."""

import os
import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

from losa_scenic.common_lib import errors

CLASSES_FILE = 'classes.txt'
_NUMBER = re.compile(r'[+-]?[0-9]{1,18}')


def checked_root(dataset: str, root: str | None) -> pathlib.Path:
  """The folder or file that a data set is.

  Args:
    dataset: name of the data set.
    root: the user's option.

  Raises:
    errors.UserError: if it is not given or does not exist.
  """
  if not root:
    raise errors.UserError(
      f"Dataset '{dataset}' needs to know where it is: --config.dataset_configs.root=PATH."
    )
  path = pathlib.Path(os.path.expanduser(root))
  # Path.exists raises for names that are too long.
  if not os.path.exists(path):
    raise errors.UserError(
      f'{path}: there is no such file or folder (--config.dataset_configs.root).'
    )
  return path


def given_file(root: pathlib.Path, option: str, name: str) -> pathlib.Path:
  """A file that the user names, relative to the set's folder or absolute.

  Raises:
    errors.UserError: if there is no such file, naming the nearest one in the folder.
  """
  file = root / os.path.expanduser(name)
  if not os.path.isfile(file):
    alike = [other for other in visible_files(root) if other.endswith(file.suffix)]
    raise errors.unknown(f'file ({option}) in {root}:', name, alike[:50])
  return file


def visible_files(folder: pathlib.Path) -> list[str]:
  """Names of the files in a folder in order, without those that begin with a dot."""
  return file_names(entries(folder))


def file_names(some: Iterable[os.DirEntry[str]]) -> list[str]:
  """Names of those entries that are files or links to files, in the given order."""
  return [entry.name for entry in some if is_file(entry)]


def is_file(entry: os.DirEntry[str]) -> bool:
  """Whether it is a file or a link to one; False for a link that leads nowhere."""
  try:
    return entry.is_file()
  except OSError:  # A link to itself, or into a folder that may not be read.
    return False


def is_folder(entry: os.DirEntry[str]) -> bool:
  """Whether it is a folder or a link to one; False for a link that leads nowhere."""
  try:
    return entry.is_dir()
  except OSError:
    return False


def entries(folder: pathlib.Path) -> list[os.DirEntry[str]]:
  """Everything in a folder in order of the names, without those that begin with a dot.

  Raises:
    errors.UserError: if it cannot be read.
  """
  try:
    with os.scandir(folder) as scan:
      return sorted((e for e in scan if not e.name.startswith('.')), key=lambda e: e.name)
  except OSError as error:
    raise errors.UserError(f'{folder}: cannot be read ({error.strerror}).') from error


def class_names(
  root: pathlib.Path, given: str | None = None, *, numbered: bool = True
) -> tuple[str, ...] | None:
  """The names in `classes.txt`, one a line, in the order of the labels.

  Args:
    root: the set's folder.
    given: another file than `classes.txt`, relative to `root` or absolute.
    numbered: whether the labels are whole numbers. A name that is a number must then be its own
      label: labels 1..3 and the names 1, 2, 3 would silently mean the classes 2, 3 and none.

  Returns:
    The names; None if there is no such file and none is given.

  Raises:
    errors.UserError: naming file and line of an empty or repeated name, or of a number that is
      another label.
  """
  file = root / CLASSES_FILE
  if given:
    file = given_file(root, 'class_names', given)
  elif not file.is_file():
    return None
  try:
    names = [line.strip() for line in file.read_text('utf-8-sig').rstrip().split('\n')]
  except (OSError, UnicodeDecodeError) as error:
    raise errors.UserError(f'{file}: cannot be read as UTF-8 text ({error}).') from error
  lines: dict[str, int] = {}
  for number, name in enumerate(names, 1):
    if not name:
      raise errors.UserError(f'{file}:{number}: a class without a name.')
    if name in lines:
      raise errors.UserError(f"{file}:{number}: class '{name}' is already in line {lines[name]}.")
    lines[name] = number
    if numbered and _NUMBER.fullmatch(name) and int(name) != number - 1:
      raise errors.UserError(
        f"{file}:{number}: the name '{name}' is a number, but this line names label {number - 1}: "
        f'labels count from 0. Correct the labels or the line, or write a name that is no number.'
      )
  return tuple(names)


def repeated(names: Sequence[str]) -> tuple[int, int] | None:
  """Two positions of a name that occurs twice, the smaller first; None if there is none.

  Millions of names take 8 bytes each and no set of all of them.
  """
  hashes = np.fromiter((hash(name) for name in names), np.int64, len(names))
  ordered = np.sort(hashes)
  doubled = ordered[1:][ordered[1:] == ordered[:-1]]
  if not len(doubled):
    return None
  # Different names may have one hash.
  first: dict[str, int] = {}
  for i in np.flatnonzero(np.isin(hashes, doubled)).tolist():
    if names[i] in first:
      return first[names[i]], i
    first[names[i]] = i
  return None


def class_summary(train_labels: np.ndarray, num_classes: int, noun: str = 'image') -> str:
  """One line on the number of classes, and on how many of them have no training image (`noun`)."""
  missing = num_classes - len(np.unique(train_labels))
  return f'{num_classes} classes' + (
    f', {missing} of them without a training {noun}' if missing else ''
  )
