"""An image pack: one `.npz` file with encoded images, labels and a fixed split.

  blob     uint8 [bytes]   all encoded images, one after another
  offsets  int64 [n + 1]   image i is blob[offsets[i]:offsets[i + 1]]
  label    integer [n]     class of each image, 0..k-1
  split    integer [n]     0 train, 1 validation, 2 test
  classes  str [k]         class names

Other keys are ignored. The file is read without pickle, so it cannot run code.
"""

import pathlib
import zipfile
import zlib

import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import sources

# key -> kinds of numpy types it may have.
_KEYS = {'blob': 'u', 'offsets': 'iu', 'label': 'iu', 'split': 'iu', 'classes': 'U'}
_TRAIN, _VALID, _TEST = 0, 1, 2


class PackSource:
  """The encoded images of a pack that belong to one part of it."""

  def __init__(self, file: pathlib.Path, pack: dict[str, np.ndarray], members: np.ndarray) -> None:
    """Copies the bytes of its own images alone: loader processes get one part, not the file.

    Args:
      file: of the pack, for messages.
      pack: the checked arrays.
      members: positions [n] in the pack.
    """
    self.file, self.members = str(file), members
    starts, stops = pack['offsets'][members], pack['offsets'][members + 1]
    self._images = [
      pack['blob'][start:stop].tobytes() for start, stop in zip(starts, stops, strict=True)
    ]
    self.labels = pack['label'][members]

  def __len__(self) -> int:
    """Number of images."""
    return len(self.members)

  def id(self, index: int) -> str:
    """See `sources.name`."""
    return f'{self.file}, image {self.members[index]}'

  def __getitem__(self, index: int) -> sources.Record:
    """See `Source`."""
    return sources.Record(self._images[index], int(self.labels[index]), self.id(index))


def splits(*, root: str | None = None) -> sources.Splits:
  """Reads a pack.

  Args:
    root: the `.npz` file; required.

  Returns:
    The encoded images in memory; no validation split if no image belongs to it.

  Raises:
    errors.UserError: naming the file, and what in it is missing or wrong.
  """
  if not root:
    raise errors.UserError(
      "Dataset 'image_pack' needs the .npz file: --config.dataset_configs.root=FILE."
    )
  file = pathlib.Path(root).expanduser()
  pack = _read(file)
  _check(file, pack)
  parts = [PackSource(file, pack, np.flatnonzero(pack['split'] == part)) for part in range(3)]
  return sources.Splits(
    train=parts[_TRAIN],
    valid=parts[_VALID] if len(parts[_VALID]) else None,
    test=parts[_TEST],
    class_names=tuple(pack['classes'].tolist()),
    about=(f'image pack {file}',),
  )


def _read(file: pathlib.Path) -> dict[str, np.ndarray]:
  if not file.is_file():
    raise errors.UserError(f'{file}: there is no such file (--config.dataset_configs.root).')
  try:
    archive = np.load(file, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
      raise errors.UserError(f'{file}: not an .npz file but a single array.')
    with archive:
      missing = sorted(set(_KEYS) - set(archive.files))
      if missing:
        raise errors.UserError(f'{file}: not an image pack: it lacks {", ".join(missing)}.')
      return {key: archive[key] for key in _KEYS}
  except errors.UserError:
    raise
  except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
    raise errors.UserError(f'{file}: cannot be read as an image pack ({error}).') from error


def _check(file: pathlib.Path, pack: dict[str, np.ndarray]) -> None:
  """Raises `UserError` unless the arrays have the types, shapes and ranges of the format."""
  for key, kinds in _KEYS.items():
    if pack[key].dtype.kind not in kinds or pack[key].ndim != 1:
      raise errors.UserError(
        f"{file}: '{key}' must be a list of {'names' if kinds == 'U' else 'integers'}, not "
        f'{pack[key].dtype} of shape {pack[key].shape}.'
      )
  if pack['blob'].dtype != np.uint8:
    raise errors.UserError(f"{file}: 'blob' must be uint8, not {pack['blob'].dtype}.")
  count, num_classes = len(pack['label']), len(pack['classes'])
  for key, length in (('split', count), ('offsets', count + 1)):
    if len(pack[key]) != length:
      raise errors.UserError(
        f"{file}: '{key}' has {len(pack[key])} entries; with {count} labels it must have {length}."
      )
  # uint64 would wrap around in a difference.
  offsets = pack['offsets'] = pack['offsets'].astype(np.int64)
  if offsets[0] != 0 or offsets[-1] != len(pack['blob']) or np.any(np.diff(offsets) < 0):
    raise errors.UserError(
      f"{file}: 'offsets' must rise from 0 to the {len(pack['blob'])} bytes of 'blob'."
    )
  if len(set(pack['classes'].tolist())) != num_classes:
    raise errors.UserError(f"{file}: 'classes' has the same name twice.")
  for key, end in (('label', num_classes), ('split', _TEST + 1)):
    wrong = np.flatnonzero((pack[key] < 0) | (pack[key] >= end))
    if len(wrong):
      raise errors.UserError(
        f"{file}, image {wrong[0]}: '{key}' is {pack[key][wrong[0]]}, outside 0..{end - 1}."
      )
  for part, name in ((_TRAIN, 'training (0)'), (_TEST, 'test (2)')):
    if not np.any(pack['split'] == part):
      raise errors.UserError(f"{file}: 'split' marks no image as {name}.")
