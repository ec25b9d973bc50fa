"""Images in tar shards, as WebDataset writes them.

  train-000.tar, train-001.tar, val-000.tar, test-000.tar     or train.tar, or
  train/000.tar, train/001.tar, val/000.tar, test/000.tar     ('valid', 'validation' as 'val')

The members of a shard with the same name up to the first dot of the file's name are one record: an
image (`000.jpg`, or another extension of `decode.EXTENSIONS`) and its label, a whole number from 0
in `000.cls`, or under 'label' or 'cls' in `000.json`. Other members of a record are not read.
`classes.txt` in the folder may name the classes, one a line.

Shards are read in place and at random: where an image lies is found in one pass over the headers.
That needs plain tar files: a compressed one can only be read from its beginning. What is missing is
split off the training images, see `splitting`.
"""

import collections
import os
import pathlib
from collections.abc import Mapping, Sequence
from concurrent import futures

import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import folders, sources, splitting, tar_index

_PREFIXES = {'train': ('train',), 'val': ('val', 'valid', 'validation'), 'test': ('test',)}
_EXTENSION = '.tar'
_COMPRESSED = ('.tar.gz', '.tgz', '.tar.bz2', '.tar.xz', '.tar.zst')
_THREADS = min(8, os.cpu_count() or 1)


class TarSource:
  """The images of some shards.

  Attributes:
    shards: the tar files.
    stamps: (bytes, time of change in ns) of each shard when it was indexed.
    shard: int32 [n], the shard of each image.
    offset: int64 [n], where its first byte lies.
    size: int64 [n], its bytes.
    labels: int32 [n] in [0, num_classes).
    names: of the images within their shards.
  """

  def __init__(self, indices: list[tar_index.ShardIndex], *, num_classes: int) -> None:
    """Joins the indices of the shards; opens nothing.

    Args:
      indices: at least one, with at least one image each.
      num_classes: number of classes.

    Raises:
      errors.UserError: for a label out of range, naming the image.
    """
    self.shards = [index.path for index in indices]
    self.stamps = [index.stamp for index in indices]
    counts = [len(index.labels) for index in indices]
    self.shard = np.repeat(np.arange(len(indices), dtype=np.int32), counts)
    self.offset = np.concatenate([index.offset for index in indices])
    self.size = np.concatenate([index.size for index in indices])
    self.names = tar_index.Names.of(name for index in indices for name in index.names)
    labels = np.concatenate([index.labels for index in indices])
    self.labels = sources.checked_labels(labels, len(labels), num_classes, self.id)

  def id(self, index: int) -> str:
    """'shard: name of the member'."""
    return f'{self.shards[self.shard[index]]}: {self.names[index]}'

  def __len__(self) -> int:
    """Number of images."""
    return len(self.labels)

  def __getitem__(self, index: int) -> sources.Record:
    """See `Source`."""
    shard, size = int(self.shard[index]), int(self.size[index])
    try:
      file = tar_index.open_shard(self.shards[shard], self.stamps[shard])
      image = os.pread(file.fd, size, int(self.offset[index]))
    except OSError as error:
      raise sources.BadImage(self.id(index), f'cannot be read ({error.strerror})') from error
    if len(image) < size:
      raise sources.BadImage(self.id(index), 'the shard ends before the image does')
    return sources.Record(image, int(self.labels[index]), self.id(index))


def splits(
  *,
  root: str | None = None,
  train_shards: str | None = None,
  val_shards: str | None = None,
  test_shards: str | None = None,
  val_fraction: float | None = None,
  test_fraction: float | None = None,
  split_seed: int = 0,
  class_names: str | None = None,
) -> sources.Splits:
  """Indexes the shards.

  Args:
    root: the folder, or one tar file with the training images; required.
    train_shards: pattern of the training shards relative to `root`, as 'part-0*.tar'. Default:
      found by name, as are the others.
    val_shards: pattern of the validation shards.
    test_shards: pattern of the test shards.
    val_fraction: share of each class to validate with, if there are no shards, see `splitting`.
    test_fraction: share of each class to test with, if there are no shards.
    split_seed: another number splits differently.
    class_names: file with the class names, one a line; default `classes.txt` if there is one.

  Returns:
    Sources that read an image from its place in the shard each time it is asked for.

  Raises:
    errors.UserError: naming the shard and member that is wrong, or what is missing.
  """
  path = folders.checked_root('tar_shards', root)
  given = {'train': train_shards, 'val': val_shards, 'test': test_shards}
  folder = path if path.is_dir() else path.parent
  if path.is_dir():
    shards = _shards(path, given)
  elif any(given.values()):
    raise errors.UserError(f'{path}: root is one shard; with train_shards.. give its folder.')
  else:
    shards = {'train': [path]}
  indices = _indices(shards)
  names = folders.class_names(folder, class_names) or _numbered(indices)
  parts: dict[str, sources.Source] = {
    part: TarSource(of_part, num_classes=len(names)) for part, of_part in indices.items()
  }
  labels = np.concatenate([index.labels for index in indices['train']])
  about = [f'{path}: {folders.class_summary(labels, len(names))}']
  about += [f'{p}: {len(parts[p])} images in {len(shards[p])} tar files' for p in parts]
  parts, more = splitting.complete(
    parts,
    [f'{os.path.basename(i.path)}/{name}' for i in indices['train'] for name in i.names],
    labels,
    names,
    val_fraction=val_fraction,
    test_fraction=test_fraction,
    split_seed=split_seed,
    where=str(path),
  )
  return sources.Splits(parts['train'], parts.get('val'), parts['test'], names, (*about, *more))


