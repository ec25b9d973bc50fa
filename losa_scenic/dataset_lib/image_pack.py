"""An image pack: one `.npz` file with encoded images, labels and a fixed split.

  blob     uint8 [bytes]   all encoded images (JPEG, PNG or WebP), one after another
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
from losa_scenic.dataset_lib import decode, sources

# key -> kinds of numpy types it may have.
_KEYS = {'blob': 'u', 'offsets': 'iu', 'label': 'iu', 'split': 'iu', 'classes': 'U'}
_TRAIN, _VALID, _TEST = 0, 1, 2


def splits(
  *,
  image_size: int,
  interpolation: str = 'bicubic',
  path: str | None = None,
  max_gigabytes: float = 16.0,
) -> sources.Splits:
  """Reads a pack and decodes all images into memory.

  Args:
    image_size: side of the images in pixels.
    interpolation: how they are resized, a key of `decode.INTERPOLATIONS`.
    path: the `.npz` file; required.
    max_gigabytes: more memory than this for the decoded images is refused.

  Returns:
    The images in memory; no validation split if no image belongs to it.

  Raises:
    errors.UserError: naming the file, and what in it is missing or wrong.
  """
  if not path:
    raise errors.UserError(
      "Dataset 'image_pack' needs the .npz file: --config.dataset_configs.path=FILE."
    )
  file = pathlib.Path(path).expanduser()
  pack = _read(file)
  _check(file, pack)
  gigabytes = len(pack['label']) * image_size**2 * 3 / 1e9
  if gigabytes > max_gigabytes:
    raise errors.UserError(
      f'{file}: its {len(pack["label"]):,} images of {image_size} x {image_size} pixels would '
      f'take {gigabytes:.1f} GB of memory, more than max_gigabytes = {max_gigabytes:g}: choose a '
      'smaller image_size or raise --config.dataset_configs.max_gigabytes.'
    )

  def source(part: int) -> sources.ArraySource:
    members = np.flatnonzero(pack['split'] == part)
    return _decoded(file, pack, members, image_size, interpolation)

  return sources.Splits(
    train=source(_TRAIN),
    valid=source(_VALID) if np.any(pack['split'] == _VALID) else None,
    test=source(_TEST),
    class_names=tuple(pack['classes'].tolist()),
  )


def _read(file: pathlib.Path) -> dict[str, np.ndarray]:
  if not file.is_file():
    raise errors.UserError(f'{file}: there is no such file (--config.dataset_configs.path).')
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


def _decoded(
  file: pathlib.Path,
  pack: dict[str, np.ndarray],
  members: np.ndarray,
  image_size: int,
  interpolation: str,
) -> sources.ArraySource:
  blob, offsets = pack['blob'], pack['offsets']
  ids = [f'{file}, image {i}' for i in members]
  images = np.empty((len(members), image_size, image_size, 3), np.uint8)

  def load(position: int) -> None:
    start, stop = offsets[members[position]], offsets[members[position] + 1]
    encoded = blob[start:stop].tobytes()
    images[position] = decode.decode(encoded, ids[position], image_size, interpolation)

  sources.parallel(load, len(members))
  return sources.ArraySource(images, pack['label'][members], ids, num_classes=len(pack['classes']))
