"""Named arrays that stay in their file until they are asked for, whole or in part.

Files are read with seek and read, not mapped: of a mapped file every page that was touched counts
as resident memory, so a conversion would hold the checkpoint twice.
"""

import contextlib
import dataclasses
import io
import math
import operator
import os
import pathlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from losa_scenic.common_lib import errors

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
Index = tuple[slice | int, ...]

_BLOCK = 4 * 2**20  # Bytes read at once where the wanted elements do not lie side by side.
_MAX_DIMENSIONS = 32
_MAX_BYTES = 2**48


class Tensor(Protocol):
  """One array of a checkpoint, not yet read."""

  @property
  def shape(self) -> tuple[int, ...]:
    """Its shape."""
    ...

  @property
  def dtype(self) -> np.dtype:
    """Its dtype: a native NumPy one, or one of ml_dtypes such as bfloat16."""
    ...

  def read(self, index: Index = ()) -> np.ndarray:
    """Reads it, or only a part of it.

    Args:
      index: what would stand in `array[index]`: integers and slices, for the leading axes.

    Returns:
      The array, C-contiguous; not to be written to, because it may be shared.

    Raises:
      errors.UserError: if the file is damaged or changed after it was opened.
      IndexError: if the index lies outside of the array or has too many parts.
    """
    ...


@dataclasses.dataclass(frozen=True)
class Contents:
  """What one file holds.

  Attributes:
    tensors: the weights by name, in the order of the file.
    metadata: what else the file says; see `sources.Source`.
  """

  tensors: Mapping[str, Tensor]
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Bytes(Protocol):
  """A run of bytes that can be read from any position."""

  @property
  def random_access(self) -> bool:
    """Whether reading a late byte is as cheap as reading an early one."""
    ...

  def fill(self, start: int, buffer: np.ndarray) -> None:
    """Fills a contiguous uint8 [n] buffer with the n bytes from `start`."""
    ...


