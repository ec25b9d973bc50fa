"""TFDS sets that are prepared on disk: found, opened and checked. TensorFlow is not needed.

Nothing is ever downloaded or prepared from here. A set can be hundreds of gigabytes, preparing can
take days, and some sets need files that only a person can fetch (a form, a licence): whether and
where is the user's decision. What is missing is said together with the line that prepares it.

`tensorflow_datasets` comes with `pip install losa_scenic[tfds]` and is imported when a set is
opened.
"""

import fnmatch
import importlib
import json
import os
import pathlib
import re
from typing import Any

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import sources, tfds_video

INFO_FILE = 'dataset_info.json'
_VERSION = re.compile(r'\d+\.\d+\.\d+')
_VERSION_PATTERN = re.compile(r'[\d*]+\.[\d*]+\.[\d*]+')
# What lies in a TFDS data folder besides sets.
_NOT_SETS = ('downloads',)


def tfds_module() -> Any:
  """The module `tensorflow_datasets`.

  Raises:
    errors.UserError: if it is not installed, with what to install.
  """
  # Else TensorFlow, where it is installed, first looks for Google Cloud for many seconds.
  os.environ.setdefault('NO_GCE_CHECK', 'true')
  try:
    tfds = importlib.import_module('tensorflow_datasets')
  except ModuleNotFoundError as error:
    raise errors.UserError(
      f'TFDS sets need tensorflow_datasets ({error}): pip install losa_scenic[tfds].'
    ) from error
  tfds_video.open_without_tensorflow(tfds.features)
  return tfds


def data_folder(root: str | None) -> pathlib.Path:
  """`root`, or the folder that TFDS uses by itself: $TFDS_DATA_DIR or ~/tensorflow_datasets."""
  chosen = root or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  return pathlib.Path(chosen).expanduser().absolute()


