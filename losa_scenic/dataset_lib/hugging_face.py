"""Images in a folder of Hugging Face's `datasets`, without network.

The folder is what `save_to_disk` wrote, or one that `datasets.load_dataset(folder)` reads: parquet
files (`train-00000-of-00002.parquet`, also in `data/`) or its other formats, of which it writes a
copy to its cache at the first use. `pip install losa_scenic[hf]`.

Labels are those of a ClassLabel, whole numbers from 0, or class names, sorted. What is missing is
split off the training images, see `splitting`.
"""

import os
import pathlib
from typing import Any

import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import folders, sources, splitting
from losa_scenic.dataset_lib import hugging_face_columns as columns

# Names that are tried for validation and test images.
_VAL_NAMES = ('validation', 'valid', 'val')
_TEST_NAMES = ('test',)
# Before this release, loading a folder could run a script in it.
_OLDEST = 4


class HuggingFaceSource:
  """The images of one split.

  Attributes:
    table: the `datasets.Dataset`, of the image column alone.
    column: its name.
    labels: int32 [n] in [0, num_classes).
    root: folder that relative paths in the table start from.
    name: of the set and split; image i is 'name[i]'.
  """

  def __init__(
    self,
    table: Any,
    column: str,
    labels: np.ndarray,
    *,
    num_classes: int,
    root: pathlib.Path,
    name: str,
  ) -> None:
    """Keeps the table without decoding.

    Args:
      table: a `datasets.Dataset`; its column may be of images, encoded bytes or paths.
      column: the image column.
      labels: integers [n].
      num_classes: number of classes.
      root: folder that relative paths in the table start from.
      name: of the set and split.

    Raises:
      errors.UserError: for a label out of range, naming the image.
    """
    import datasets

    self.table = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    self.column, self.root, self.name = column, root, name
    self.labels = sources.checked_labels(labels, len(table), num_classes, lambda i: f'{name}[{i}]')

  def __len__(self) -> int:
    """Number of images."""
    return len(self.labels)

  def __getitem__(self, index: int) -> sources.Record:
    """See `Source`."""
    name = f'{self.name}[{index}]'
    try:
      stored = self.table[int(index)][self.column]
    except (OSError, ValueError) as error:  # Arrow's errors are ValueErrors.
      raise sources.BadImage(name, f'cannot be read ({error})') from error
    if not stored or (stored['bytes'] is None and not stored['path']):
      raise sources.BadImage(name, 'there is no image in this row')
    image = stored['bytes']
    if image is None:
      path = os.path.join(self.root, stored['path'])
      name = f'{name} ({path})'
      try:
        image = sources.read_file(path)
      except OSError as error:
        raise sources.BadImage(name, f'cannot be read ({error.strerror})') from error
    return sources.Record(image, int(self.labels[index]), name)


