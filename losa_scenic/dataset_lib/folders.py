"""What the sets that are files on a disk share: the root, the files in it and `classes.txt`."""

import os
import pathlib

import numpy as np

from losa_scenic.common_lib import errors

CLASSES_FILE = 'classes.txt'


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
  path = pathlib.Path(root).expanduser()
  if not path.exists():
    raise errors.UserError(
      f'{path}: there is no such file or folder (--config.dataset_configs.root).'
    )
  return path


def given_file(root: pathlib.Path, option: str, name: str) -> pathlib.Path:
  """A file that the user names, relative to the set's folder or absolute.

  Raises:
    errors.UserError: if there is no such file, naming the nearest one in the folder.
  """
  file = root / pathlib.Path(name).expanduser()
  if not file.is_file():
    alike = [other for other in visible_files(root) if other.endswith(file.suffix)]
    raise errors.unknown(f'file ({option}) in {root}:', name, alike[:50])
  return file


def visible_files(folder: pathlib.Path) -> list[str]:
  """Names of the files in a folder in order, without those that begin with a dot."""
  return [entry.name for entry in entries(folder) if entry.is_file()]


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


def class_names(root: pathlib.Path, given: str | None = None) -> tuple[str, ...] | None:
  """The names in `classes.txt`, one a line, in the order of the labels.

  Args:
    root: the set's folder.
    given: another file than `classes.txt`, relative to `root` or absolute.

  Returns:
    The names; None if there is no such file and none is given.

  Raises:
    errors.UserError: naming file and line of an empty or repeated name.
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
  return tuple(names)


def class_summary(train_labels: np.ndarray, num_classes: int) -> str:
  """One line on the number of classes, and on how many of them have no training image."""
  missing = num_classes - len(np.unique(train_labels))
  return f'{num_classes} classes' + (
    f', {missing} of them without a training image' if missing else ''
  )