def prepared(base: str, folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """The prepared versions of a set, oldest first.

  Args:
    base: 'caltech101' or 'eurosat/rgb', without version.
    folder: a TFDS data folder.

  Returns:
    version -> folder that holds dataset_info.json; empty if there is none.
  """
  found = [path.parent for path in folder.joinpath(base).glob(f'*/{INFO_FILE}')]
  found = [path for path in found if _VERSION.fullmatch(path.name)]
  return {path.name: path for path in sorted(found, key=lambda path: _numbers(path.name))}


def find(name: str | None, root: str | None, file_format: str = 'array_record') -> pathlib.Path:
  """The folder of a prepared set.

  Args:
    name: 'caltech101', 'eurosat/rgb', 'eurosat/rgb:2.0.0', 'eurosat/rgb:2.*.*'; the newest version
      that fits. None if `root` is the prepared set itself.
    root: a TFDS data folder (None: see `data_folder`), or the folder of one version of a set.
    file_format: what to prepare it as, for the message.

  Returns:
    The folder with dataset_info.json.

  Raises:
    errors.UserError: if nothing is prepared there, saying what is and how to prepare the set.
  """
  folder = data_folder(root)
  if root and (folder / INFO_FILE).is_file():
    if name and not _is_set(folder, name):
      raise errors.UserError(
        f"{folder} is a prepared set, but not '{name}': leave name out, or let root be the TFDS "
        'data folder.'
      )
    return folder
  if not name:
    raise errors.UserError(
      'Say which TFDS set: --config.dataset_configs.name=NAME (with root=the TFDS data folder), or '
      f'root=the folder of a prepared set, which holds {INFO_FILE}'
      f'{f" ({folder} does not)" if root else ""}.{_seen(folder)}'
    )
  base, version = _parse(name)
  fitting = [
    path for found, path in prepared(base, folder).items() if fnmatch.fnmatch(found, version or '*')
  ]
  if not fitting:
    raise not_prepared(name, folder, file_format)
  return fitting[-1]


def not_prepared(
  name: str, folder: pathlib.Path, file_format: str = 'array_record'
) -> errors.UserError:
  """An error that says what is there in place of a set, and how to prepare it.

  Args:
    name: as for `find`.
    folder: a TFDS data folder.
    file_format: 'array_record' or 'tfrecord'.

  Returns:
    The error, for the caller to raise.
  """
  base, _ = _parse(name)
  versions, configs = list(prepared(base, folder)), []
  if not versions and folder.joinpath(base).is_dir():
    configs = [
      path.name for path in _folders(folder / base) if prepared(f'{base}/{path.name}', folder)
    ]
  if versions:
    there = f' There: version {", ".join(versions)}.'
  elif configs:
    there = f' There: {", ".join(f"{base}/{config}" for config in configs)}.'
  else:
    there = _seen(folder, base.partition('/')[0])
  return errors.UserError(
    f"The TFDS set '{name}' is not prepared in {folder}.{there} It is not downloaded by itself; "
    f'prepare it once with\n  {prepare_line(name, folder, file_format)}\n'
    '(sets that are not stored as image files need TensorFlow for that, losa_scenic[tf]; for some '
    'TFDS asks for files to be downloaded by hand).'
  )


def prepare_line(name: str, folder: pathlib.Path | str, file_format: str = 'array_record') -> str:
  """The command that downloads and prepares a set in a format."""
  return (
    f"python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}', data_dir='{folder}')"
    f".download_and_prepare(file_format='{file_format}')\""
  )


def open_builder(
  directory: str | os.PathLike[str],
  file_format: str = 'array_record',
  other: str = '',
  prepare: str = '',
) -> Any:
  """The `tfds.core.DatasetBuilder` of a prepared set, without the code that prepared it.

  Args:
    directory: see `find`.
    file_format: the files to read: 'array_record' or 'tfrecord'.
    other: what to use for the other format, for the message.
    prepare: what to prepare in its place, for the same; by default this version of the set.

  Returns:
    A builder that reads these files.

  Raises:
    errors.UserError: for a folder that TFDS cannot open, or that has other files.
  """
  tfds = tfds_module()
  try:
    builder = tfds.builder_from_directory(directory)
  except Exception as error:  # TFDS has no common class: parsers, versions, blocked sets.
    raise errors.UserError(f'{directory}: TFDS cannot open it ({error}).') from error
  stored = {kind.value for kind in builder.info.available_file_formats()} or {'tfrecord'}
  if file_format not in stored:
    name = prepare or ':'.join(os.path.split(builder.info.full_name))
    raise errors.UserError(
      f'{directory} is prepared as {", ".join(sorted(stored))}, not as {file_format}. '
      f'{f"Use {other}, or prepare" if other else "Prepare"} it again in another folder (TFDS '
      f'leaves what is prepared as it is):\n  {prepare_line(name, "OTHER_FOLDER", file_format)}'
    )
  if getattr(builder.info.file_format, 'value', file_format) != file_format:
    builder.info.set_file_format(file_format, override=True, override_if_initialized=True)
  return builder


def count(builder: Any, split: str) -> int:
  """Number of images of a split, once the split and its files are known to be there.

  Args:
    builder: see `open_builder`.
    split: as TFDS writes it: 'train', 'train[:80%]', 'train[100:200]+test'.

  Raises:
    errors.UserError: for an unknown split, a bad slice, a split without images, or missing files.
  """
  names = list(builder.info.splits)
  for part in split.split('+'):
    base = part.partition('[')[0].strip()
    if base not in (*names, 'all'):
      raise errors.unknown(f'split of {builder.info.full_name}', base, names)
  try:
    info = builder.info.splits[split]
  except (ValueError, KeyError, AssertionError) as error:
    sizes = ', '.join(f'{name} ({builder.info.splits[name].num_examples:,})' for name in names)
    raise errors.UserError(
      f"Split '{split}' of {builder.info.full_name}: {str(error).splitlines()[0]} There: {sizes}."
    ) from error
  if not info.num_examples:
    raise errors.UserError(f"Split '{split}' of {builder.info.full_name} has no images.")
  files = sorted({file for file, _, _ in _stretches(builder, split)})
  missing = [file for file in files if not os.path.exists(file)]
  if missing:
    raise errors.UserError(
      f'{missing[0]}: there is no such file; {len(missing)} of the {len(files)} files of split '
      f"'{split}' are missing."
    )
  return info.num_examples


def check_disjoint(builder: Any, first: str, second: str) -> None:
  """Raises `UserError` if two splits share images."""
  starts: dict[str, list[tuple[int, int]]] = {}
  for file, start, stop in _stretches(builder, first):
    starts.setdefault(file, []).append((start, stop))
  shared = sum(
    max(0, min(stop, b) - max(start, a))
    for file, start, stop in _stretches(builder, second)
    for a, b in starts.get(file, ())
  )
  if shared:
    raise errors.UserError(
      f"Splits '{first}' and '{second}' of {builder.info.full_name} share {shared:,} images: give "
      "parts that do not overlap, e.g. train='train[:90%]' and test='train[90%:]'."
    )


def _stretches(builder: Any, split: str) -> list[tuple[str, int, int]]:
  """The files of a split with the first record and the one after the last."""
  return [
    (
      os.fspath(part.filename),
      part.skip,
      part.skip + part.take if part.take >= 0 else part.examples_in_shard,
    )
    for part in builder.info.splits[split].file_instructions
  ]


def _parse(name: str) -> tuple[str, str | None]:
  """'eurosat/rgb:2.0.0' or 'eurosat/rgb/2.0.0' -> ('eurosat/rgb', '2.0.0')."""
  base, colon, version = name.partition(':')
  if not colon and _VERSION_PATTERN.fullmatch(base.rpartition('/')[2]):
    base, _, version = base.rpartition('/')
  sources.check_inside(base, 'the TFDS data folder')
  if not base or (colon and not _VERSION_PATTERN.fullmatch(version)):
    raise errors.UserError(
      f"'{name}' is no name of a TFDS set: NAME, NAME/CONFIG or NAME/CONFIG:1.2.3."
    )
  return base, version or None


def _is_set(directory: pathlib.Path, name: str) -> bool:
  base, version = _parse(name)
  try:
    info = json.loads((directory / INFO_FILE).read_text('utf-8'))
    own, config, own_version = info['name'], info.get('configName'), info['version']
  except (OSError, ValueError, TypeError, KeyError) as error:
    raise errors.UserError(f'{directory / INFO_FILE}: not a description of a set.') from error
  return base in (own, f'{own}/{config}') and fnmatch.fnmatch(own_version, version or '*')


def _seen(folder: pathlib.Path, near: str = '') -> str:
  """What sets a data folder holds, and the one whose name is like `near`."""
  if not folder.is_dir():
    return ' There is no such folder.'
  names = [path.name for path in _folders(folder) if path.name not in _NOT_SETS]
  if not near:
    return f' There: {", ".join(names) or "(nothing)"}.'
  return ' ' + str(errors.unknown('set', near, names)).partition('. ')[2]


def _folders(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith('.'))


def _numbers(version: str) -> tuple[int, ...]:
  return tuple(int(number) for number in version.split('.'))
