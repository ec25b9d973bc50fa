"""A checkpoint file or folder as named arrays, read when they are needed.

Formats: safetensors, sharded or not; npz of big_vision and vision_transformer; PyTorch's zip
archives, sharded or not; Scenic's and Flax's msgpack. A file's kind is told by its first bytes,
not by its name. Nothing in a file is ever executed.
"""

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from losa_scenic.common_lib import errors
from losa_scenic.weights_lib import (
  npz,
  safetensors_file,
  scenic_msgpack,
  shards,
  strict_json,
  tensors,
  torch_file,
  zips,
)

SIDE_FILES = ('config.json', 'preprocessor_config.json', 'open_clip_config.json')
# What hubs call the weights in a folder, the preferred first: safetensors before pickles.
CONVENTIONAL = (
  'model.safetensors.index.json',
  'model.safetensors',
  'open_clip_model.safetensors',
  'pytorch_model.bin.index.json',
  'pytorch_model.bin',
  'open_clip_pytorch_model.bin',
)
_SUFFIXES = ('.safetensors', '.npz', '.bin', '.pth', '.pt', '.msgpack')
_WITH_KEY = ('npz', 'torch')
_HEAD = 512  # Bytes that tell the kind of a file.

# First bytes of what people have instead of a checkpoint, and what to do about it.
_REFUSED = (
  (
    re.compile(rb'version https://git-lfs'),
    'a Git LFS pointer, not the weights: fetch them with `git lfs pull`',
  ),
  (re.compile(rb'\s*<', re.I), 'a web page, not the weights: download the raw file'),
  (
    re.compile(rb'\x80[\x02-\x05]'),
    "in PyTorch's old format, a bare pickle. Save it once more in PyTorch 1.6 or later: "
    'torch.save(torch.load(FILE, weights_only=True), NEW_FILE)',
  ),
  (re.compile(rb'\x89HDF'), 'HDF5 (Keras), which is not read'),
  (re.compile(rb'\x93NUMPY'), 'a single NumPy array; an .npz of named arrays is needed'),
  (re.compile(rb'\x1f\x8b'), 'packed with gzip: unpack it first'),
)


@dataclasses.dataclass(frozen=True)
class Source:
  """An opened checkpoint. Only names, shapes and dtypes were read, except for msgpack.

  Attributes:
    path: what was asked for, with the part in the file after ':'.
    files: all files with weights, sorted.
    tensors: the weights by name, as the file spells them.
    metadata: the JSON files beside the weights by name (`SIDE_FILES`), as far as they exist;
      '__metadata__' of a safetensors header; 'taken', the part of the file that `tensors` is, if
      it is not all; 'other', the names of what was left out.
  """

  path: pathlib.Path
  files: tuple[pathlib.Path, ...]
  tensors: Mapping[str, tensors.Tensor]
  metadata: Mapping[str, Any]

  def sha256(self) -> str:
    """Hash of the bytes of the files, whatever their names.

    Returns:
      64 hexadecimal digits: for one file its SHA-256, as `sha256sum` prints it; for several, the
      SHA-256 of the sorted digests, joined.
    """
    digests = []
    for path in self.files:
      with open(path, 'rb') as stream:
        digests.append(hashlib.file_digest(stream, 'sha256').hexdigest())
    if len(digests) == 1:
      return digests[0]
    return hashlib.sha256(''.join(sorted(digests)).encode()).hexdigest()


def open_source(path: str | pathlib.Path) -> Source:
  """Opens a checkpoint.

  Args:
    path: a file of weights, an index of several, or a folder with one of these; 'FILE:PART' for
      the submodel PART of an npz ('img') or the state dict PART of a PyTorch file ('teacher').

  Returns:
    The checkpoint.

  Raises:
    errors.UserError: if there is no such file, it is unclear which is meant, or the file is of an
      unknown kind, damaged, or would run code.
  """
  path = pathlib.Path(path)
  file, part = _split(path)
  if file.is_dir():
    file = _in_folder(file)
  try:
    kind = _kind(file)
    files = (file,)
    if kind == 'index':
      _refuse_part(file, kind, part)
      contents, files = shards.read(file, lambda shard: _read(shard, _kind(shard), None))
    else:
      contents = _read(file, kind, part)
  except OSError as error:
    raise errors.UserError(f'{file}: cannot be read ({error.strerror}).') from None
  if not contents.tensors:
    raise errors.UserError(f'{path} holds no weights.')
  beside = {n: strict_json.read(file.parent / n) for n in SIDE_FILES if (file.parent / n).is_file()}
  return Source(path, files, contents.tensors, {**contents.metadata, **beside})


