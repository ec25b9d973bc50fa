"""Where the images of a tar file lie, and reading there: the parts below `tar_shards`."""

import functools
import json
import os
import pathlib
import re
import tarfile
import weakref
from collections.abc import Iterable
from typing import BinaryIO, NamedTuple

import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import decode

# A label is short, and metadata are not large: bytes.
_LARGEST_LABEL = 1 << 24
_OPEN_SHARDS = 128

Stamp = tuple[int, int]


class Names:
  """Many short texts in little memory.

  Attributes:
    blob: all of them in UTF-8, one after another.
    ends: int64 [n], where each ends in `blob`.
  """

  def __init__(self, blob: bytes, ends: np.ndarray) -> None:
    """Keeps both."""
    self.blob, self.ends = blob, ends

  @classmethod
  def of(cls, texts: Iterable[str]) -> 'Names':
    """Packs texts; file names that are no UTF-8 survive as in `os.fsencode`."""
    blob, ends = bytearray(), []
    for text in texts:
      blob += text.encode('utf-8', 'surrogateescape')
      ends.append(len(blob))
    return cls(bytes(blob), np.array(ends, np.int64))

  def __len__(self) -> int:
    """Number of texts."""
    return len(self.ends)

  def __getitem__(self, index: int) -> str:
    """The text at a position in [0, len(self)), else IndexError."""
    if not 0 <= index < len(self.ends):
      raise IndexError(index)
    start = int(self.ends[index - 1]) if index else 0
    return self.blob[start : int(self.ends[index])].decode('utf-8', 'surrogateescape')


class ShardIndex(NamedTuple):
  """The labelled images of one shard, in its order.

  Attributes:
    path: the tar file.
    stamp: its bytes and the time of its last change in ns.
    offset: int64 [n], where the image's first byte lies.
    size: int64 [n], bytes of the image.
    labels: int64 [n], at least 0.
    names: n names of the members that are images.
  """

  path: str
  stamp: Stamp
  offset: np.ndarray
  size: np.ndarray
  labels: np.ndarray
  names: Names


class _Place(NamedTuple):
  name: str
  offset: int
  size: int


def index_shard(path: pathlib.Path) -> ShardIndex:
  """Finds the images of a shard and reads their labels.

  Args:
    path: a plain tar file; only headers and labels are read.

  Returns:
    The index, with at least one image.

  Raises:
    errors.UserError: naming the shard, and the member that is wrong.
  """
  try:
    with open(path, 'rb') as file:
      records = _records(path, file)
      labels = [_label(path, file.fileno(), key, record) for key, record in records.items()]
      status = os.fstat(file.fileno())
  except (OSError, tarfile.TarError) as error:
    raise errors.UserError(f'{path}: cannot be read as a plain tar file ({error}).') from error
  if not labels:
    raise errors.UserError(f'{path}: there are no images in it.')
  images = [record['image'] for record in records.values()]
  return ShardIndex(
    str(path),
    (status.st_size, status.st_mtime_ns),
    np.array([image.offset for image in images], np.int64),
    np.array([image.size for image in images], np.int64),
    np.array(labels, np.int64),
    Names.of(image.name for image in images),
  )


def _records(path: pathlib.Path, file: BinaryIO) -> dict[str, dict[str, _Place]]:
  """Name up to the first dot -> the places of its 'image', 'cls' and 'json'."""
  records: dict[str, dict[str, _Place]] = {}
  with tarfile.open(fileobj=file, mode='r:') as tar:
    for member in tar:
      folder, base = os.path.split(member.name)
      if member.isdir() or base.startswith('.'):
        continue
      if not member.isreg() or member.issparse():
        raise errors.UserError(f'{path}: {member.name} is no plain file but a link or the like.')
      stem, _, extension = base.partition('.')
      extension = extension.lower()
      kind = 'image' if f'.{extension}' in decode.EXTENSIONS else extension
      if kind not in ('image', 'cls', 'json'):
        kind = 'other'
      record = records.setdefault(os.path.join(folder, stem), {})
      if kind in record and kind != 'other':
        raise errors.UserError(
          f"{path}: {record[kind].name} and {member.name} belong to one record, since a record's "
          'name ends at the first dot.'
        )
      record[kind] = _Place(member.name, member.offset_data, member.size)
    _check_end(path, file.fileno(), tar.offset)
  return records


def _check_end(path: pathlib.Path, fd: int, offset: int) -> None:
  """Raises `UserError` unless the file ends in zeros: tarfile stops at damage as at the end."""
  block = os.pread(fd, 1 << 20, offset)
  if not block:
    raise errors.UserError(f'{path}: the shard is cut off: the mark of its end is missing.')
  while block:
    if block.strip(b'\0'):
      raise errors.UserError(
        f'{path}: damaged, or two tar files in one: nothing can be read from byte {offset} on.'
      )
    offset += len(block)
    block = os.pread(fd, 1 << 20, offset)


def _label(path: pathlib.Path, fd: int, key: str, record: dict[str, _Place]) -> int:
  """The label of a record, which must have an image and one of 'cls' and 'json'."""
  if 'image' not in record:
    names = ', '.join(place.name for place in record.values())
    raise errors.UserError(
      f'{path}: record {key} ({names}) has no image, one of {", ".join(decode.EXTENSIONS)} after '
      'the first dot.'
    )
  place = record.get('cls') or record.get('json')
  if place is None:
    raise errors.UserError(f'{path}: {record["image"].name} has no label: {key}.cls or {key}.json.')
  if place.size > _LARGEST_LABEL:
    raise errors.UserError(f'{path}: {place.name} is too large for a label ({place.size} bytes).')
  text = os.pread(fd, place.size, place.offset)
  label = _number(text) if 'cls' in record else _json_number(text)
  if label is None or not 0 <= label < 2**31:
    raise errors.UserError(
      f'{path}: {place.name} holds no label: a whole number from 0'
      + ('' if 'cls' in record else " under 'label' or 'cls'")
      + f', but {text[:60]!r}.'
    )
  return label


def _number(text: bytes) -> int | None:
  text = text.strip()
  return int(text) if re.fullmatch(rb'[0-9]{1,10}', text) else None


def _json_number(text: bytes) -> int | None:
  try:
    fields = json.loads(text)
  except (ValueError, RecursionError):
    return None
  found = [fields[k] for k in ('label', 'cls') if k in fields] if isinstance(fields, dict) else []
  return found[0] if found and type(found[0]) is int else None


class OpenShard:
  """A file that is open as long as somebody holds this object.

  Attributes:
    fd: its descriptor.
  """

  def __init__(self, path: str) -> None:
    """Opens the file; `OSError` if it cannot."""
    self.fd = os.open(path, os.O_RDONLY)
    weakref.finalize(self, os.close, self.fd)


@functools.lru_cache(_OPEN_SHARDS)
def open_shard(path: str, stamp: Stamp) -> OpenShard:
  """A shard to read from, the same object for the same file; each process opens its own.

  Args:
    path: the tar file.
    stamp: its bytes and time of change when it was indexed.

  Raises:
    OSError: if it cannot be opened or has changed.
  """
  shard = OpenShard(path)
  status = os.fstat(shard.fd)
  if (status.st_size, status.st_mtime_ns) != stamp:
    raise OSError(0, 'the shard has changed since the start')
  return shard
