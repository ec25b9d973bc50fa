"""Backbone files of our own: safetensors + JSON, verified, mapped, and written as a stream.

A backbone is two files: `NAME.safetensors` holds the weights, layers stacked, in one float dtype;
`NAME.json` holds {format_version, name, spec, sha256, leaves, card}. The hash covers paths, shapes,
dtypes and bytes of all leaves, so a flipped bit or a swapped file is an error.

The weights are used where the file is mapped, after one pass for the hash. So a file in use must
only ever be replaced by another one (written under another name, then renamed, as `write` does):
whoever has mapped the old file keeps it. What is written into the file itself changes weights that
are in use, unnoticed.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib.spec import BackboneSpec
from losa_scenic.weights_lib import safetensors_file, tensors
from losa_scenic.weights_lib.checkpoint import param_shapes

FORMAT_VERSION = 2
DTYPES = {'float32': 'F32', 'bfloat16': 'BF16', 'float16': 'F16'}
# Arrays that start at a multiple of this many bytes are used by XLA on a CPU where they lie.
_ALIGNMENT = 64
_LAYER = re.compile(r'encoder/layers_(\d+)/(.*)')


def stacked(path: str) -> tuple[str, int | None]:
  """'encoder/layers_3/x' -> ('encoder/layers/x', 3); the layer is None elsewhere."""
  match = _LAYER.fullmatch(path)
  return (f'encoder/layers/{match[2]}', int(match[1])) if match else (path, None)


def stack_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
  """{path: shape} of unrolled layers -> of stacked ones, sorted by path."""
  depth = 1 + max((stacked(path)[1] or 0 for path in shapes), default=0)
  found = {}
  for path, shape in shapes.items():
    name, layer = stacked(path)
    found[name] = shape if layer is None else (depth, *shape)
  return dict(sorted(found.items()))


@dataclasses.dataclass(frozen=True)
class Stored:
  """The weights of a backbone file; see `backbones.Weights`.

  Attributes:
    path: NAME.json.
    description: its content.
    spec: the geometry that is stored.
  """

  path: pathlib.Path
  description: Mapping[str, Any]
  spec: BackboneSpec

  @property
  def sha256(self) -> str:
    """The hash that the description promises."""
    return self.description['sha256']

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """{path: shape}, layers unrolled."""
    return param_shapes(self.spec)

  @functools.cached_property
  def _tensors(self) -> Mapping[str, tensors.Tensor]:
    path = self.path.with_suffix('.safetensors')
    try:
      found = safetensors_file.read(path).tensors
    except FileNotFoundError:
      raise errors.UserError(f'There is no weights file {path}.') from None
    have = {name: [list(t.shape), t.dtype.name] for name, t in found.items()}
    differences = trees.differences(self.description['leaves'], have)
    if differences:
      raise errors.UserError('\n  '.join([f'{path} does not fit {self.path}:', *differences]))
    return found

  def verify(self) -> None:
    """Reads everything once, a layer at a time.

    Raises:
      errors.UserError: if the weights are missing, do not fit the description, or are damaged.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(self._tensors.items()):
      digest.update(_headline(name, tensor.shape, tensor.dtype))
      for index in _parts(name, tensor.shape):
        digest.update(_bytes(tensor.read(index)))
    if digest.hexdigest() != self.sha256:
      path = self.path.with_suffix('.safetensors')
      raise errors.UserError(f'{path} is damaged: its hash is not the one in {self.path.name}.')

  def read(self, path: str) -> np.ndarray:
    """One parameter, layers unrolled, as a read-only mapping of the file.

    Raises `UserError` if it is no longer the file that `verify` read.
    """
    name, layer = stacked(path)
    return tensors.mapped(self._tensors[name], () if layer is None else (layer,))

  def read_stacked(self, name: str) -> np.ndarray:
    """One parameter of all layers; see `read`."""
    return tensors.mapped(self._tensors[name])


def _headline(name: str, shape: tuple[int, ...], dtype: np.dtype) -> bytes:
  return f'{name} {tuple(shape)} {dtype.name}\n'.encode()


def _bytes(value: np.ndarray) -> memoryview:
  """The bytes of an array of any dtype; bfloat16 itself has no buffer."""
  return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data


def _parts(name: str, shape: tuple[int, ...]) -> Iterable[tuple[int, ...]]:
  """Indices of what is read at once: each layer, or everything."""
  return [(i,) for i in range(shape[0])] if name.startswith('encoder/layers/') else [()]