def splits(
  *,
  root: str | None = None,
  train_name: str = 'train',
  val_name: str | None = None,
  test_name: str | None = None,
  image_column: str | None = None,
  label_column: str | None = None,
  val_fraction: float | None = None,
  test_fraction: float | None = None,
  split_seed: int = 0,
  cache_dir: str | None = None,
) -> sources.Splits:
  """Opens the splits.

  Args:
    root: the folder; required.
    train_name: split to train on. A saved table that is no split counts as 'train'.
    val_name: split to validate with; default 'validation', 'valid' or 'val' if there is one.
    test_name: split to test on; default 'test' if there is one.
    image_column: the column of images; default the only one that can be.
    label_column: the column of labels; default the only one that can be.
    val_fraction: share of each class to validate with, if there is no split, see `splitting`.
    test_fraction: share of each class to test with, if there is no split.
    split_seed: another number splits differently.
    cache_dir: where `datasets` puts its copies of folders that `save_to_disk` did not write.

  Returns:
    Sources that read a row each time it is asked for.

  Raises:
    errors.UserError: without the extra, and naming the split, column or row that is wrong.
  """
  folder = folders.checked_root('hugging_face', root)
  tables = _parts(folder, _load(folder, cache_dir), train_name, val_name, test_name)
  train = tables['train'][1]
  image = columns.image_column(folder, train, image_column)
  label = columns.label_column(folder, train, label_column, image)
  for split, table in tables.values():
    for column in (image, label):
      errors.one_of(f'column of split {split} in {folder}:', column, table.features)
  labels, names = columns.labels(folder, tables, label)
  parts: dict[str, sources.Source] = {}
  about = [f'{folder}: {folders.class_summary(labels["train"], len(names))}']
  for part, (split, table) in tables.items():
    parts[part] = HuggingFaceSource(
      table, image, labels[part], num_classes=len(names), root=folder, name=f'{folder}/{split}'
    )
    about.append(f"{part}: {len(table)} images in split '{split}', column '{image}'")
  parts, more = splitting.complete(
    parts,
    [str(i) for i in range(len(train))],
    labels['train'],
    names,
    val_fraction=val_fraction,
    test_fraction=test_fraction,
    split_seed=split_seed,
    where=str(folder),
  )
  return sources.Splits(parts['train'], parts.get('val'), parts['test'], names, (*about, *more))


def _load(folder: pathlib.Path, cache_dir: str | None) -> dict[str, Any]:
  """Split name -> `datasets.Dataset`; of a single split without a name 'train'."""
  if not folder.is_dir():
    raise errors.UserError(f'{folder}: root must be a folder; give the one that holds this file.')
  try:
    import datasets
  except ImportError as error:
    raise errors.UserError(
      "Dataset 'hugging_face' needs the package datasets: pip install losa_scenic[hf]."
    ) from error
  if int(datasets.__version__.split('.')[0]) < _OLDEST:
    raise errors.UserError(
      f"Dataset 'hugging_face' needs datasets {_OLDEST} or later, not {datasets.__version__}: "
      'pip install losa_scenic[hf].'
    )
  if cache_dir and folder.resolve() in (pathlib.Path(cache_dir) / 'x').resolve().parents:
    # The next start would read the copy as a part of the set.
    raise errors.UserError(f'cache_dir {cache_dir} must lie outside of {folder}.')
  is_saved = any((folder / name).is_file() for name in ('dataset_dict.json', 'state.json'))
  try:
    if is_saved:
      loaded = datasets.load_from_disk(str(folder))
    else:
      loaded = datasets.load_dataset(str(folder), cache_dir=cache_dir)
  except Exception as error:  # The library has no common base class of its errors.
    reason = str(error.__cause__ or error).strip().split('\n')[0]
    raise errors.UserError(
      f'{folder}: datasets cannot load this folder ({type(error).__name__}: {reason}).'
    ) from error
  tables = loaded if isinstance(loaded, dict) else {'train': loaded}
  return {str(name): table for name, table in tables.items()}


def _parts(
  folder: pathlib.Path,
  found: dict[str, Any],
  train_name: str,
  val_name: str | None,
  test_name: str | None,
) -> dict[str, tuple[str, Any]]:
  """'train' and perhaps 'val' and 'test' -> (name of the split, table)."""
  chosen = {'train': train_name}
  for part, given, names in (('val', val_name, _VAL_NAMES), ('test', test_name, _TEST_NAMES)):
    if given:
      chosen[part] = given
      continue
    others = set(found) - {train_name, val_name, test_name}
    free = [name for name in names if name in others]
    if free:
      chosen[part] = free[0]
  for part, name in chosen.items():
    if name not in found:
      raise errors.unknown(f'split ({part}_name) in {folder}:', name, found)
    if list(chosen.values()).count(name) > 1:
      raise errors.UserError(f"{folder}: split '{name}' is named for two parts.")
    if not len(found[name]):
      raise errors.UserError(f"{folder}: split '{name}' has no rows.")
  return {part: (name, found[name]) for part, name in chosen.items()}
