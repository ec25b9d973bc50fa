"""Which data set a file or folder is, told from names alone.

Of the folder every name counts; of the folders in it only the first ones in order, and only the
first names of each, whatever order the file system gives: the answer is the same on every machine.

A list may be of images or of clips: what lies beside it, or below, decides. GIF files count as
images here.
"""

import functools
import heapq
import os
import pathlib
import re
from collections.abc import Callable, Sequence

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import (
  coco,
  folders,
  kinetics,
  list_rows,
  listed_files,
  something_v2,
  tar_shards,
)
from losa_scenic.dataset_lib.media import CLIPS, IMAGES

# Data set -> how it is recognised, for messages.
SIGNS = {
  'image_pack': 'a .npz file',
  'image_list': 'a .txt, .csv or .tsv file, or a folder with train800.txt, train.txt, train.csv or '
  'a single table',
  'tar_shards': 'a .tar file, or a folder with train-*.tar or train/*.tar',
  'tfds': 'a folder with dataset_info.json and features.json, perhaps one or two folders down',
  'hugging_face': 'a folder with dataset_dict.json, state.json or *.parquet',
  'coco': 'a folder with train.json or train2018.json',
  'image_folder': 'a folder with train/ and class folders in it, or with class folders of images',
  'clip_list': 'the same as image_list, with videos beside it or below, or clips.csv',
  'kinetics': 'a folder with videos below and annotations/train.csv and val.csv, validate.csv or '
  'kinetics_train.csv and kinetics_val.csv',
  'something_v2': 'a folder with labels.json, train.json and validation.json, perhaps in labels/ '
  'or annotations/, or with the prefix something-something-v2-',
  'clip_folder': 'the same as image_folder, with videos',
}
# Folders in the root that are looked into, and names looked at there, the first in order.
_GLANCE = 64
# Folders below the root in which a list's files are looked for.
_DEPTH = 3
# Clips as Kinetics' downloaders name them: ID_START_END.
_CUT = re.compile(r'.+_\d{6}_\d{6}\.\w+')
# Reads a part of a folder, see `_glance`.
_Look = Callable[[str], list[os.DirEntry[str]]]


def detect(root: str | None) -> str:
  """Finds out which data set `root` is. No file is opened.

  Signs that are put there on purpose (lists, annotations, shards) count more than folders of images
  or a table, which may lie beside them.

  Args:
    root: a file or folder.

  Returns:
    A key of `datasets.DATASETS`.

  Raises:
    errors.UserError: if it is none or several of them, with what was found and how to choose.
  """
  path = folders.checked_root('auto', root)
  strong, weak = (_of_folder if path.is_dir() else _of_file)(path)
  found = strong or weak
  if len(found) == 1:
    return next(iter(found))
  if found:
    kinds = ' and '.join(f"'{name}' ({sign})" for name, sign in found.items())
    raise errors.UserError(
      f'{path} looks like {kinds}: choose with --config.dataset_name={next(iter(found))}.'
    )
  looked_for = ''.join(f'\n  {name}: {sign}' for name, sign in SIGNS.items())
  here = ''
  if path.is_dir():
    names = [f'{e.name}/' if folders.is_folder(e) else e.name for e in folders.entries(path)[:9]]
    more = ', ..' if len(names) > 8 else ''
    here = f' There is {", ".join(names[:8]) or "nothing"}{more}.'
  raise errors.UserError(f'{path} is no data set that is known.{here} Looked for:{looked_for}')


def _of_file(path: pathlib.Path) -> tuple[dict[str, str], dict[str, str]]:
  extension = path.suffix.lower()
  if extension == '.npz':
    return {'image_pack': path.name}, {}
  if extension in list_rows.EXTENSIONS:
    found = _contents(*_inside(folders.entries(path.parent)), functools.cache(_glance))
    return {f'{noun}_list': path.name for noun in _nouns(found) or ('image',)}, {}
  if tar_shards.is_tar(path.name):
    return {'tar_shards': path.name}, {}
  return {}, {}


def _of_folder(folder: pathlib.Path) -> tuple[dict[str, str], dict[str, str]]:
  """Data set -> what speaks for it, of the signs that decide and of those that may lie beside."""
  entries = folders.entries(folder)
  files, below = _inside(entries)
  # Several of the questions below look into the same folders.
  look = functools.cache(_glance)
  annotations, something = coco.find(files), _something_v2(folder, files)
  shards = tar_shards.find(entries)
  strong, weak = _lists(folder, files, below, look)
  strong |= {
    'tfds': _tfds(folder, below, look),
    'hugging_face': _hugging_face(files, below, look),
    'coco': '' if something in files else annotations.get('train', [''])[0],
    'something_v2': something,
    'tar_shards': shards['train'][0].name if 'train' in shards else '',
  }
  weak |= _class_folders(folder, below, look)
  return ({k: v for k, v in strong.items() if v}, {k: v for k, v in weak.items() if v})


def _inside(entries: Sequence[os.DirEntry[str]]) -> tuple[list[str], list[str]]:
  """Names of the files in a folder, and paths of the folders, in order."""
  return folders.file_names(entries), [e.path for e in entries if folders.is_folder(e)]


