"""Which data set a file or folder is, told from names alone."""

import itertools
import os
import pathlib

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
# Entries of a folder that are looked at: it may be one of a million images.
_GLANCE = 64


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
    names = [f'{e.name}/' if e.is_dir() else e.name for e in _glance(path)]
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
  lists, annotations = image_list.find(folder), coco.find(folder)
  shards = tar_shards.find(folder)
  strong = {
    'tfds': _tfds(folder),
    'hugging_face': _hugging_face(folder),
    'coco': annotations.get('train', [''])[0],
    'image_list': lists.get('train', ''),
    'tar_shards': shards['train'][0].name if 'train' in shards else '',
  }
  tables = image_list.tables(folder)
  weak = {
    'image_list': tables[0] if len(tables) == 1 else '',
    'image_folder': _image_folder(folder),
  }
  return ({k: v for k, v in strong.items() if v}, {k: v for k, v in weak.items() if v})


def _tfds(folder: pathlib.Path) -> str:
  """A folder of the set, of one of its versions or of a version of one of its configs."""
  below = [entry for entry in _glance(folder) if entry.is_dir()]
  deeper = (entry for one in below for entry in _glance(one.path) if entry.is_dir())
  for path in itertools.chain(
    [os.fspath(folder)], (e.path for e in below), (e.path for e in deeper)
  ):
    names = [os.path.join(path, name) for name in ('features.json', 'dataset_info.json')]
    if all(map(os.path.isfile, names)):
      return os.path.relpath(names[0], folder)
  return ''


def _hugging_face(folder: pathlib.Path) -> str:
  for name in ('dataset_dict.json', 'state.json'):
    if (folder / name).is_file():
      return name
  if (folder / 'features.json').is_file():  # Parquet files of TFDS.
    return ''
  below = [entry.path for entry in _glance(folder) if entry.is_dir()]
  return next((name for path in (folder, *below) for name in _parquet(path)), '')


def _parquet(folder: str | os.PathLike[str]) -> list[str]:
  return [entry.name for entry in _glance(folder) if entry.name.endswith('.parquet')]


def _image_folder(folder: pathlib.Path) -> str:
  if any(entry.is_dir() for entry in _glance(folder / 'train')):
    return 'train/ with folders'
  classes = [e.name for e in _glance(folder) if e.is_dir() and _holds_image(e.path)]
  # One folder of images is where a list's images lie.
  return f'{classes[0]}/ and {classes[1]}/ with images' if len(classes) > 1 else ''


def _holds_image(folder: str) -> bool:
  return any(os.path.splitext(e.name)[1].lower() in decode.EXTENSIONS for e in _glance(folder))


def _glance(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
  """Some of what is in a folder, in order; nothing if it is none."""
  try:
    with os.scandir(folder) as scan:
      some = list(itertools.islice((e for e in scan if not e.name.startswith('.')), _GLANCE))
  except OSError:
    return []
  return sorted(some, key=lambda entry: entry.name)
