"""Rows of bytes on disk that come once and stay: of each input of a data set what was computed.

A store is a folder:

  meta.json   of what the rows are; compared as a whole when the folder is opened
  rows.bin    row i at i * row_bytes; a sparse file, so rows that never came take no room
  marks.bin   of each row 16 bytes: a word that says it is whole, its CRC-32, its label, zeros

A row's mark is written after the row, so whatever a killed process leaves is either whole or not
marked. After a power cut a mark may be there without its row: the CRC-32, of row and label, is
compared when a process reads a row for the first time. Several processes may use a folder at the
same time: whoever comes first writes a row, under a lock of its mark alone.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8

from losa_scenic.common_lib import errors

_MARK = np.dtype([('state', '<u4'), ('crc', '<u4'), ('label', '<i4'), ('spare', '<u4')])
_WHOLE = 0x4C4F5341
_PREFIX = 16
# A file system without locks: two processes may then write the same row at once.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


class Store:
  """The rows of one part of a data set.

  Attributes:
    path: its folder.
    count: rows when all are there.
    row_bytes: bytes of a row.
  """

  def __init__(
    self, folder: str | os.PathLike[str], meta: Mapping[str, Any], count: int, row_bytes: int
  ) -> None:
    """Opens the store of `meta` in a folder of stores; makes it if there is none.

    Args:
      folder: where stores are, each in a folder named after the hash of its `meta`.
      meta: of what the rows are: any difference is another store. As JSON can hold it.
      count: rows when all are there.
      row_bytes: bytes of a row.

    Raises:
      errors.UserError: if it cannot be written, or holds something else.
    """
    self.count, self.row_bytes = count, row_bytes
    meta = json.loads(json.dumps({**meta, 'count': count, 'row_bytes': row_bytes}))
    text = json.dumps(meta, sort_keys=True)
    self.path = pathlib.Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:_PREFIX]
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      self._write_meta(meta)
      there = json.loads((self.path / 'meta.json').read_text())
      self._rows = self._opened('rows.bin', count * row_bytes)
      self._marks = self._opened('marks.bin', count * _MARK.itemsize)
      self._seen = np.memmap(self.path / 'marks.bin', _MARK, 'r', shape=(count,))
    except OSError as e:
      raise errors.UserError(f'feature_cache.dir: cannot use {self.path}: {e.strerror}.') from None
    except ValueError:
      there = None
    if there != meta:
      raise errors.UserError(
        f'{self.path}/meta.json is damaged or is that of other features: delete the folder.'
      )
    # Rows that need not be compared with their CRC-32 any more.
    self._sure = np.zeros(count, bool)

  def _opened(self, name: str, size: int) -> int:
    file = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    if os.fstat(file).st_size < size:
      os.ftruncate(file, size)
    return file

  def _write_meta(self, meta: Mapping[str, Any]) -> None:
    path = self.path / 'meta.json'
    if path.exists():
      return
    # Of several processes each writes the same; readers see all of it or nothing.
    own = path.with_name(f'.meta.{os.getpid()}.tmp')
    own.write_text(json.dumps(meta, indent=1, sort_keys=True) + '\n')
    own.replace(path)

  def close(self) -> None:
    """Closes the files."""
    for file in (self._rows, self._marks):
      os.close(file)

  def whole(self, rows: Int[np.ndarray, ' n']) -> Bool[np.ndarray, ' n']:
    """Which rows are marked as whole now, by any process."""
    return self._seen['state'][rows] == _WHOLE

  def labels(self, rows: Int[np.ndarray, ' n']) -> Int[np.ndarray, ' n']:
    """The labels of whole rows, int32."""
    return self._seen['label'][rows]

  @property
  def have(self) -> int:
    """How many rows are there."""
    return int((self._seen['state'] == _WHOLE).sum())

  def read(self, rows: Int[np.ndarray, ' n'], into: Sequence[UInt8[np.ndarray, ' bytes']]) -> bool:
    """Reads whole rows; one that turns out to be damaged is no longer marked.

    Args:
      rows: numbers of rows.
      into: where they go: n arrays of `row_bytes` bytes.

    Returns:
      Whether all of them were whole.
    """
    good = True
    for row, out in zip(rows.tolist(), into, strict=True):
      got = os.preadv(self._rows, [out.data], row * self.row_bytes)
      if not self._sure[row]:
        mark = self._seen[row]
        if got < self.row_bytes or mark['crc'] != _crc(out, int(mark['label'])):
          text = f'{self.path}: row {row} is damaged and will be made again'
          print(text, file=sys.stderr, flush=True)
          self._mark(row, np.zeros((), _MARK))
          good = False
        else:
          self._sure[row] = True
    return good

  def write(self, row: int, value: UInt8[np.ndarray, ' bytes'], label: int) -> None:
    """Writes a row unless it is there already: the first one stays.

    Raises:
      OSError: if the disk is full or broken.
    """
    with self._locked(row):
      if self._seen['state'][row] == _WHOLE:
        return
      view, at = memoryview(value.data), row * self.row_bytes
      while view:
        done = os.pwrite(self._rows, view, at)
        view, at = view[done:], at + done
      self._sure[row] = True
      self._mark(row, np.array((_WHOLE, _crc(value, label), label, 0), _MARK))

  def _mark(self, row: int, mark: np.ndarray) -> None:
    os.pwrite(self._marks, mark.tobytes(), row * _MARK.itemsize)

  @contextlib.contextmanager
  def _locked(self, row: int) -> Iterator[None]:
    """Other processes that write this row wait."""
    where = (_MARK.itemsize, row * _MARK.itemsize)
    try:
      fcntl.lockf(self._marks, fcntl.LOCK_EX, *where)
    except OSError as e:
      if e.errno not in _NO_LOCKS:
        raise
      yield
      return
    try:
      yield
    finally:
      fcntl.lockf(self._marks, fcntl.LOCK_UN, *where)


def _crc(row: UInt8[np.ndarray, ' bytes'], label: int) -> int:
  return zlib.crc32(np.int32(label).tobytes(), zlib.crc32(row.data))


def check_room(folder: pathlib.Path, wanted: int, what: str) -> None:
  """Raises `UserError` if the disk of a folder that exists has no room for so many bytes more."""
  free = shutil.disk_usage(folder).free
  if wanted > free:
    raise errors.UserError(
      f'feature_cache.dir: {folder} has {free / 1e9:,.2f} GB left, and {what} will take '
      f"{wanted / 1e9:,.2f} GB more. Choose another disk, feature_cache.dtype='int8', fewer taps "
      '(of LoSA: method_configs.losa.num_layers) or fewer feature_cache.views.'
    )
