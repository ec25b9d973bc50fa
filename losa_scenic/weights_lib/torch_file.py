"""PyTorch checkpoints: a zip archive of a pickle and one member per storage.

This is what torch.save has written since PyTorch 1.6. Training runs wrap the state dict in others,
so it is searched for; which one was taken is in the metadata.
"""

import pathlib
from typing import Any

from losa_scenic.common_lib import errors
from losa_scenic.weights_lib import tensors, torch_pickle, zips

# Where training codes keep the state dict. Several of them in one file are the user's choice.
STATE_DICTS = ('model', 'state_dict', 'teacher', 'module', 'model_ema', 'state_dict_ema', 'ema')
_MAX_PICKLE = 16 * 2**20  # Bytes; a state dict of 1000 tensors and its optimizer need 1 MB.
_SMALL = 2**20  # Bytes that a tensor may always have; above, not more than its file.


def read(path: pathlib.Path, key: str | None = None) -> tensors.Contents:
  """Reads the names and shapes in a PyTorch checkpoint.

  Args:
    path: the file.
    key: which entry of the top level is the state dict; None takes the only one of
      `STATE_DICTS` that is there, else the top level itself, else the only dict of tensors.

  Returns:
    Its tensors; metadata['taken'] is the entry that was taken, if any, and metadata['other'] are
    the entries beside it and in it that are no tensors.

  Raises:
    errors.UserError: if the file is damaged, big-endian or a TorchScript program, its pickle
      needs anything but tensors, or it is unclear which state dict is meant.
  """
  # Checksums are not looked at: PyTorch can be told to leave them out, and then writes wrong ones.
  archive = zips.Archive(path)
  root = _root(archive)
  if archive.members.keys() & {f'{root}/byteorder'}:
    order = archive.read(f'{root}/byteorder', 64, crc=False)
    if order != b'little':
      raise errors.UserError(f'{path}: its byte order is {order!r}; only little is read.')
  pickled = torch_pickle.load(archive.read(f'{root}/data.pkl', _MAX_PICKLE, crc=False), str(path))
  taken, state = _state_dict(path, pickled, key)
  other = [str(name) for name in pickled if name != taken] if taken is not None else []
  found = {}
  for name, value in state.items():
    if isinstance(name, str) and isinstance(value, torch_pickle.PickledTensor):
      found[name] = _tensor(archive, root, name, value)
    else:
      other.append(str(name))
  metadata: dict[str, Any] = {} if taken is None else {'taken': taken}
  if other:
    metadata['other'] = sorted(other)
  return tensors.Contents(found, metadata)


def _root(archive: zips.Archive) -> str:
  """Name of the folder in which everything lies."""
  path = archive.file.path
  roots = {name.split('/')[0] for name in archive.members if name.count('/') == 1}
  roots = sorted(root for root in roots if f'{root}/data.pkl' in archive.members)
  if len(roots) != 1:
    raise errors.UserError(f"{path}: a PyTorch archive has one 'data.pkl', not {len(roots)}.")
  root = roots[0]
  if any(n == f'{root}/constants.pkl' or n.startswith(f'{root}/code/') for n in archive.members):
    raise errors.UserError(
      f'{path} is a TorchScript program, not a state dict. Save its weights once in PyTorch: '
      f"safetensors.torch.save_file(torch.jit.load(FILE, map_location='cpu').state_dict(), "
      f"'NAME.safetensors')."
    )
  return root


def _is_state_dict(value: object) -> bool:
  return isinstance(value, dict) and any(
    isinstance(entry, torch_pickle.PickledTensor) for entry in value.values()
  )


def _state_dict(
  path: pathlib.Path, pickled: Any, key: str | None
) -> tuple[str | None, dict[Any, Any]]:
  """The name of the state dict, None for the top level itself, and the state dict."""
  if not isinstance(pickled, dict):
    raise errors.UserError(f'{path} holds no dict of tensors but {type(pickled).__name__}.')
  candidates = [n for n, v in pickled.items() if isinstance(n, str) and _is_state_dict(v)]
  if key is not None:
    return key, pickled[errors.one_of(f'state dict of {path}', key, candidates)]
  known = [name for name in STATE_DICTS if name in candidates]
  if not known and _is_state_dict(pickled):
    return None, pickled
  choice = known or candidates
  if not choice:
    raise errors.UserError(
      f'{path} holds no state dict, only {[str(name)[:50] for name in pickled][:20]}.'
    )
  if len(choice) > 1:
    raise errors.UserError(
      f'{path} holds several state dicts: {", ".join(choice)}. Choose one as {path}:{choice[0]}.'
    )
  return choice[0], pickled[choice[0]]


def _tensor(
  archive: zips.Archive, root: str, name: str, tensor: torch_pickle.PickledTensor
) -> tensors.StoredTensor:
  where = f"{archive.file.path}: tensor '{name}'"
  storage = tensor.storage
  itemsize = storage.dtype.itemsize
  member = f'{root}/data/{storage.key}'
  if member not in archive.members:
    raise errors.UserError(f"{where}: the archive lacks its storage '{member}'.")
  size = archive.members[member].file_size
  if size != storage.numel * itemsize:
    raise errors.UserError(
      f'{where}: its storage has {size:,} bytes, not {storage.numel} of {storage.dtype}.'
    )
  # An expanded tensor repeats a few elements without end.
  needed = itemsize
  for n in tensor.shape:
    needed *= n
  if needed > max(archive.file.size, size, _SMALL):
    raise errors.UserError(
      f'{where}: {storage.dtype} {list(tensor.shape)} repeats its {size:,} stored bytes to '
      f'{needed:,}: refused.'
    )
  strides = tuple(stride * itemsize for stride in tensor.strides)
  data = archive.data(member, crc=False)
  return tensors.StoredTensor(data, tensor.shape, storage.dtype, tensor.offset * itemsize, strides)
