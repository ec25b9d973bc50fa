"""Something-Something v2: clips named by numbers, annotated in JSON.

  labels.json                       {"Putting something on a surface": "112", ..}
  train.json, validation.json       [{"id": "78687", "template": "Holding [something]", ..}, ..]

They lie in root or in root/labels or root/annotations, perhaps with the prefix
`something-something-v2-`. A clip's class is its template without the brackets. The clips, ID.webm
(or another video), lie in `videos` or in folders of it, such as 20bn-something-something-v2/.

Test clips were published without labels: the validation clips are the test clips, as in the
literature, and `val_fraction` splits validation clips off the training clips. Clips that are not
there are left out, see `published_clips`.
"""

import dataclasses
import json
import pathlib
from collections.abc import Collection
from typing import Any

import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import folders, json_stream, published_clips, sources

PREFIX = 'something-something-v2-'
# Folders that annotations may lie in.
FOLDERS = ('', 'labels', 'annotations')
_FILES = {'labels': 'labels.json', 'train': 'train.json', 'val': 'validation.json'}


def splits(
  *,
  root: str | None = None,
  annotations: str | None = None,
  videos: str | None = None,
  val_fraction: float | None = None,
  split_seed: int = 0,
  max_missing_fraction: float = published_clips.MAX_MISSING_FRACTION,
) -> sources.Splits:
  """Reads the annotations and looks for the clips; none is opened.

  Args:
    root: the folder; required.
    annotations: folder of the JSON files, relative to `root` or absolute. Default: found.
    videos: folder of the clips, relative to `root` or absolute. Default: `root`.
    val_fraction: share of each class of the training clips to validate with; default 0.
    split_seed: another number splits differently.
    max_missing_fraction: share of the clips of each part that may be missing.

  Returns:
    Sources of video files; nothing is opened.

  Raises:
    errors.UserError: naming the file and entry that is wrong, what is not found, or missing clips.
  """
  folder = published_clips.checked_folder('something_v2', root)
  files = _files(folder, annotations)
  names = _class_names(files.pop('labels'))
  number_of = {name: number for number, name in enumerate(names)}
  index = published_clips.Index(published_clips.given_folder(folder, 'videos', videos))
  wanted = {part: _wanted(file, index, number_of) for part, file in files.items()}
  splits = published_clips.open_splits(
    folder,
    wanted,
    names,
    (),
    val_fraction=val_fraction,
    split_seed=split_seed,
    max_missing_fraction=max_missing_fraction,
  )
  # 'Pushing something from left to right' is a class, and so is its mirror image.
  return dataclasses.replace(splits, sided=True)


def find(names: Collection[str]) -> dict[str, str]:
  """The annotations in a folder.

  Args:
    names: of the files in the folder.

  Returns:
    'labels', 'train' and 'val' -> file name; empty unless all are there.
  """
  for prefix in (PREFIX, ''):
    if all(prefix + name in names for name in _FILES.values()):
      return {part: prefix + name for part, name in _FILES.items()}
  return {}


def _files(root: pathlib.Path, given: str | None) -> dict[str, pathlib.Path]:
  """The file of the labels and of each part."""
  places = [root / name for name in FOLDERS]
  if given:
    places = [published_clips.given_folder(root, 'annotations', given)]
  for place in places:
    found = find(folders.visible_files(place)) if place.is_dir() else {}
    if found:
      return {part: place / name for part, name in found.items()}
  raise errors.UserError(
    f'{places[0]}: there are not all of {", ".join(_FILES.values())}, with or without the prefix '
    f'{PREFIX}: give their folder, --config.dataset_configs.annotations=FOLDER.'
  )


def _class_names(file: pathlib.Path) -> tuple[str, ...]:
  """The classes in the order of their numbers."""
  try:
    listed = json.loads(file.read_text('utf-8-sig'))
  except (OSError, ValueError) as error:
    raise errors.UserError(f'{file}: cannot be read as JSON ({error}).') from error
  try:
    numbers = {int(number): str(name) for name, number in listed.items()}
  except (AttributeError, TypeError, ValueError) as error:
    raise errors.UserError(f'{file}: it must map the text of each class to its number.') from error
  if not numbers or sorted(numbers) != list(range(len(listed))):
    raise errors.UserError(
      f'{file}: the numbers of its {len(listed)} classes must be 0..{len(listed) - 1}, each once.'
    )
  return tuple(numbers[i] for i in range(len(numbers)))


def _wanted(
  file: pathlib.Path, index: published_clips.Index, number_of: dict[str, int]
) -> published_clips.Wanted:
  names, labels = [], []
  for key, entry in json_stream.elements(file):
    if key:
      raise errors.UserError(f'{file}: it must be a list of clips, not an object.')
    name, label = _clip(file, len(names) + 1, entry)
    if label not in number_of:
      raise errors.unknown(f'template of clip {name} in {file}:', label, number_of)
    names.append(name)
    labels.append(number_of[label])
  if not names:
    raise errors.UserError(f'{file}: it lists no clips.')
  if twice := folders.repeated(names):
    raise errors.UserError(f'{file}: clip {names[twice[0]]} is listed twice.')
  files = [index.find(name) for name in names]
  return published_clips.Wanted(file, index.folder, names, np.array(labels, np.int32), files)


def _clip(file: pathlib.Path, position: int, entry: Any) -> tuple[str, str]:
  """Id and class of an entry."""
  try:
    name, template = entry['id'], entry['template']
    if isinstance(name, bool) or not isinstance(name, (int, str)) or not str(name):
      raise TypeError
    return str(name), template.replace('[', '').replace(']', '')
  except (KeyError, TypeError, AttributeError) as error:
    raise errors.UserError(
      f'{file}: entry {position}, {str(entry)[:100]}: a clip needs an id and a template (test '
      'clips have none, and are of no use).'
    ) from error
