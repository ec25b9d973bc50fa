"""Which data set a file or folder is, told from names alone.

Of the folder every name counts; of the folders in it only the first ones in order, and only the
first names of each, whatever order the file system gives: the answer is the same on every machine.
"""

import functools
import heapq
import os
import pathlib
from collections.abc import Callable, Sequence

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import coco, decode, folders, image_list, list_rows, tar_shards

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
}
# Folders in the root that are looked into, and names looked at there, the first in order.
_GLANCE = 64
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
    return {'image_list': path.name}, {}
  if tar_shards.is_tar(path.name):
    return {'tar_shards': path.name}, {}
  return {}, {}


def _of_folder(folder: pathlib.Path) -> tuple[dict[str, str], dict[str, str]]:
  """Data set -> what speaks for it, of the signs that decide and of those that may lie beside."""
  entries = folders.entries(folder)
  files = folders.file_names(entries)
  below = [entry.path for entry in entries if folders.is_folder(entry)]
  # Several of the questions below look into the same folders.
  look = functools.cache(_glance)
  lists, annotations = image_list.find(files), coco.find(files)
  shards = tar_shards.find(entries)
  strong = {
    'tfds': _tfds(folder, below, look),
    'hugging_face': _hugging_face(files, below, look),
    'coco': annotations.get('train', [''])[0],
    'image_list': lists.get('train', ''),
    'tar_shards': shards['train'][0].name if 'train' in shards else '',
  }
  tables = image_list.tables(files)
  weak = {
    'image_list': tables[0] if len(tables) == 1 else '',
    'image_folder': _image_folder(folder, below, look),
  }
  return ({k: v for k, v in strong.items() if v}, {k: v for k, v in weak.items() if v})


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


def _image_folder(folder: pathlib.Path, below: Sequence[str], look: _Look) -> str:
  train = os.path.join(folder, 'train')
  if train in below and any(folders.is_folder(entry) for entry in look(train)):
    return 'train/ with folders'
  classes = [path for path in below[:_GLANCE] if _holds_image(look(path))]
  # One folder of images is where a list's images lie.
  first, second = (os.path.basename(path) for path in (*classes, '', '')[:2])
  return f'{first}/ and {second}/ with images' if second else ''


def _holds_image(entries: Sequence[os.DirEntry[str]]) -> bool:
  return any(os.path.splitext(entry.name)[1].lower() in decode.EXTENSIONS for entry in entries)


def _glance(folder: str) -> list[os.DirEntry[str]]:
  """The first entries of a folder in order of the names; nothing if it cannot be read."""
  try:
    with os.scandir(folder) as scan:
      visible = (entry for entry in scan if not entry.name.startswith('.'))
      return heapq.nsmallest(_GLANCE, visible, key=lambda entry: entry.name)
  except OSError:
    return []
