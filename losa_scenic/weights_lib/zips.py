"""Zip archives of weights (npz, PyTorch): members by name, read in place where they are stored."""

import collections
import contextlib
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.weights_lib import tensors

_LOCAL_HEADER = struct.Struct('<4s22xHH')
_MAX_DEFLATE_RATIO = 1032  # No deflate stream grows by more.
_SKIP = 2**20  # Bytes that are decompressed at once, to get at later ones.


class Archive:
  """The table of contents of a zip archive.

  Names are keys of this table and never paths of the file system, whatever they look like.

  Attributes:
    file: the file.
    members: its members by name.
  """

  def __init__(self, path: pathlib.Path) -> None:
    """Reads and checks the table.

    Args:
      path: the archive.

    Raises:
      errors.UserError: if it is damaged, a name stands in it twice, a member is encrypted or
        packed otherwise than by deflate, or claims a size that its packed bytes cannot have.
    """
    self.file = tensors.File.of(path)
    with errors_name(path), zipfile.ZipFile(path) as archive:
      infos = archive.infolist()
    self.members = {info.filename: info for info in infos}
    if len(self.members) != len(infos):
      doubled, _ = collections.Counter(info.filename for info in infos).most_common(1)[0]
      raise errors.UserError(f"{path}: '{doubled}' stands twice in this archive.")
    for info in infos:
      self._check(info)

  def _check(self, info: zipfile.ZipInfo) -> None:
    where = f"{self.file.path}: '{info.filename}'"
    if info.flag_bits & 1:
      raise errors.UserError(f'{where} is encrypted.')
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
      raise errors.UserError(f'{where} is packed in another way than by deflate.')
    stored = info.compress_type == zipfile.ZIP_STORED
    most = info.compress_size if stored else info.compress_size * _MAX_DEFLATE_RATIO
    if info.file_size > most or (stored and info.file_size != info.compress_size):
      raise errors.UserError(
        f'{where} claims {info.file_size:,} bytes, which its {info.compress_size:,} packed bytes '
        f'cannot hold.'
      )

  def read(self, name: str, limit: int, crc: bool = True) -> bytes:
    """A small member.

    Args:
      name: its name.
      limit: the most bytes it may have.
      crc: whether its checksum is checked.

    Raises:
      errors.UserError: if it is missing, larger or damaged.
    """
    info = self._info(name)
    if info.file_size > limit:
      raise errors.UserError(
        f"{self.file.path}: '{name}' has {info.file_size:,} bytes; at most {limit:,} are read."
      )
    buffer = np.empty(info.file_size, np.uint8)
    self.data(name, crc=crc).fill(0, buffer)
    return buffer.tobytes()

  def data(self, name: str, skip: int = 0, crc: bool = True) -> tensors.Bytes:
    """A member as bytes that are read when they are needed.

    Args:
      name: its name.
      skip: bytes at its start to leave out.
      crc: whether its checksum is checked when all of it is read at once.

    Raises:
      errors.UserError: if it is missing or does not lie where the table says.
    """
    info = self._info(name)
    if info.compress_type == zipfile.ZIP_DEFLATED:
      return _Deflated(self.file.path, info, skip)
    start = self._start(info)
    crc_start = zlib.crc32(self.file.read(start, skip)) if crc and skip else 0
    size = info.file_size - skip
    return tensors.FileBytes(self.file, start + skip, size, info.CRC if crc else None, crc_start)

  def _info(self, name: str) -> zipfile.ZipInfo:
    if name not in self.members:
      raise errors.UserError(f"{self.file.path}: the archive lacks '{name}'.")
    return self.members[name]

  def _start(self, info: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin: behind its own header, whose size only it knows."""
    begin = info.header_offset
    if begin + _LOCAL_HEADER.size <= self.file.size:
      header = self.file.read(begin, _LOCAL_HEADER.size)
      signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
      start = begin + _LOCAL_HEADER.size + name_length + extra_length
      if signature == b'PK\x03\x04' and start + info.file_size <= self.file.size:
        return start
    raise errors.UserError(
      f"{self.file.path}: damaged, '{info.filename}' does not lie where the archive says."
    )


class _Deflated:
  """The bytes of a deflated member; each reading starts at its beginning."""

  random_access = False

  def __init__(self, path: pathlib.Path, info: zipfile.ZipInfo, skip: int) -> None:
    self._path = path
    self._info = info
    self._skip = skip

  def fill(self, start: int, buffer: np.ndarray) -> None:
    """See `tensors.Bytes.fill`; zipfile checks the checksum when the end is reached."""
    rest = buffer.data
    skip = self._skip + start
    with (
      errors_name(self._path),
      zipfile.ZipFile(self._path) as archive,
      archive.open(self._info) as stream,
    ):
      while skip:
        skipped = len(stream.read(min(skip, _SKIP)))
        if not skipped:
          raise EOFError(f"'{self._info.filename}' ends too early")
        skip -= skipped
      while rest:
        count = stream.readinto(rest[:_SKIP])
        if not count:
          raise EOFError(f"'{self._info.filename}' ends too early")
        rest = rest[count:]
      if self._skip + start + buffer.size == self._info.file_size:
        stream.read(1)  # The checksum is looked at when there is no more.


@contextlib.contextmanager
def errors_name(path: pathlib.Path) -> Iterator[None]:
  """Turns what a broken archive makes zipfile raise into a `UserError` that names the file."""
  try:
    yield
  except errors.UserError:
    raise
  # zipfile knows many kinds of damage: BadZipFile, zlib.error, EOFError, struct.error, ValueError,
  # RuntimeError, NotImplementedError, OverflowError.
  except Exception as error:
    raise errors.UserError(
      f'{path}: not a readable archive ({error}). Was the download cut off?'
    ) from None
