"""Files named by lists, text or tables, as sets of images and of clips have them."""

import itertools
import os
import pathlib
from collections.abc import Iterable, Mapping

import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import clip_files, folders, list_labels, list_rows, sources, splitting
from losa_scenic.dataset_lib.frame_sampling import WHOLE
from losa_scenic.dataset_lib.media import Media


def open_splits(
  media: Media,
  dataset: str,
  root: str | None,
  given: Mapping[str, str | None],
  *,
  val_fraction: float | None,
  test_fraction: float | None,
  split_seed: int,
  class_names: str | None,
) -> sources.Splits:
  """Reads the lists; of the files only the presence of a few is checked.

  Args:
    media: the kind of the files.
    dataset: name of the data set, for messages.
    root: the folder, or one list file in it.
    given: the lists of 'train', 'val' and 'test' that the user names, relative to the folder or
      absolute; None for those that are found by name. Where a list of training files is given, no
      list of validation files is looked for: it may hold them.
    val_fraction: share of each class to validate with, if there is no list, see `splitting`.
    test_fraction: share of each class to test with, if there is no list.
    split_seed: another number splits differently.
    class_names: file with the class names, one a line; default `classes.txt` if there is one.

  Raises:
    errors.UserError: naming the file and line that is wrong, or the list that is missing.
  """
  path = folders.checked_root(dataset, root)
  if path.is_dir():
    folder, files = path, _list_files(media, path, given)
  elif any(given.values()):
    raise errors.UserError(f'{path}: root is a list itself; with train_list.. give its folder.')
  else:
    folder, files = path.parent, {'train': path}
  rows = _read(media, folder, files)
  numbered = list_labels.is_numbered(rows)
  names = folders.class_names(folder, class_names, numbered=numbered)
  ids, names = list_labels.class_ids(rows, names)
  parts: dict[str, sources.Source] = {}
  about = [f'list {path}: {folders.class_summary(ids["train"], len(names), media.noun)}']
  for part, listed in rows.items():
    _check_presence(folder, listed)
    parts[part] = _source(media, folder, listed, ids[part], len(names))
    about.append(f'{part}: {len(listed.paths)} {media.noun}s in {listed.file.name}')
  parts, more = splitting.complete(
    parts,
    rows['train'].names(),
    ids['train'],
    names,
    val_fraction=val_fraction,
    test_fraction=test_fraction,
    split_seed=split_seed,
    where=str(path),
    noun=media.noun,
  )
  if more and folders.repeated(rows['train'].paths):
    more += (
      'note: parts of one file may lie on both sides of this split: a column split avoids it',
    )
  return sources.Splits(
    parts['train'],
    parts.get('val'),
    parts['test'],
    names,
    (*about, *more),
    clips=media.is_clip,
  )


def _source(
  media: Media,
  folder: pathlib.Path,
  rows: list_rows.Rows,
  labels: np.ndarray,
  num_classes: int,
) -> sources.FileSource:
  if media.is_clip and any(segment != WHOLE for segment in rows.segments):
    return clip_files.ClipFiles(
      folder, rows.paths, labels, num_classes=num_classes, segments=rows.segments
    )
  return media.source(folder, rows.paths, labels, num_classes=num_classes)


def find(names: Iterable[str], media: Media) -> dict[str, str]:
  """The lists in a folder that have one of the known names.

  Args:
    names: of the files in the folder.
    media: the kind of files that they list.

  Returns:
    'train' and perhaps 'val' and 'test' -> file name; empty if there are no such lists.
  """
  files = set(names)
  for extensions in (('.txt',), tuple(list_rows.DELIMITERS)):
    for known, extension in itertools.product(media.lists, extensions):
      if known[0] + extension in files:
        parts = zip(('train', 'val', 'test'), known, strict=True)
        return {part: name + extension for part, name in parts if name + extension in files}
  of_all = (media.table + extension for extension in list_rows.DELIMITERS if media.table)
  table = next((name for name in of_all if name in files), None)
  return {'train': table} if table else {}


def tables(names: Iterable[str], media: Media) -> list[str]:
  """Of the names of files in a folder, the CSV and TSV files that may list training files."""
  files = map(pathlib.Path, names)
  others = {name for known in media.lists for name in known[1:]}
  return [
    file.name
    for file in files
    if file.suffix.lower() in list_rows.DELIMITERS and file.stem not in others
  ]


def _list_files(
  media: Media, folder: pathlib.Path, given: Mapping[str, str | None]
) -> dict[str, pathlib.Path]:
  """The list of each part: the one that is given, else the one of a known name."""
  here = folders.visible_files(folder)
  found = find(here, media)
  if given['train']:
    # It may include the validation files, but no test files.
    names = (f'test{extension}' for extension in list_rows.EXTENSIONS)
    tests = [name for name in names if (folder / name).is_file()]
    found = {'test': tests[0]} if tests else {}
  files = {
    part: folders.given_file(folder, f'{part}_list', str(given[part] or found.get(part)))
    for part in ('train', 'val', 'test')
    if given[part] or part in found
  }
  if 'train' not in files:
    candidates = tables(here, media)
    if len(candidates) != 1 or files:
      looked_for = ', '.join(f'{names[0]}.txt/.csv/.tsv' for names in media.lists)
      raise errors.UserError(
        f'{folder}: no list of training {media.noun}s found. Looked for {looked_for} and for a '
        f'single CSV or TSV file; there are {", ".join(candidates) or "none"}. '
        'Give --config.dataset_configs.train_list=FILE.'
      )
    files['train'] = folder / candidates[0]
  return files


def _read(
  media: Media, folder: pathlib.Path, files: dict[str, pathlib.Path]
) -> dict[str, list_rows.Rows]:
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
    rows = list_rows.read(files['train'], folder, columns=media.columns, noun=media.noun)
    if 'train' not in rows:
      raise errors.UserError(f'{files["train"]}: no row is of the split train.')
    return rows
  return {
    part: list_rows.read(file, folder, part, columns=media.columns, noun=media.noun)[part]
    for part, file in files.items()
  }


def _check_presence(folder: pathlib.Path, rows: list_rows.Rows) -> None:
  """Raises `UserError` if neither the first, middle nor last file is there: a wrong folder."""
  some = {0, len(rows.paths) // 2, len(rows.paths) - 1}
  if not any(os.path.exists(folder / rows.paths[i]) for i in some):
    raise errors.UserError(
      f'{rows.where(0)}: {folder / rows.paths[0]} does not exist, nor do others of this list: '
      f'paths must be relative to {folder}.'
    )
