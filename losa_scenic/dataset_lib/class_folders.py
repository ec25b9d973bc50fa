"""Files in one folder per class, as sets of images and of clips have them.

Nothing is left out silently: every file in a class folder must be named as one of the set's kind.
Hidden files and `Thumbs.db` are skipped. Links are followed. Files are opened when they are needed,
not before: a link that leads nowhere is found, and replaced as any bad file, when it is read.
"""

import os
import pathlib

import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import folders, sources, splitting
from losa_scenic.dataset_lib.media import Media

SPLIT_FOLDERS = ('train', 'val', 'test')
# Files that operating systems leave behind; names that begin with a dot are skipped as well.
JUNK = ('thumbs.db', 'desktop.ini')

# class name -> the names of its files in order.
_ClassFiles = dict[str, list[str]]


def open_splits(
  media: Media,
  dataset: str,
  root: str | None,
  *,
  val_fraction: float | None,
  test_fraction: float | None,
  split_seed: int,
) -> sources.Splits:
  """Finds the files and splits them.

  Args:
    media: their kind.
    dataset: name of the data set, for messages.
    root: the folder.
    val_fraction: share in [0, 1) of each class to validate with, where there is no `val/`; 0 for
      no validation split. Default 0.1.
    test_fraction: share in (0, 1) of each class to test with, where there is no `test/`. Default
      0.2.
    split_seed: another number splits differently.

  Raises:
    errors.UserError: naming the folder or file that is missing, empty, not of this kind by its name
      or of a class without training files.
  """
  folder = folders.checked_root(dataset, root)
  if not folder.is_dir():
    raise errors.UserError(f'{folder}: not a folder (--config.dataset_configs.root).')
  found = _find(media, folder)
  class_names = tuple(found['train'][1])
  parts = {
    part: _source(media, where, classes, class_names) for part, (where, classes) in found.items()
  }
  names = [name for files in found['train'][1].values() for name in files]
  about = [
    f'{part}: {len(source):,} {media.noun}s in {source.root}' for part, source in parts.items()
  ]
  if val_fraction is None and 'val' not in parts:
    val_fraction = splitting.VAL_FRACTION
  complete, split_off = splitting.complete(
    parts,
    names,
    parts['train'].labels,
    class_names,
    val_fraction=val_fraction,
    test_fraction=test_fraction,
    split_seed=split_seed,
    where=str(folder),
    noun=media.noun,
  )
  return sources.Splits(
    complete['train'],
    complete.get('val'),
    complete['test'],
    class_names,
    (*about, *split_off),
    clips=media.is_clip,
  )


def _find(media: Media, root: pathlib.Path) -> dict[str, tuple[pathlib.Path, _ClassFiles]]:
  """Folder and files of each split, or of 'train' alone where there are only class folders."""
  names = {folder.name for folder in _subfolders(root)}
  # A class may be called 'train': a split folder is one that holds folders.
  has_splits = any(_subfolders(root / name) for name in names & set(SPLIT_FOLDERS))
  if not has_splits and not names <= set(SPLIT_FOLDERS):
    return {'train': (root, _class_files(media, root))}
  for name in sorted(names):
    if name not in SPLIT_FOLDERS:
      raise errors.unknown(f'split folder in {root}:', name, SPLIT_FOLDERS)
  if not names:
    raise errors.UserError(f'{root}: there are no class folders in it.')
  if 'train' not in names:
    raise errors.UserError(f"{root}: there is '{min(names)}/' but no 'train/'.")
  found = {p: (root / p, _class_files(media, root / p)) for p in SPLIT_FOLDERS if p in names}
  for where, classes in found.values():
    for name in classes:
      if name not in found['train'][1]:
        place = f'class folder {where / name} (not in train):'
        raise errors.unknown(place, name, found['train'][1])
  return found


def _class_files(media: Media, folder: pathlib.Path) -> _ClassFiles:
  classes = _subfolders(folder)
  if not classes:
    raise errors.UserError(f'{folder}: there are no class folders in it.')
  for entry in _visible(folder):
    if media.is_named(entry.name) and not folders.is_folder(entry):
      raise errors.UserError(f'{entry.path}: {media.one} outside the class folders.')
  return {entry.name: _files(media, entry.path) for entry in classes}


def _files(media: Media, class_folder: str) -> list[str]:
  entries = _visible(pathlib.Path(class_folder))
  for entry in entries:
    if folders.is_folder(entry):
      raise errors.UserError(
        f'{entry.path}: a folder inside a class folder; {media.noun}s lie in it.'
      )
    if not media.is_named(entry.name):
      raise errors.UserError(
        f'{entry.path}: not {media.one}; class folders may hold {", ".join(media.extensions)}.'
      )
    # Opening a pipe would wait for ever. For what is no link, neither call asks the disk.
    if not folders.is_file(entry) and not (entry.is_symlink() and not os.path.exists(entry.path)):
      raise errors.UserError(
        f'{entry.path}: neither a file nor a link to one (a pipe, a device..).'
      )
  if not entries:
    raise errors.UserError(f'{class_folder}: the class folder is empty.')
  return [entry.name for entry in entries]


def _subfolders(folder: pathlib.Path) -> list[os.DirEntry[str]]:
  return [entry for entry in _visible(folder) if folders.is_folder(entry)]


def _visible(folder: pathlib.Path) -> list[os.DirEntry[str]]:
  return [entry for entry in folders.entries(folder) if entry.name.lower() not in JUNK]


def _source(
  media: Media, root: pathlib.Path, classes: _ClassFiles, class_names: tuple[str, ...]
) -> sources.FileSource:
  files = [f'{name}/{file}' for name, files in classes.items() for file in files]
  counts = [len(files) for files in classes.values()]
  labels = np.repeat([class_names.index(name) for name in classes], counts)
  return media.source(root, files, labels, num_classes=len(class_names))
