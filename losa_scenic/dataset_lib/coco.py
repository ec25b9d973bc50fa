"""Images annotated in JSON as COCO and iNaturalist publish it, one category per image.

  train2018.json, val2018.json     iNaturalist 2018, images in train_val2018/
  train.json, val.json             iNaturalist 2021, images in train/ and val/
  train_mini.json                  its small training set: train_json='train_mini.json'

Of a file only images[id, file_name], annotations[image_id, category_id] and categories[id, name]
count; `categories.json` in the folder may give the names (iNaturalist 2018). Labels follow the
order of the category ids, which need not be contiguous. Two files must not give one id two names,
and no image may be listed twice, be it in one file or in two.

The labels of the published test images are secret: without an annotated test file, the published
validation images are the test images, as in the literature, and `val_fraction` splits validation
images off the training images.
"""

import array
import bisect
import collections
import itertools
import os
import pathlib
import posixpath
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import folders, json_stream, list_rows, sources, splitting

CATEGORIES_FILE = 'categories.json'
# A part's file: train.json, train2018.json.
_NAME = re.compile(r'(train|val|test)(20\d\d)?\.json')
_MINI = 'train_mini.json'


class _Annotated(NamedTuple):
  """What a file says: names [n], category ids int64 [n] (-1: none), id -> category name."""

  file: pathlib.Path
  files: list[str]
  category: np.ndarray
  names: dict[int, str | None]


def splits(
  *,
  root: str | None = None,
  train_json: str | None = None,
  val_json: str | None = None,
  test_json: str | None = None,
  val_fraction: float | None = None,
  split_seed: int = 0,
) -> sources.Splits:
  """Reads the annotations; of the images only the presence of the first of each part is checked.

  Args:
    root: the folder that the images' file names are relative to; required.
    train_json: annotations of the training images, relative to `root` or absolute. Default: found
      by name, as are the others.
    val_json: annotations of the published validation images; the test images if there are no
      others.
    test_json: annotations of the test images.
    val_fraction: share of each class to split off for validation, if there is none; default 0. The
      choice depends on category ids and file names.
    split_seed: another number splits differently.

  Returns:
    Sources that read a file each time it is asked for.

  Raises:
    errors.UserError: naming the file and the entry that is wrong, or the file that is missing.
  """
  folder = folders.checked_root('coco', root)
  if not folder.is_dir():
    raise errors.UserError(f'{folder}: root must be the folder that the file names start from.')
  given = {'train': train_json, 'val': val_json, 'test': test_json}
  read, about = _read_parts(folder, given)
  _check_names(read)
  _check_repeats(read)
  ids = np.array(sorted(read['train'].names), np.int64)
  names = _class_names(folder, read['train'], ids)
  labels = {part: _labels(annotated, ids) for part, annotated in read.items()}
  parts: dict[str, sources.Source] = {}
  for part, annotated in read.items():
    first = folder / annotated.files[0]
    if not os.path.exists(first):
      raise errors.UserError(
        f'{first}: the first image of {annotated.file.name} is not there: the images must lie in '
        f'{first.parent}.'
      )
    parts[part] = sources.FileSource(folder, annotated.files, labels[part], num_classes=len(ids))
    about.append(f'{part}: {len(annotated.files)} images in {annotated.file.name}')
  about.insert(0, f'{folder}: {folders.class_summary(labels["train"], len(ids))}')
  parts, more = splitting.complete(
    parts,
    read['train'].files,
    labels['train'],
    [str(i) for i in ids],
    val_fraction=val_fraction,
    test_fraction=None,
    split_seed=split_seed,
    where=str(folder),
  )
  return sources.Splits(parts['train'], parts.get('val'), parts['test'], names, (*about, *more))


def find(names: Sequence[str]) -> dict[str, list[str]]:
  """The files in a folder that are named like annotations of a part.

  Args:
    names: of the files in the folder, in order.

  Returns:
    'train', 'val', 'test' -> names, those only that have any.
  """
  found = list_rows.by_part(names, _NAME)
  if _MINI in names:
    found.setdefault('train', [_MINI])
  return found


def _read_parts(
  folder: pathlib.Path, given: dict[str, str | None]
) -> tuple[dict[str, _Annotated], list[str]]:
  """The annotations that become 'train', 'test' and perhaps 'val', and notes on them."""
  found, files, about = find(folders.visible_files(folder)), {}, []
  for part in ('train', 'val', 'test'):
    name = given[part]
    if not name and len(found.get(part, ())) > 1:
      raise errors.UserError(
        f'{folder}: there are {" and ".join(found[part])}: choose one with '
        f'--config.dataset_configs.{part}_json=FILE.'
      )
    if name or part in found:
      files[part] = folders.given_file(folder, f'{part}_json', name or found[part][0])
  if 'train' not in files or len(files) == 1:
    part = 'val' if 'train' in files else 'train'
    raise errors.UserError(
      f'{folder}: no annotations found that are named like {part}.json or {part}2018.json: give '
      f'--config.dataset_configs.{part}_json=FILE.'
    )
  read = {part: _read(file) for part, file in files.items()}
  if 'test' in read and not given['test'] and 'val' in read and read['test'].category.max() < 0:
    about.append(f'{read.pop("test").file.name} has no annotations and is not used')
  if 'test' not in read:
    about.append('test: the published val images, since test images without labels are no use')
    read['test'] = read.pop('val')
  return read, about