def _split(path: pathlib.Path) -> tuple[pathlib.Path, str | None]:
  """File or folder, and the part after a colon."""
  if path.exists():
    return path, None
  name, colon, part = str(path).rpartition(':')
  if colon and part and pathlib.Path(name).exists():
    return pathlib.Path(name), part
  folder = path.parent
  there = [e.name for e in folder.iterdir() if _is_named_so(e.name)] if folder.is_dir() else []
  if not there:
    raise errors.UserError(f'There is no file or folder {path}.')
  raise errors.unknown(f'file in {folder}', path.name, there)


def _in_folder(folder: pathlib.Path) -> pathlib.Path:
  """The weights in a folder."""
  names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
  for name in CONVENTIONAL:
    if name in names:
      return folder / name
  found = [name for name in names if _is_named_so(name)]
  indices = [n for n in names if n.endswith('.index.json')]
  found = indices or found
  if len(found) == 1:
    return folder / found[0]
  if found:
    raise errors.UserError(f'{folder} holds several checkpoints, name one: {", ".join(found)}.')
  raise errors.UserError(
    f'{folder} holds no weights ({", ".join(CONVENTIONAL)} or one file *{", *".join(_SUFFIXES)} or '
    f'checkpoint_N), only: {", ".join(names[:20]) or "nothing"}.'
  )


def _is_named_so(name: str) -> bool:
  """Whether a file is named as weights often are."""
  return name.endswith(_SUFFIXES) or re.fullmatch(r'checkpoint_\d+', name) is not None


def _kind(path: pathlib.Path) -> str:
  """Tells the kind of a file by its first bytes: 'safetensors', 'npz', 'torch', ..."""
  with open(path, 'rb') as stream:
    head = stream.read(_HEAD)
  if not head:
    raise errors.UserError(f'{path}: the file is empty.')
  # The eighth byte is the highest of a length: in a text it is a letter, in safetensors nearly 0.
  if head[8:9] == b'{' and not (head[:1] == b'{' and head[7] >= 9):
    return 'safetensors'
  if head.lstrip()[:1] == b'{':
    return 'index'
  if head.startswith(b'PK'):
    names = zips.Archive(path).members
    return 'torch' if any(re.fullmatch(r'[^/]+/data\.pkl', name) for name in names) else 'npz'
  for pattern, meaning in _REFUSED:
    if pattern.match(head):
      raise errors.UserError(f'{path} is {meaning}.')
  if 0x80 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF):
    return 'msgpack'
  raise errors.UserError(
    f'{path} is no checkpoint of a known kind (safetensors, npz, PyTorch zip, Flax msgpack); its '
    f'first bytes are {head[:16]!r}. Was the download cut off?'
  )


def _read(path: pathlib.Path, kind: str, part: str | None) -> tensors.Contents:
  if kind not in _WITH_KEY:
    _refuse_part(path, kind, part)
  match kind:
    case 'safetensors':
      return safetensors_file.read(path)
    case 'npz':
      return npz.read(path, part)
    case 'torch':
      return torch_file.read(path, part)
    case 'msgpack':
      return scenic_msgpack.read(path)
  raise errors.UserError(f'{path} is an index of weights, not weights.')


def _refuse_part(path: pathlib.Path, kind: str, part: str | None) -> None:
  if part is not None:
    raise errors.UserError(
      f"{path}:{part}: a file of kind '{kind}' has no parts; npz and PyTorch files have."
    )