@dataclasses.dataclass(frozen=True)
class File:
  """A file that must stay what it was when it was opened.

  Attributes:
    path: its path.
    size: its size in bytes.
    modified: its time of modification in ns.
  """

  path: pathlib.Path
  size: int
  modified: int

  @classmethod
  def of(cls, path: pathlib.Path) -> 'File':
    """Looks a file up."""
    status = path.stat()
    return cls(path, status.st_size, status.st_mtime_ns)

  def fill(self, start: int, buffer: np.ndarray) -> None:
    """Fills a contiguous uint8 buffer from the byte `start` on."""
    rest = buffer.data
    with self._unchanged() as stream:
      stream.seek(start)
      while rest:
        count = stream.readinto(rest)
        if not count:
          raise errors.UserError(f'{self.path}: the file ends too early.')
        rest = rest[count:]

  def read(self, start: int, count: int) -> bytes:
    """The `count` bytes from `start`."""
    buffer = np.empty(count, np.uint8)
    self.fill(start, buffer)
    return buffer.tobytes()

  def map(self, start: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A read-only mapping of a C-contiguous array, none of whose axes is empty, from `start`."""
    with self._unchanged() as stream:
      return np.asarray(np.memmap(stream, dtype, 'r', start, shape))

  @contextlib.contextmanager
  def _unchanged(self) -> Iterator[io.FileIO]:
    """The opened file; raises `UserError` if it cannot be read or was changed."""
    try:
      with open(self.path, 'rb', buffering=0) as stream:
        status = os.fstat(stream.fileno())
        if (status.st_size, status.st_mtime_ns) != (self.size, self.modified):
          raise errors.UserError(f'{self.path}: the file was changed while it was being read.')
        yield stream
    except OSError as error:
      raise errors.UserError(f'{self.path}: cannot be read ({error.strerror}).') from None


@dataclasses.dataclass(frozen=True)
class FileBytes:
  """A part of a file.

  Attributes:
    file: the file.
    start: its first byte there.
    size: its size in bytes.
    crc: CRC-32, checked whenever all of the part is read at once; None if there is none.
    crc_start: CRC-32 of bytes that stand before the part and are covered by `crc`, too.
  """

  file: File
  start: int
  size: int
  crc: int | None = None
  crc_start: int = 0
  random_access = True

  def fill(self, start: int, buffer: np.ndarray) -> None:
    """See `Bytes.fill`."""
    self.file.fill(self.start + start, buffer)
    if self.crc is None or buffer.size != self.size:
      return
    if zlib.crc32(buffer.data, self.crc_start) != self.crc:
      raise errors.UserError(f'{self.file.path}: damaged, a checksum (CRC-32) does not match.')


@dataclasses.dataclass(frozen=True)
class ArrayTensor:
  """An array that is in memory already.

  Attributes:
    array: the array.
  """

  array: np.ndarray

  @property
  def shape(self) -> tuple[int, ...]:
    """See `Tensor.shape`."""
    return self.array.shape

  @property
  def dtype(self) -> np.dtype:
    """See `Tensor.dtype`."""
    return self.array.dtype

  def read(self, index: Index = ()) -> np.ndarray:
    """See `Tensor.read`."""
    return np.asarray(self.array[(*index, ...)], order='C')


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """An array whose elements stand at fixed distances in a run of bytes.

  Attributes:
    data: the bytes.
    shape: its shape.
    dtype: its dtype.
    offset: byte of its first element.
    strides: bytes from one element to the next along each axis; may be 0.
  """

  data: Bytes
  shape: tuple[int, ...]
  dtype: np.dtype
  offset: int = 0
  strides: tuple[int, ...] | None = None

  def read(self, index: Index = ()) -> np.ndarray:
    """See `Tensor.read`."""
    strides = self.strides
    if strides is None:
      strides = contiguous_strides(self.shape, self.dtype.itemsize)
    offset, shape, strides = _indexed(self.offset, self.shape, strides, index)
    if 0 in shape:
      return np.empty(shape, self.dtype)
    low, high = span(offset, shape, strides, self.dtype.itemsize)
    if high - low == math.prod(shape) * self.dtype.itemsize or not self.data.random_access:
      return np.asarray(self._view(offset, shape, strides), order='C')
    out = np.empty(shape, self.dtype)
    self._gather(offset, strides, out)
    return out

  def _view(self, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    """Reads everything from the first to the last element, and looks at it through strides."""
    low, high = span(offset, shape, strides, self.dtype.itemsize)
    raw = np.empty(high - low, np.uint8)
    self.data.fill(low, raw)
    return np.ndarray(shape, self.dtype, raw.data, offset - low, strides)

  def _gather(self, offset: int, strides: tuple[int, ...], out: np.ndarray) -> None:
    """Reads elements with gaps between them, halving the longest axis until a block suffices."""
    low, high = span(offset, out.shape, strides, self.dtype.itemsize)
    if high - low <= max(_BLOCK, self.dtype.itemsize):
      out[...] = self._view(offset, out.shape, strides)
      return
    axis = max(range(out.ndim), key=lambda a: abs(strides[a]) if out.shape[a] > 1 else -1)
    half = out.shape[axis] // 2
    parts = np.split(out, [half], axis)
    self._gather(offset, strides, parts[0])
    self._gather(offset + half * strides[axis], strides, parts[1])


def contiguous_strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
  """Bytes from one element to the next along each axis of a C-contiguous array."""
  return tuple(itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def span(
  offset: int, shape: Sequence[int], strides: Sequence[int], itemsize: int
) -> tuple[int, int]:
  """First byte of a strided array without empty axes, and the byte after its last."""
  reach = [(n - 1) * stride for n, stride in zip(shape, strides, strict=True)]
  low = offset + sum(r for r in reach if r < 0)
  return low, offset + sum(r for r in reach if r > 0) + itemsize


def check_shape(where: str, shape: Any, itemsize: int) -> tuple[int, ...]:
  """A shape that a file claims.

  Args:
    where: file and tensor, for the message.
    shape: a list or tuple of what should be integers >= 0.
    itemsize: bytes per element.

  Returns:
    The shape.

  Raises:
    errors.UserError: if it is no shape, or one that no computer could hold.
  """
  if not isinstance(shape, list | tuple) or not all(type(n) is int and n >= 0 for n in shape):
    raise errors.UserError(f'{where}: its shape is no list of integers >= 0.')
  # Empty axes count as 1, because NumPy refuses shapes such as [0, 2**62] as well.
  if len(shape) > _MAX_DIMENSIONS or math.prod(max(n, 1) for n in shape) * itemsize > _MAX_BYTES:
    raise errors.UserError(f'{where}: its shape is too large ({str(shape[:99])[:100]}).')
  return tuple(shape)


def _indexed(
  offset: int, shape: tuple[int, ...], strides: tuple[int, ...], index: Index
) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
  """Offset, shape and strides of `array[index]`."""
  if len(index) > len(shape):
    raise IndexError(f'{len(index)} indices for an array of shape {shape}.')
  new_shape, new_strides = [], []
  for part, size, stride in zip(index, shape, strides, strict=False):
    if isinstance(part, slice):
      positions = range(*part.indices(size))
      offset += (positions.start if positions else 0) * stride
      new_shape.append(len(positions))
      new_strides.append(positions.step * stride)
    else:
      position = operator.index(part)
      if not -size <= position < size:
        raise IndexError(f'Index {position} is outside an axis of {size}.')
      offset += position % size * stride
  rest = len(index)
  return offset, (*new_shape, *shape[rest:]), (*new_strides, *strides[rest:])


def mapped(tensor: Tensor, index: Index = ()) -> np.ndarray:
  """A part as a read-only mapping of the file if its bytes lie together there, else read.

  Raises `UserError` as `Tensor.read` does: what is mapped is the file that was opened.
  """
  if isinstance(tensor, StoredTensor) and isinstance(tensor.data, FileBytes):
    strides = tensor.strides or contiguous_strides(tensor.shape, tensor.dtype.itemsize)
    offset, shape, strides = _indexed(tensor.offset, tensor.shape, strides, index)
    if math.prod(shape) and strides == contiguous_strides(shape, tensor.dtype.itemsize):
      return tensor.data.file.map(tensor.data.start + offset, shape, tensor.dtype)
  return tensor.read(index)
