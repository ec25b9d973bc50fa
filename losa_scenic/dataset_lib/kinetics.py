"""Kinetics-400, -600 and -700: tables of parts of YouTube videos, and the clips of them.

  train.csv, val.csv (validate.csv), test.csv     in root or in root/annotations; names such as
                                                  kinetics_train.csv and k400_train.csv will do too

Of a table the columns label, youtube_id, time_start, time_end (in seconds) and split count. The
clips lie in `videos`, or in its folders train/, val/ and test/ (or videos_train/ ..); there, or in
folders of them, one a class, whatever its name. Two kinds of files are known:

  ID_000010_000020.mp4      cut already, as downloaders write them: the whole file is the clip
  ID.mp4                    the full video: the clip is what lies between the two times

Clips that are not there are left out, see `published_clips`. Labels follow the alphabetical order
of the classes of the training table. Where the labels of the test clips are not known, as at first
published, or none of the test clips is there, the validation clips are the test clips, as in the
literature; `test_list=val.csv` makes them so in any case.
"""

import csv
import functools
import os
import pathlib
import re
from collections.abc import Iterable

import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import folders, list_labels, list_rows, published_clips, sources
from losa_scenic.dataset_lib.frame_sampling import WHOLE, Segment

ANNOTATIONS = 'annotations'
COLUMNS = {
  'path': ('youtube_id',),
  'label': ('label',),
  'split': ('split',),
  'start': ('time_start',),
  'end': ('time_end',),
}
_TABLE = re.compile(r'(?:k(?:inetics)?[-_\d]*[-_])?(train|val(?:idat(?:e|ion))?|test)\.csv', re.I)
# Folders of the clips of a part.
_FOLDERS = {
  'train': ('train', 'videos_train'),
  'val': ('val', 'validate', 'validation', 'videos_val'),
  'test': ('test', 'videos_test'),
}


def splits(
  *,
  root: str | None = None,
  train_list: str | None = None,
  val_list: str | None = None,
  test_list: str | None = None,
  videos: str | None = None,
  val_fraction: float | None = None,
  split_seed: int = 0,
  max_missing_fraction: float = published_clips.MAX_MISSING_FRACTION,
) -> sources.Splits:
  """Reads the tables and looks for the clips; none is opened.

  Args:
    root: the folder; required.
    train_list: table of the training clips, relative to `root` or absolute. Default: found by
      name, as are the others.
    val_list: table of the validation clips; they are the test clips if there are no others.
    test_list: table of the test clips, with labels. The validation table: report on those clips.
    videos: folder of the clips, relative to `root` or absolute. Default: `root`.
    val_fraction: share of each class of the training clips to validate with, where the validation
      clips are the test clips; default 0.
    split_seed: another number splits differently.
    max_missing_fraction: share of the clips of each part that may be missing.

  Returns:
    Sources of video files and parts of them; nothing is opened.

  Raises:
    errors.UserError: naming the table and line that is wrong, what is not found, or missing clips.
  """
  folder = published_clips.checked_folder('kinetics', root)
  files = _tables(folder, {'train': train_list, 'val': val_list, 'test': test_list})
  about: list[str] = []
  if 'test' in files and not test_list and not _has_labels(files['test']):
    about.append(f'{files.pop("test").name} has no labels and is not used')
    _check_parts(folder, files)
  rows = {
    part: list_rows.read(file, folder, part, columns=COLUMNS, noun='clip')[part]
    for part, file in files.items()
  }
  found = _locate(published_clips.given_folder(folder, 'videos', videos), rows)
  optional = 'test' in rows and 'val' in rows and not test_list
  if optional and not any(found['test'].files):
    about.append(f'{rows.pop("test").file.name}: none of its clips is there; it is not used')
  labels, names = list_labels.class_ids(rows, None)
  wanted = {part: found[part]._replace(labels=labels[part]) for part in rows}
  return published_clips.open_splits(
    folder,
    wanted,
    names,
    about,
    val_fraction=val_fraction,
    split_seed=split_seed,
    max_missing_fraction=max_missing_fraction,
  )


def find(names: Iterable[str]) -> dict[str, list[str]]:
  """The files in a folder that are named like tables of a part.

  Args:
    names: of the files in the folder, in order.

  Returns:
    'train', 'val', 'test' -> names, those only that have any.
  """
  return list_rows.by_part(names, _TABLE)


def _tables(folder: pathlib.Path, given: dict[str, str | None]) -> dict[str, pathlib.Path]:
  """The table of each part; of 'val' alone if it is given for the test clips too."""
  found, place = find(folders.visible_files(folder)), folder
  if 'train' not in found and (folder / ANNOTATIONS).is_dir():
    place = folder / ANNOTATIONS
    found = find(folders.visible_files(place))
  files = {}
  for part, name in given.items():
    if name:
      inner = place if (place / name).is_file() else folder
      files[part] = folders.given_file(inner, f'{part}_list', name)
    elif len(found.get(part, ())) > 1:
      raise errors.UserError(
        f'{place}: there are {" and ".join(found[part])}: choose one with '
        f'--config.dataset_configs.{part}_list=FILE.'
      )
    elif part in found:
      files[part] = place / found[part][0]
  _check_parts(folder, files)
  if 'val' in files and 'test' in files and files['val'].samefile(files['test']):
    del files['test']
  return files


def _check_parts(folder: pathlib.Path, files: dict[str, pathlib.Path]) -> None:
  """Raises `UserError` without a training table, or without another."""
  if 'train' not in files or len(files) == 1:
    part = 'val' if 'train' in files else 'train'
    raise errors.UserError(
      f'{folder}: no table found, here or in {ANNOTATIONS}/, that is named like {part}.csv or '
      f'kinetics_{part}.csv: give --config.dataset_configs.{part}_list=FILE.'
    )


def _has_labels(file: pathlib.Path) -> bool:
  """Whether the header names a column of labels; True if it cannot be read."""
  try:
    with open(file, encoding='utf-8-sig', newline='') as stream:
      return 'label' in (cell.strip().lower() for cell in next(csv.reader(stream), ['label']))
  except (OSError, UnicodeDecodeError, csv.Error):
    return True


def _part_folder(videos: pathlib.Path, part: str) -> pathlib.Path:
  names = [name for name in _FOLDERS[part] if os.path.isdir(videos / name)]
  return videos / names[0] if names else videos


def _locate(
  videos: pathlib.Path, rows: dict[str, list_rows.Rows]
) -> dict[str, published_clips.Wanted]:
  """The clips of each part, their labels still unknown."""
  wanted, index = {}, functools.cache(published_clips.Index)
  for part, listed in rows.items():
    clips = index(_part_folder(videos, part))
    found = [_find(clips, listed, i) for i in range(len(listed.paths))]
    files, segments = (list(column) for column in zip(*found, strict=True))
    unknown = np.full(len(files), -1, np.int32)
    wanted[part] = published_clips.Wanted(
      listed.file, clips.folder, listed.names(), unknown, files, segments
    )
  return wanted


def _find(clips: published_clips.Index, rows: list_rows.Rows, i: int) -> tuple[str | None, Segment]:
  """The file of a row and the part of it that is the clip."""
  name, segment = rows.paths[i], rows.segments[i]
  start, end = segment
  if end is None:
    raise errors.UserError(f'{rows.where(i)}: a clip needs time_start and time_end.')
  if start == int(start) and end == int(end):
    for digits in (6, 1):
      file = clips.find(f'{name}_{int(start):0{digits}}_{int(end):0{digits}}')
      if file:
        return file, WHOLE
  return clips.find(name), segment