def _lists(
  folder: pathlib.Path, files: Sequence[str], below: Sequence[str], look: _Look
) -> tuple[dict[str, str], dict[str, str]]:
  """Lists of known names, which decide, and others."""
  plain, inner = kinetics.find(files), {}
  place = os.path.join(folder, kinetics.ANNOTATIONS)
  if 'train' not in plain and place in below:
    inner = kinetics.find(folders.file_names(look(place)))
  known = {media.noun: listed_files.find(files, media) for media in (IMAGES, CLIPS)}
  tables = listed_files.tables(files, IMAGES)
  if not (any(known.values()) or tables or inner):
    return {}, {}
  names = _contents(files, below, look)
  nouns = _nouns(names)
  strong = {f'{noun}_list': known[noun].get('train', '') for noun in nouns or ['image']}
  if known['clip'].get('train', '').startswith(f'{CLIPS.table}.') and nouns != ['image']:
    strong['clip_list'] = known['clip']['train']
  if 'clip' in nouns and 'train' in inner and 'val' in inner:
    strong['kinetics'] = f'{kinetics.ANNOTATIONS}/{inner["train"][0]}'
  elif 'clip' in nouns and 'train' in plain and 'val' in plain:
    # Are these Kinetics' tables, or lists of its clips as other projects publish them?
    is_own = (plain['train'][0], plain['val'][0]) != ('train.csv', 'val.csv')
    if is_own:
      strong.pop('clip_list', None)
    if is_own or any(map(_CUT.fullmatch, names)):
      strong['kinetics'] = plain['train'][0]
  only = tables[0] if len(tables) == 1 else ''
  return strong, {f'{noun}_list': only for noun in nouns or ['image']}


def _contents(files: Sequence[str], below: Sequence[str], look: _Look) -> list[str]:
  """Names of files in a folder and of the first ones in folders below."""
  names, level = [*files], below[:_GLANCE]
  for _ in range(_DEPTH):
    entries = [entry for path in level for entry in look(path)]
    level = [entry.path for entry in entries if folders.is_folder(entry)][:_GLANCE]
    names += (entry.name for entry in entries)
  return names


def _nouns(names: Sequence[str]) -> list[str]:
  """Of 'image' and 'clip', what there is by the names."""
  is_image, is_clip = False, False
  for name in names:
    is_image = is_image or IMAGES.is_named(name)
    is_clip = is_clip or (CLIPS.is_named(name) and not IMAGES.is_named(name))
  return [noun for noun, there in (('image', is_image), ('clip', is_clip)) if there]


def _something_v2(folder: pathlib.Path, files: Sequence[str]) -> str:
  """The training annotations, in one of the folders that they may lie in."""
  for place in something_v2.FOLDERS:
    inner = folder / place
    names = files if not place else folders.visible_files(inner) if inner.is_dir() else ()
    if found := something_v2.find(names):
      return os.path.join(place, found['train'])
  return ''


def _tfds(folder: pathlib.Path, below: Sequence[str], look: _Look) -> str:
  """A folder of the set, of one of its versions or of a version of one of its configs."""
  deeper = (e.path for one in below[:_GLANCE] for e in look(one) if folders.is_folder(e))
  for path in (os.fspath(folder), *below[:_GLANCE], *deeper):
    names = [os.path.join(path, name) for name in ('features.json', 'dataset_info.json')]
    if all(map(os.path.isfile, names)):
      return os.path.relpath(names[0], folder)
  return ''


def _hugging_face(files: Sequence[str], below: Sequence[str], look: _Look) -> str:
  for name in ('dataset_dict.json', 'state.json'):
    if name in files:
      return name
  if 'features.json' in files:  # Parquet files of TFDS.
    return ''
  deeper = (entry.name for one in below[:_GLANCE] for entry in look(one))
  return next((name for name in (*files, *deeper) if name.endswith('.parquet')), '')


def _class_folders(folder: pathlib.Path, below: Sequence[str], look: _Look) -> dict[str, str]:
  train = os.path.join(folder, 'train')
  if train in below and (classes := [e.path for e in look(train) if folders.is_folder(e)]):
    nouns = _nouns([entry.name for path in classes[:_GLANCE] for entry in look(path)])
    signs = {'image': 'train/ with folders', 'clip': 'train/ with folders of clips'}
    return {f'{noun}_folder': signs[noun] for noun in nouns or ['image']}
  found: dict[str, list[str]] = {'image': [], 'clip': []}
  for path in below[:_GLANCE]:
    for noun in _nouns([entry.name for entry in look(path)]):
      found[noun].append(os.path.basename(path))
  # One folder of files is where a list's files lie.
  return {
    f'{noun}_folder': f'{names[0]}/ and {names[1]}/ with {noun}s'
    for noun, names in found.items()
    if len(names) > 1
  }


def _glance(folder: str) -> list[os.DirEntry[str]]:
  """The first entries of a folder in order of the names; nothing if it cannot be read."""
  try:
    with os.scandir(folder) as scan:
      visible = (entry for entry in scan if not entry.name.startswith('.'))
      return heapq.nsmallest(_GLANCE, visible, key=lambda entry: entry.name)
  except OSError:
    return []
