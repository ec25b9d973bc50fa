"""A user's own images: one folder per class.

Two layouts:

  path/train/cat/1.jpg      split folders; `val/` and `test/` are optional, and what is missing is
  path/val/cat/9.jpg        split off from `train/`
  path/test/cat/5.png

  path/cat/1.jpg            class folders only; validation and test images are split off
  path/dog/7.webp

A split-off part takes the same share of every class. Which images it takes depends only on
`split_seed` and each file's class and name: neither the machine nor other files matter. Labels
follow the alphabetical order of the class folders of the training images.

Nothing is left out silently: every file in a class folder must be an image. Hidden files and
`Thumbs.db` are skipped.
"""

import hashlib
import pathlib

import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import decode, sources

SPLIT_FOLDERS = ('train', 'val', 'test')
EXTENSIONS = ('.jpg', '.jpeg', '.png', '.webp')
# Files that operating systems leave behind; names that begin with a dot are skipped as well.
JUNK = ('thumbs.db', 'desktop.ini')
# Shares that are split off when neither the user nor a folder says otherwise.
VAL_FRACTION = 0.1
TEST_FRACTION = 0.2

# class name -> its files in order.
_ClassFiles = dict[str, list[pathlib.Path]]


def splits(
  *,
  image_size: int,
  interpolation: str = 'bicubic',
  path: str | None = None,
  val_fraction: float | None = None,
  test_fraction: float | None = None,
  split_seed: int = 0,
) -> sources.Splits:
  """Finds the images, checks the header of every file and splits them.

  Args:
    image_size: side of the images in pixels.
    interpolation: how they are resized, a key of `decode.INTERPOLATIONS`.
    path: the folder; required.
    val_fraction: share in [0, 1) of each class to validate with, where there is no `val/`; 0 for
      no validation split. Default 0.1.
    test_fraction: share in (0, 1) of each class to test with, where there is no `test/`. Default
      0.2.
    split_seed: another number splits differently.

  Returns:
    Sources that decode a file each time it is fetched.

  Raises:
    errors.UserError: naming the folder or file that is missing, empty, not an image or unknown to
      the training classes.
  """
  if not path:
    raise errors.UserError(
      "Dataset 'image_folder' needs the folder of your images: --config.dataset_configs.path=DIR."
    )
  root = pathlib.Path(path).expanduser()
  if not root.is_dir():
    raise errors.UserError(f'{root}: there is no such folder (--config.dataset_configs.path).')
  found = _find(root)
  train = found['train']
  for part, given, default in (
    ('test', test_fraction, TEST_FRACTION),
    ('val', val_fraction, VAL_FRACTION),
  ):
    if part not in found:
      found[part] = {}
      fraction = _checked_fraction(f'{part}_fraction', default if given is None else given)
      if fraction:
        train, found[part] = _split_off(train, found['train'], fraction, f'{split_seed}/{part}')
    elif given is not None:
      raise errors.UserError(
        f'{part}_fraction is given, but {root / part} exists: leave one of them out.'
      )
  if not found['test']:
    raise errors.UserError(f"{root}: no test images: give 'test/' or a test_fraction above 0.")
  return sources.Splits(
    train=_source(train, tuple(train), image_size, interpolation),
    valid=_source(found['val'], tuple(train), image_size, interpolation) if found['val'] else None,
    test=_source(found['test'], tuple(train), image_size, interpolation),
    class_names=tuple(train),
  )


def _find(root: pathlib.Path) -> dict[str, _ClassFiles]:
  """The images of each split folder, or of 'train' alone where there are only class folders."""
  folders = _folders(root)
  names = {folder.name for folder in folders}
  # A class may be called 'train': a split folder is one that holds folders.
  has_splits = any(f.name in SPLIT_FOLDERS and _folders(f) for f in folders)
  if not has_splits and not names <= set(SPLIT_FOLDERS):
    found = {'train': _class_files(root)}
  else:
    for name in sorted(names):
      if name not in SPLIT_FOLDERS:
        raise errors.unknown(f'split folder in {root}:', name, SPLIT_FOLDERS)
    if names and 'train' not in names:
      raise errors.UserError(f"{root}: there is '{min(names)}/' but no 'train/'.")
    found = {part: _class_files(root / part) for part in SPLIT_FOLDERS if part in names}
    if not found:
      raise errors.UserError(f'{root}: there are no class folders in it.')
  for part in ('val', 'test'):
    for name in found.get(part, ()):
      if name not in found['train']:
        where = f'class folder {root / part / name} (not in train):'
        raise errors.unknown(where, name, found['train'])
  paths = [file for classes in found.values() for files in classes.values() for file in files]
  sources.parallel(lambda i: decode.check_header(paths[i]), len(paths))
  return found


def _class_files(folder: pathlib.Path) -> _ClassFiles:
  classes = _folders(folder)
  if not classes:
    raise errors.UserError(f'{folder}: there are no class folders in it.')
  for entry in _visible(folder):
    if entry.suffix.lower() in EXTENSIONS and not entry.is_dir():
      raise errors.UserError(f'{entry}: an image outside the class folders.')
  return {subfolder.name: _files(subfolder) for subfolder in classes}


def _files(class_folder: pathlib.Path) -> list[pathlib.Path]:
  files = _visible(class_folder)
  for file in files:
    if file.is_dir():
      raise errors.UserError(f'{file}: a folder inside a class folder; images must lie in it.')
    if file.suffix.lower() not in EXTENSIONS:
      raise errors.UserError(
        f'{file}: not an image; class folders may hold {", ".join(EXTENSIONS)}.'
      )
  if not files:
    raise errors.UserError(f'{class_folder}: the class folder is empty.')
  return files


def _folders(folder: pathlib.Path) -> list[pathlib.Path]:
  return [entry for entry in _visible(folder) if entry.is_dir()]


def _visible(folder: pathlib.Path) -> list[pathlib.Path]:
  try:
    entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
  except OSError as error:
    raise errors.UserError(f'{folder}: cannot be read ({error.strerror}).') from error
  return [e for e in entries if not e.name.startswith('.') and e.name.lower() not in JUNK]


def _split_off(
  remaining: _ClassFiles, all_files: _ClassFiles, fraction: float, salt: str
) -> tuple[_ClassFiles, _ClassFiles]:
  """Moves `fraction` of each class's files, counted on `all_files`, out of `remaining`."""
  kept, taken = {}, {}
  for name, files in remaining.items():
    count = max(1, round(fraction * len(all_files[name])))
    if count >= len(files):
      raise errors.UserError(
        f'{files[0].parent}: {len(all_files[name])} images are too few to split off validation '
        'and test images and keep some to train on.'
      )
    ranked = sorted(files, key=lambda file: _hash(f'{salt}/{file.parent.name}/{file.name}'))
    taken[name] = sorted(ranked[:count])
    kept[name] = sorted(ranked[count:])
  return kept, taken


def _hash(text: str) -> bytes:
  return hashlib.sha256(text.encode('utf-8', 'surrogateescape')).digest()


def _checked_fraction(option: str, value: float) -> float:
  if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
    raise errors.UserError(f'{option} must be a number in [0, 1), not {value!r}.')
  return float(value)


def _source(
  classes: _ClassFiles, class_names: tuple[str, ...], image_size: int, interpolation: str
) -> sources.FileSource:
  paths = [file for files in classes.values() for file in files]
  counts = [len(files) for files in classes.values()]
  labels = np.repeat([class_names.index(name) for name in classes], counts)
  return sources.FileSource(
    paths, labels, image_size, num_classes=len(class_names), interpolation=interpolation
  )
