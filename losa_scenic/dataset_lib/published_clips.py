"""What sets of clips that were collected from the web share: many of their clips are gone.

Annotations name clips, and the files of those that could be had lie in a folder or in the folders
in it. Missing ones are left out, counted and said, up to a share of each part.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import clip_files, folders, sources, splitting
from losa_scenic.dataset_lib.frame_sampling import Segment
from losa_scenic.dataset_lib.media import CLIPS

# Share of the clips of a part that may be missing, unless the user says otherwise.
MAX_MISSING_FRACTION = 0.2
# So many missing clips are named.
_NAMED = 3


class Index:
  """The video files in a folder and in the folders in it, by their names without extension.

  Attributes:
    folder: where they lie.
  """

  def __init__(self, folder: pathlib.Path) -> None:
    """Lists each folder once; opens no file.

    Raises:
      errors.UserError: if one cannot be read.
    """
    self.folder = folder
    self._files: dict[str, str] = {}
    self._twice: dict[str, str] = {}
    for entry in folders.entries(folder):
      if CLIPS.is_named(entry.name) and folders.is_file(entry):
        self._add(entry.name, '')
      elif folders.is_folder(entry):
        for inner in folders.entries(pathlib.Path(entry.path)):
          if CLIPS.is_named(inner.name) and folders.is_file(inner):
            self._add(inner.name, f'{entry.name}/')

  def _add(self, name: str, place: str) -> None:
    stem = name.rpartition('.')[0]
    first = self._files.setdefault(stem, place + name)
    if first != place + name:
      self._twice[stem] = place + name

  def find(self, name: str) -> str | None:
    """The file of this name without its extension, relative to the folder; None if it is missing.

    Raises:
      errors.UserError: if there are two.
    """
    if name in self._twice:
      raise errors.UserError(
        f"{self.folder}: clip '{name}' is there twice, as {self._files[name]} and as "
        f'{self._twice[name]}: remove one, or give --config.dataset_configs.videos=FOLDER.'
      )
    return self._files.get(name)


class Wanted(NamedTuple):
  """The clips that the annotations of one part name.

  Attributes:
    listed: the file that names them.
    folder: where their files were looked for.
    names: n names, unique within a class.
    labels: int32 [n].
    files: their files, relative to `folder`; None for those that are missing.
    segments: the parts of the files that are meant; None for whole files.
  """

  listed: pathlib.Path
  folder: pathlib.Path
  names: list[str]
  labels: np.ndarray
  files: Sequence[str | None]
  segments: Sequence[Segment] | None = None


def checked_folder(dataset: str, root: str | None) -> pathlib.Path:
  """The folder of a set.

  Raises:
    errors.UserError: if it is not given or no folder.
  """
  folder = folders.checked_root(dataset, root)
  if not folder.is_dir():
    raise errors.UserError(f'{folder}: not a folder (--config.dataset_configs.root).')
  return folder


def given_folder(root: pathlib.Path, option: str, name: str | None) -> pathlib.Path:
  """A folder that the user names, relative to the set's or absolute; without a name the set's.

  Raises:
    errors.UserError: if there is no such folder, naming the nearest one.
  """
  folder = root / pathlib.Path(name or '').expanduser()
  if not folder.is_dir():
    beside = [entry.name for entry in folders.entries(root) if folders.is_folder(entry)]
    raise errors.unknown(f'folder ({option}) in {root}:', str(name), beside[:50])
  return folder


def open_splits(
  root: pathlib.Path,
  wanted: Mapping[str, Wanted],
  class_names: tuple[str, ...],
  about: Sequence[str],
  *,
  val_fraction: float | None,
  split_seed: int,
  max_missing_fraction: float,
) -> sources.Splits:
  """The clips that are there.

  Args:
    root: the set's folder, for messages.
    wanted: 'train', and 'val' or 'test' or both. Without test clips, the published validation clips
      are the test clips, as in the literature.
    class_names: in the order of the labels.
    about: lines to begin with.
    val_fraction: share of each class of the training clips to validate with, if there is no 'val';
      default 0.
    split_seed: another number splits differently.
    max_missing_fraction: share of the clips of each part that may be missing.

  Raises:
    errors.UserError: if more are missing or all of a part, naming some.
  """
  if type(max_missing_fraction) not in (int, float) or not 0 <= max_missing_fraction <= 1:
    raise errors.UserError(
      f'max_missing_fraction must be a number in [0, 1], not {max_missing_fraction!r}.'
    )
  lines, parts, present = [*about], {}, {}
  for part, clips in wanted.items():
    kept, note = _present(clips, max_missing_fraction)
    present[part] = kept
    parts[part] = clip_files.ClipFiles(
      clips.folder,
      [file for file in clips.files if file is not None],
      clips.labels[kept],
      num_classes=len(class_names),
      segments=None if clips.segments is None else [clips.segments[i] for i in kept.tolist()],
    )
    lines.append(f'{part}: {len(kept):,} clips of {clips.listed.name} in {clips.folder}{note}')
  train, kept = wanted['train'], present['train']
  lines.insert(0, f'{root}: {folders.class_summary(train.labels[kept], len(class_names), "clip")}')
  if 'test' not in parts:
    parts['test'] = parts.pop('val')
    lines.append('test: the published validation clips, since there are no test clips with labels')
  parts, more = splitting.complete(
    parts,
    [train.names[i] for i in kept.tolist()],
    train.labels[kept],
    class_names,
    val_fraction=val_fraction,
    test_fraction=None,
    split_seed=split_seed,
    where=str(root),
    noun='clip',
  )
  return sources.Splits(
    parts['train'], parts.get('val'), parts['test'], class_names, (*lines, *more), clips=True
  )


def _present(clips: Wanted, most: float) -> tuple[np.ndarray, str]:
  """Positions of the clips that are there, and a note on the others."""
  is_there = np.array([file is not None for file in clips.files])
  missing = np.flatnonzero(~is_there)
  if not len(missing):
    return np.flatnonzero(is_there), ''
  names = ', '.join(clips.names[i] for i in missing[:_NAMED].tolist())
  names += ', ..' if len(missing) > _NAMED else ''
  share = len(missing) / len(is_there)
  if share > most or share == 1:
    raise errors.UserError(
      f'{clips.listed}: {len(missing):,} of its {len(is_there):,} clips ({share:.1%}) are not in '
      f'{clips.folder} or its folders: {names}. If they lie elsewhere, give '
      '--config.dataset_configs.videos=FOLDER; if they could not be had, a larger '
      f'max_missing_fraction than {most:g}.'
    )
  return np.flatnonzero(is_there), f'; {len(missing):,} ({share:.1%}) are missing: {names}'
