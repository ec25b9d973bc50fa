"""NumPy archives as big_vision and vision_transformer write them: one .npy member per array.

bfloat16 is no type of NumPy's own, so it was saved as raw pairs of bytes, '|V2'. Nothing is
unpickled: arrays of Python objects are refused.
"""

import math
import pathlib
import zipfile

import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.weights_lib import groups, tensors, zips

_SUFFIX = '.npy'


def read(path: pathlib.Path, submodel: str | None = None) -> tensors.Contents:
  """Reads the headers of all arrays.

  Args:
    path: the archive.
    submodel: take only the arrays below this name, and strip it; 'img' of a two-tower model.

  Returns:
    The parameters, see `groups.take_params`. Members that are no numbers (text, other files) are
    named in metadata['other'].

  Raises:
    errors.UserError: if the archive is damaged, holds Python objects or big-endian numbers, a
      header claims another size than the archive, or there is no such submodel.
  """
  archive = zips.Archive(path)
  found, other = {}, []
  with zips.errors_name(path), zipfile.ZipFile(path) as stream:
    for name, info in archive.members.items():
      tensor = None
      if name.endswith(_SUFFIX):
        tensor = _tensor(archive, stream, info)
      if tensor is None:
        other.append(name)
      else:
        found[name.removesuffix(_SUFFIX)] = tensor
  contents = groups.take_params(found, other)
  return contents if submodel is None else _below(path, contents, submodel)


def _tensor(
  archive: zips.Archive, stream: zipfile.ZipFile, info: zipfile.ZipInfo
) -> tensors.StoredTensor | None:
  """One array, or None if it holds text and the like."""
  where = f"{archive.file.path}: array '{info.filename.removesuffix(_SUFFIX)}'"
  shape, fortran, dtype, skip = _header(where, stream, info)
  if dtype.hasobject:
    raise errors.UserError(f'{where} holds Python objects, which could run code: refused.')
  if dtype.str == '|V2':
    dtype = tensors.BFLOAT16
  elif dtype.kind == 'V':
    raise errors.UserError(f"{where}: unknown raw dtype '{dtype}'; only '|V2' (bfloat16) is known.")
  elif dtype.kind not in 'biufc':
    return None
  if not dtype.isnative:
    raise errors.UserError(f'{where}: big-endian numbers ({dtype.str}) are not read.')
  shape = tensors.check_shape(where, shape, dtype.itemsize)
  size = math.prod(shape) * dtype.itemsize
  if skip + size != info.file_size:
    raise errors.UserError(
      f'{where} claims {dtype} {list(shape)}, {size:,} bytes; the archive has '
      f'{info.file_size - skip:,} for it.'
    )
  strides = tensors.contiguous_strides(shape[::-1] if fortran else shape, dtype.itemsize)
  data = archive.data(info.filename, skip)
  return tensors.StoredTensor(data, shape, dtype, 0, strides[::-1] if fortran else strides)


def _header(
  where: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo
) -> tuple[tuple[int, ...], bool, np.dtype, int]:
  """Shape, order, dtype and length of the header of a .npy member."""
  with archive.open(info) as stream:
    try:
      version = np.lib.format.read_magic(stream)
      if version == (1, 0):
        header = np.lib.format.read_array_header_1_0(stream)
      elif version == (2, 0):
        header = np.lib.format.read_array_header_2_0(stream)
      else:
        raise errors.UserError(f'{where}: .npy version {version} is not read.')
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
      if isinstance(error, errors.UserError):
        raise
      message = (str(error).splitlines() or [''])[0][:200]
      raise errors.UserError(f'{where}: damaged header ({message}).') from None
    return *header, stream.tell()


def _below(path: pathlib.Path, contents: tensors.Contents, submodel: str) -> tensors.Contents:
  prefix = submodel.strip('/') + '/'
  found = {n[len(prefix) :]: t for n, t in contents.tensors.items() if n.startswith(prefix)}
  if not found:
    there = {name.split('/')[0] for name in contents.tensors if '/' in name}
    raise errors.unknown(f'submodel of {path}', submodel, there)
  left = {n.split('/')[0] for n in contents.tensors if not n.startswith(prefix)}
  other = sorted({*contents.metadata.get('other', ()), *left})
  taken = '/'.join(filter(None, (contents.metadata.get('taken'), prefix.rstrip('/'))))
  metadata = {**contents.metadata, 'taken': taken} | ({'other': other} if other else {})
  return tensors.Contents(found, metadata)