def find(entries: Sequence[os.DirEntry[str]]) -> dict[str, list[pathlib.Path]]:
  """The shards in a folder that have one of the known names, compressed ones as well.

  Args:
    entries: what is in the folder, see `folders.entries`; its folders train/, val/ and test/ are
      read as well, but no file is opened.

  Returns:
    'train', 'val', 'test' -> files in order, those only that have any.
  """
  found: dict[str, list[pathlib.Path]] = {}
  for part, prefixes in _PREFIXES.items():
    files = [e for e in entries if _is_named(e.name, prefixes) and folders.is_file(e)]
    for entry in entries:
      if entry.name in prefixes and folders.is_folder(entry):
        files += [e for e in folders.entries(pathlib.Path(entry.path)) if folders.is_file(e)]
    shards = [pathlib.Path(file.path) for file in files if is_tar(file.name)]
    if shards:
      found[part] = shards
  return found


def is_tar(name: str) -> bool:
  """Whether a file's name is that of a tar file, plain or compressed."""
  return name.lower().endswith((_EXTENSION, *_COMPRESSED))


def _is_named(name: str, prefixes: tuple[str, ...]) -> bool:
  return name.startswith(tuple(f'{prefix}{end}' for prefix in prefixes for end in '-_.'))


def _shards(folder: pathlib.Path, given: Mapping[str, str | None]) -> dict[str, list[pathlib.Path]]:
  """The shards of each part: those of its pattern, else those of a known name."""
  shards = find(folders.entries(folder))
  for part, pattern in given.items():
    if pattern:
      sources.check_inside(pattern, folder)
      shards[part] = sorted(file for file in folder.glob(pattern) if file.is_file())
      if not shards[part]:
        raise errors.UserError(f'{folder}: no file fits {part}_shards = {pattern!r}.')
  if 'train' not in shards:
    raise errors.UserError(
      f'{folder}: no training shards found. Looked for train-*.tar and train/*.tar; there are '
      f'{", ".join(e.name for e in folders.entries(folder)[:8]) or "no files"}. '
      "Give --config.dataset_configs.train_shards='PATTERN'."
    )
  return shards


def _indices(
  shards: Mapping[str, list[pathlib.Path]],
) -> dict[str, list[tar_index.ShardIndex]]:
  """The index of every shard of each part."""
  files = [file for of_part in shards.values() for file in of_part]
  for file, count in collections.Counter(files).items():
    if count > 1:
      raise errors.UserError(f'{file}: this shard is in two parts of the set.')
    if file.name.lower().endswith(_COMPRESSED):
      raise errors.UserError(
        f'{file}: compressed shards are not supported: an image in one can only be reached by '
        'unpacking all before it. Unpack it to a plain .tar.'
      )
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    indices = dict(zip(files, pool.map(tar_index.index_shard, files), strict=True))
  return {part: [indices[file] for file in of_part] for part, of_part in shards.items()}


def _numbered(indices: Mapping[str, list[tar_index.ShardIndex]]) -> tuple[str, ...]:
  """Names '0', '1', .. up to the largest label."""
  every = [index for of_part in indices.values() for index in of_part]
  largest = max(every, key=lambda index: index.labels.max())
  label, total = int(largest.labels.max()), sum(len(index.labels) for index in every)
  if label >= total:
    raise errors.UserError(
      f'{largest.path}: {largest.names[int(largest.labels.argmax())]} has label {label}, but there '
      f'are only {total} images. Labels count from 0; if there really are so many classes, name '
      'them in classes.txt.'
    )
  return tuple(str(number) for number in range(label + 1))
