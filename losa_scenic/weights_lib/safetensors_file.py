"""Safetensors: a JSON header of names, dtypes, shapes and byte ranges, then the bytes.

The safetensors library maps the whole file, and what it reads stays resident beside the copies it
returns; so the header is read here, under the library's rules: ranges in bounds, without holes or
overlaps, each as long as its shape and dtype need. Format:
https://github.com/huggingface/safetensors#format.
"""

import math
import pathlib

import ml_dtypes
import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.weights_lib import strict_json, tensors

_MAX_HEADER = 100_000_000  # Bytes; the library has the same limit.
_DTYPES = {
  'BOOL': np.dtype(np.bool_),
  'U8': np.dtype(np.uint8),
  'I8': np.dtype(np.int8),
  'U16': np.dtype(np.uint16),
  'I16': np.dtype(np.int16),
  'U32': np.dtype(np.uint32),
  'I32': np.dtype(np.int32),
  'U64': np.dtype(np.uint64),
  'I64': np.dtype(np.int64),
  'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
  'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
  'F16': np.dtype(np.float16),
  'BF16': tensors.BFLOAT16,
  'F32': np.dtype(np.float32),
  'F64': np.dtype(np.float64),
}


def read(path: pathlib.Path) -> tensors.Contents:
  """Reads the header of a safetensors file.

  Args:
    path: the file.

  Returns:
    Its tensors; metadata['__metadata__'] is the header's, if it has one.

  Raises:
    errors.UserError: if the header breaks a rule, or the file is shorter or longer than it says.
  """
  file = tensors.File.of(path)
  if file.size < 8:
    raise errors.UserError(f'{path}: the file ends too early.')
  length = int.from_bytes(file.read(0, 8), 'little')
  if length > min(_MAX_HEADER, file.size - 8):
    raise errors.UserError(
      f'{path}: the header should have {length:,} bytes; the file has {file.size:,} and headers '
      f'at most {_MAX_HEADER:,}. Was the download cut off?'
    )
  header = strict_json.parse(file.read(8, length), f'{path}: its header')
  metadata = header.pop('__metadata__', None)
  if metadata is not None and not isinstance(metadata, dict):
    raise errors.UserError(f"{path}: '__metadata__' is no JSON object.")
  found, ranges = {}, []
  for name, entry in header.items():
    dtype, shape, start, end = _entry(f"{path}: tensor '{name}'", entry)
    ranges.append((start, end, name))
    data = tensors.FileBytes(file, 8 + length + start, end - start)
    found[name] = tensors.StoredTensor(data, shape, dtype)
  _check_ranges(path, ranges, file.size - 8 - length)
  return tensors.Contents(found, {} if metadata is None else {'__metadata__': metadata})


def _entry(where: str, entry: object) -> tuple[np.dtype, tuple[int, ...], int, int]:
  """Dtype, shape, first byte and end of one tensor of the header."""
  if not isinstance(entry, dict) or set(entry) != {'dtype', 'shape', 'data_offsets'}:
    raise errors.UserError(f'{where} needs exactly dtype, shape and data_offsets.')
  dtype = errors.one_of(f'{where}: dtype', str(entry['dtype']), _DTYPES)
  itemsize = _DTYPES[dtype].itemsize
  shape = tensors.check_shape(where, entry['shape'], itemsize)
  offsets = entry['data_offsets']
  if not isinstance(offsets, list) or [type(o) for o in offsets] != [int, int]:
    raise errors.UserError(f'{where}: data_offsets must be two integers.')
  if offsets[1] - offsets[0] != math.prod(shape) * itemsize:
    raise errors.UserError(
      f'{where}: {dtype} {list(shape)} needs {math.prod(shape) * itemsize:,} bytes, but its '
      f'data_offsets are {offsets}.'
    )
  return _DTYPES[dtype], shape, offsets[0], offsets[1]


def _check_ranges(path: pathlib.Path, ranges: list[tuple[int, int, str]], size: int) -> None:
  position = 0
  for start, end, name in sorted(ranges):
    if start != position:
      problem = 'overlaps the one before it' if start < position else 'leaves a hole before it'
      raise errors.UserError(f"{path}: tensor '{name}' {problem} (bytes {start} to {end}).")
    position = end
  if position != size:
    raise errors.UserError(
      f'{path}: the header describes {position:,} bytes of tensors, the file has {size:,}. '
      f'Was the download cut off?'
    )
