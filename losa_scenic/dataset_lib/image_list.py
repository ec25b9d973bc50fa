"""Images named by lists: text as the VTAB-1k exports of the adapter papers, CSV or TSV.

  train800.txt, val200.txt, test.txt     one 'path label' a line, labels from 0; or
  train.txt, val.txt, test.txt           a path may contain spaces

  train.csv, val.csv, test.csv (.tsv)    a header with the columns path and label, perhaps more; or
  labels.csv                             the only table in the folder, perhaps with a column split
                                         that says train, val or test

Paths are relative to the folder. Labels of tables are whole numbers from 0 or class names; the
names are sorted, unless `classes.txt` gives their order, one a line.

What is missing is split off the training images, see `splitting`. Of lists with test images but no
validation images nothing is split off unless `val_fraction` is given: published lists are complete.
"""

import itertools
import os
import pathlib
from collections.abc import Iterable, Mapping

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import folders, list_rows, sources, splitting

# Names of the lists of training, validation and test images without their extension.
_NAMES = (('train800', 'val200', 'test'), ('train', 'val', 'test'))


def splits(
  *,
  root: str | None = None,
  train_list: str | None = None,
  val_list: str | None = None,
  test_list: str | None = None,
  val_fraction: float | None = None,
  test_fraction: float | None = None,
  split_seed: int = 0,
  class_names: str | None = None,
) -> sources.Splits:
  """Reads the lists; of the images only the presence of a few is checked.

  Args:
    root: the folder, or one list file in it; required.
    train_list: list of training images, relative to the folder or absolute. Default: found by name,
      as are the others. A table that is the only list may have a column 'split'.
    val_list: list of validation images. Where `train_list` is given, none is looked for: such a
      list (train800val200.txt) may hold the validation images.
    test_list: list of test images.
    val_fraction: share of each class to validate with, if there is no list, see `splitting`.
    test_fraction: share of each class to test with, if there is no list.
    split_seed: another number splits differently.
    class_names: file with the class names, one a line; default `classes.txt` if there is one.

  Returns:
    Sources that read a file each time it is asked for.

  Raises:
    errors.UserError: naming the file and line that is wrong, or the list that is missing.
  """
  path = folders.checked_root('image_list', root)
  given = {'train': train_list, 'val': val_list, 'test': test_list}
  if path.is_dir():
    folder, files = path, _list_files(path, given)
  elif any(given.values()):
    raise errors.UserError(f'{path}: root is a list itself; with train_list.. give its folder.')
  else:
    folder, files = path.parent, {'train': path}
  rows = _read(folder, files)
  numbered = list_rows.is_numbered(rows)
  names = folders.class_names(folder, class_names, numbered=numbered)
  ids, names = list_rows.class_ids(rows, names)
  parts: dict[str, sources.Source] = {}
  about = [f'list {path}: {folders.class_summary(ids["train"], len(names))}']
  for part, listed in rows.items():
    _check_presence(folder, listed)
    parts[part] = sources.FileSource(folder, listed.paths, ids[part], num_classes=len(names))
    about.append(f'{part}: {len(listed.paths)} images in {listed.file.name}')
  parts, more = splitting.complete(
    parts,
    rows['train'].paths,
    ids['train'],
    names,
    val_fraction=val_fraction,
    test_fraction=test_fraction,
    split_seed=split_seed,
    where=str(path),
  )
  return sources.Splits(parts['train'], parts.get('val'), parts['test'], names, (*about, *more))


def find(names: Iterable[str]) -> dict[str, str]:
  """The lists in a folder that have one of the known names.

  Args:
    names: of the files in the folder.

  Returns:
    'train' and perhaps 'val' and 'test' -> file name; empty if there are no such lists.
  """
  files = set(names)
  for extensions in (('.txt',), tuple(list_rows.DELIMITERS)):
    for known, extension in itertools.product(_NAMES, extensions):
      if known[0] + extension in files:
        parts = zip(('train', 'val', 'test'), known, strict=True)
        return {part: name + extension for part, name in parts if name + extension in files}
  return {}


def tables(names: Iterable[str]) -> list[str]:
  """Of the names of files in a folder, the CSV and TSV files that may list training images."""
  files = map(pathlib.Path, names)
  others = {name for known in _NAMES for name in known[1:]}
  return [
    file.name
    for file in files
    if file.suffix.lower() in list_rows.DELIMITERS and file.stem not in others
  ]


def _list_files(folder: pathlib.Path, given: Mapping[str, str | None]) -> dict[str, pathlib.Path]:
  """The list of each part: the one that is given, else the one of a known name."""
  here = folders.visible_files(folder)
  found = find(here)
  if given['train']:
    # It may include the validation images, but no test images.
    names = (f'test{extension}' for extension in list_rows.EXTENSIONS)
    tests = [name for name in names if (folder / name).is_file()]
    found = {'test': tests[0]} if tests else {}
  files = {
    part: folders.given_file(folder, f'{part}_list', str(given[part] or found.get(part)))
    for part in ('train', 'val', 'test')
    if given[part] or part in found
  }
  if 'train' not in files:
    candidates = tables(here)
    if len(candidates) != 1 or files:
      looked_for = ', '.join(f'{names[0]}.txt/.csv/.tsv' for names in _NAMES)
      raise errors.UserError(
        f'{folder}: no list of training images found. Looked for {looked_for} and for a single CSV '
        f'or TSV file; there are {", ".join(candidates) or "none"}. '
        'Give --config.dataset_configs.train_list=FILE.'
      )
    files['train'] = folder / candidates[0]
  return files


def _read(folder: pathlib.Path, files: dict[str, pathlib.Path]) -> dict[str, list_rows.Rows]:
  for file in files.values():
    if file.suffix.lower() not in list_rows.EXTENSIONS:
      raise errors.UserError(
        f'{file}: a list must be one of {", ".join(list_rows.EXTENSIONS)} (text: '
        "'path label' a line; tables: with a header)."
      )
  for (part, file), (other, same) in itertools.combinations(files.items(), 2):
    if file.samefile(same):
      raise errors.UserError(f'{file}: this list is given for two parts, {part} and {other}.')
  if len(files) == 1:
    rows = list_rows.read(files['train'], folder)
    if 'train' not in rows:
      raise errors.UserError(f'{files["train"]}: no row is of the split train.')
    return rows
  return {part: list_rows.read(file, folder, part)[part] for part, file in files.items()}


def _check_presence(folder: pathlib.Path, rows: list_rows.Rows) -> None:
  """Raises `UserError` if neither the first, middle nor last image is there: a wrong folder."""
  some = {0, len(rows.paths) // 2, len(rows.paths) - 1}
  if not any(os.path.exists(folder / rows.paths[i]) for i in some):
    raise errors.UserError(
      f'{rows.where(0)}: {folder / rows.paths[0]} does not exist, nor do others of this list: '
      f'paths must be relative to {folder}.'
    )