def open_stored(path: pathlib.Path) -> Stored:
  """Reads the description of a backbone, not its weights.

  Raises:
    errors.UserError: if it is missing, damaged, or of another version.
  """
  try:
    description = json.loads(path.read_text())
  except FileNotFoundError:
    raise errors.UserError(f'There is no backbone description {path}.') from None
  except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
    raise errors.UserError(f'Cannot read the backbone description {path}: {e}') from None
  if not isinstance(description, dict) or description.get('format_version') != FORMAT_VERSION:
    raise errors.UserError(f'{path} is not a backbone description of version {FORMAT_VERSION}.')
  missing = {'name', 'spec', 'sha256', 'leaves'} - set(description)
  if missing:
    raise errors.UserError(f'{path} lacks {sorted(missing)}.')
  return Stored(path, description, BackboneSpec.from_json(description['spec']))


def write(
  path: pathlib.Path,
  spec: BackboneSpec,
  read: Callable[[str], np.ndarray],
  dtype: str = 'float32',
  card: Mapping[str, Any] | None = None,
) -> Stored:
  """Writes NAME.safetensors and NAME.json, one parameter of one layer after the other.

  Args:
    path: NAME.json or NAME.safetensors.
    spec: geometry, with the name that the backbone shall have.
    read: path of a parameter, layers unrolled -> its value.
    dtype: a key of `DTYPES`: the dtype of storage.
    card: what people should know: source, data, licence, recipe, accuracy.

  Returns:
    What was written, as `open_stored` returns it.

  Raises:
    errors.UserError: if a value is not finite in that dtype, or the files cannot be written; those
      that were there before stay.
  """
  path = path.with_suffix('.json')
  weights = path.with_suffix('.safetensors')
  shapes = stack_shapes(param_shapes(spec))
  target = np.dtype(jnp.dtype(errors.one_of('dtype', dtype, DTYPES)))
  with replacing(path, weights) as (new_path, new_weights):
    with open(new_weights, 'wb') as stream:
      digest = _write_weights(stream, shapes, read, target, path)
    description = {
      'format_version': FORMAT_VERSION,
      'name': spec.name,
      'spec': spec.to_json(),
      'sha256': digest,
      'leaves': {name: [list(shape), target.name] for name, shape in shapes.items()},
      'card': dict(card or {}),
    }
    new_path.write_text(json.dumps(description, indent=1) + '\n')
  return open_stored(path)


@contextlib.contextmanager
def replacing(*paths: pathlib.Path) -> Iterator[list[pathlib.Path]]:
  """Files that appear together, in the place of older ones, when all of them are written.

  Args:
    paths: files of one folder, which is made if it does not exist. They appear in this order; of
      all but the last, copies are held for that moment, so the last should be the large one.

  Yields:
    Where to write each of them.

  Raises:
    errors.UserError: if they cannot be written; the older files stay then, as they do if the body
      raises anything.
  """
  folder, own = paths[-1].parent, f'.{os.getpid()}.'
  unfinished = [folder / f'{own}{path.name}' for path in paths]
  copies = [folder / f'{own}old.{path.name}' for path in paths[:-1]]
  appeared = []
  try:
    folder.mkdir(parents=True, exist_ok=True)
    yield unfinished
    for path, copy in zip(paths, copies, strict=False):
      if path.exists():
        shutil.copyfile(path, copy)
    for path, new in zip(paths, unfinished, strict=True):
      os.replace(new, path)
      appeared.append(path)
  except OSError as e:
    for path, copy in zip(appeared, copies, strict=False):
      if copy.exists():
        os.replace(copy, path)
      else:
        path.unlink()
    raise errors.UserError(f'Cannot write {paths[-1]}: {e.strerror or e}.') from None
  finally:
    for left in [*unfinished, *copies] if folder.is_dir() else []:
      left.unlink(missing_ok=True)


def _write_weights(
  stream: BinaryIO,
  shapes: Mapping[str, tuple[int, ...]],
  read: Callable[[str], np.ndarray],
  dtype: np.dtype,
  path: pathlib.Path,
) -> str:
  """Writes a safetensors file; returns the hash of the leaves."""
  header, position = {}, 0
  for name, shape in shapes.items():
    size = int(np.prod(shape)) * dtype.itemsize
    header[name] = {
      'dtype': DTYPES[dtype.name],
      'shape': list(shape),
      'data_offsets': [position, position + size],
    }
    position += size
  text = json.dumps(header).encode()
  text += b' ' * (-(len(text) + 8) % _ALIGNMENT)
  stream.write(len(text).to_bytes(8, 'little') + text)
  digest = hashlib.sha256()
  for name, shape in shapes.items():
    digest.update(_headline(name, shape, dtype))
    for index in _parts(name, shape):
      own = name.replace('/layers/', f'/layers_{index[0]}/', 1) if index else name
      value = np.ascontiguousarray(np.asarray(read(own)).astype(dtype))
      if value.shape != shape[len(index) :]:
        raise ValueError(f'{own} is {value.shape}, not {shape[len(index) :]}.')
      if not np.isfinite(value.astype(np.float32)).all():
        raise errors.UserError(f'{path}: {own} is not finite in {dtype.name}. Nothing is written.')
      stream.write(_bytes(value))
      digest.update(_bytes(value))
  return digest.hexdigest()