def _read(file: pathlib.Path) -> _Annotated:
  image_ids, of_image, of_category = (array.array('q') for _ in range(3))
  files: list[str] = []
  names: dict[int, str | None] = {}
  for key, item in json_stream.elements(file):
    try:
      if key == 'images':
        image_ids.append(item['id'])
        files.append(_file_name(item['file_name']))
      elif key == 'annotations':
        of_image.append(item['image_id'])
        of_category.append(item['category_id'])
      elif key == 'categories':
        _add_category(file, names, item)
    except (KeyError, TypeError, OverflowError) as error:
      raise errors.UserError(
        f'{file}: {str(item)[:200]} in {key}: images need id and file_name, annotations image_id '
        'and category_id (ids are whole numbers below 2**63).'
      ) from error
  if not files:
    raise errors.UserError(f"{file}: there are no 'images' in it.")
  images, annotated, category = (np.array(a) for a in (image_ids, of_image, of_category))
  return _Annotated(file, files, _categories(file, files, images, annotated, category), names)


def _check_names(read: dict[str, _Annotated]) -> None:
  """Raises `UserError` if an id has another name than in the training file: labels would swap."""
  train = read['train']
  for other in read.values():
    for number, name in other.names.items():
      known = train.names.get(number)
      if None not in (known, name) and known != name:
        raise errors.UserError(
          f"{other.file}: category {number} is '{name}', but '{known}' in {train.file.name}."
        )


def _check_repeats(read: dict[str, _Annotated]) -> None:
  """Raises `UserError` if an image is listed twice, in one file or in two."""
  parts = tuple(read.values())
  names = [name for part in parts for name in part.files]
  if pair := folders.repeated(names):
    ends = list(itertools.accumulate(len(part.files) for part in parts))
    first, second = (parts[bisect.bisect_right(ends, position)] for position in pair)
    where = 'listed twice' if first is second else f'listed in {first.file.name} as well'
    raise errors.UserError(f'{second.file}: {names[pair[1]]} is {where}.')


def _file_name(value: object) -> str:
  if not isinstance(value, str) or not value:
    raise TypeError
  # What leads out of the folder is refused later.
  needs_it = ('./' in value or '//' in value) and '..' not in value
  return posixpath.normpath(value) if needs_it else value


def _whole(value: object) -> int:
  if not isinstance(value, int) or not -(2**63) <= value < 2**63:
    raise TypeError
  return value


def _add_category(file: pathlib.Path, names: dict[int, str | None], category: Any) -> None:
  try:
    number, name = _whole(category['id']), category.get('name')
  except (KeyError, TypeError) as error:
    raise errors.UserError(
      f'{file}: {str(category)[:200]}: a category needs an id, a whole number below 2**63.'
    ) from error
  if number in names:
    raise errors.UserError(f'{file}: two categories have the id {number}.')
  names[number] = None if name is None else str(name)


def _categories(
  file: pathlib.Path,
  files: list[str],
  image_ids: np.ndarray,
  of_image: np.ndarray,
  of_category: np.ndarray,
) -> np.ndarray:
  """The category id of each image, -1 without annotation; integers [n], [a], [a] -> int64 [n]."""
  order = np.argsort(image_ids, kind='stable')
  ordered = image_ids[order]
  if np.any(ordered[1:] == ordered[:-1]):
    image = ordered[np.argmax(ordered[1:] == ordered[:-1])]
    raise errors.UserError(f'{file}: two images have the id {image}.')
  at = np.minimum(np.searchsorted(ordered, of_image), len(ordered) - 1)
  if np.any(ordered[at] != of_image):
    image = of_image[np.argmax(ordered[at] != of_image)]
    raise errors.UserError(f'{file}: an annotation is of image {image}, which is not listed.')
  if np.any(of_category < 0):
    raise errors.UserError(f'{file}: category id {of_category.min()} is below 0.')
  position = order[at]
  category = np.full(len(files), -1, np.int64)
  category[position] = of_category
  other = category[position] != of_category
  if np.any(other):
    image = position[np.argmax(other)]
    raise errors.UserError(
      f'{file}: {files[image]} has annotations of two categories, {of_category[np.argmax(other)]} '
      f'and {category[image]}: every image must have exactly one.'
    )
  return category


def _labels(annotated: _Annotated, ids: np.ndarray) -> np.ndarray:
  """int32 [n]: the position of each image's category id in the sorted `ids`."""
  category, file = annotated.category, annotated.file
  if np.any(category < 0):
    name = annotated.files[np.argmax(category < 0)]
    raise errors.UserError(
      f'{file}: {name} has no annotation; {np.sum(category < 0)} images lack one.'
    )
  at = np.minimum(np.searchsorted(ids, category), len(ids) - 1)
  if np.any(ids[at] != category):
    image = np.argmax(ids[at] != category)
    raise errors.UserError(
      f'{file}: {annotated.files[image]} is of category {category[image]}, which the categories of '
      'the training file do not have.'
    )
  return at.astype(np.int32)


def _class_names(folder: pathlib.Path, train: _Annotated, ids: np.ndarray) -> tuple[str, ...]:
  """A name per id: of categories.json, else of the training file, else the id."""
  if not len(ids):
    raise errors.UserError(f"{train.file}: there are no 'categories' in it.")
  named, file = dict(train.names), folder / CATEGORIES_FILE
  if file.is_file():
    listed: dict[int, str | None] = {}
    for _, item in json_stream.elements(file):
      _add_category(file, listed, item)
    missing = [int(i) for i in ids if i not in listed]
    if missing:
      raise errors.UserError(f'{file}: category {missing[0]} of {train.file.name} is not in it.')
    named = listed
  names = [str(i) if named[i] is None else str(named[i]) for i in ids.tolist()]
  # Species of two kingdoms may share a name.
  count = collections.Counter(names)
  return tuple(
    name if count[name] == 1 else f'{name} ({i})' for name, i in zip(names, ids, strict=True)
  )
