"""Backbones as a config names them: packaged, converted, public checkpoints, or presets."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib import presets, quantised
from losa_scenic.model_lib.spec import BackboneSpec
from losa_scenic.weights_lib import checkpoint, inflate, stored

_PACKAGED = pathlib.Path(__file__).parent.parent / 'pretrained'
IN_FOLDER = 'backbone.json'  # What a converted folder holds.
# Fields of stored weights that may differ from what is stored.
CHANGEABLE = ('pool', 'image_size', 'mean', 'std', 'interpolation', *inflate.FIELDS)


class Weights(Protocol):
  """Weights that can be read parameter by parameter."""

  @property
  def spec(self) -> BackboneSpec:
    """The geometry that they have."""
    ...

  @property
  def shapes(self) -> Mapping[str, tuple[int, ...]]:
    """{path: shape}, layers unrolled."""
    ...

  @property
  def sha256(self) -> str:
    """Their hash. Of a public checkpoint: of its files, which takes a pass over them."""
    ...

  def read(self, path: str) -> np.ndarray:
    """One parameter, layers unrolled, in the dtype of the file; not to be written to."""
    ...

  def verify(self) -> None:
    """Raises `UserError` if the weights are known to be damaged."""
    ...


@dataclasses.dataclass(frozen=True)
class Backbone:
  """A backbone as a config names it.

  Attributes:
    spec: its geometry, with what the config changes.
    weights: where its weights are, or None if it is a preset and they are random.
    family: of a public checkpoint, converted or not: what its names are like; else ''.
    facts: of such a one: field of the spec -> where it is from, as in `geometry.Described.origins`;
      what the config changes is 'given'.
  """

  spec: BackboneSpec
  weights: Weights | None = None
  family: str = dataclasses.field(default='', compare=False)
  facts: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)

  @property
  def sha256(self) -> str | None:
    """Hash of the stored weights, or None for random ones."""
    return None if self.weights is None else self.weights.sha256

  def identity(self) -> dict[str, Any]:
    """What a checkpoint of adapted parameters says about the backbone it belongs to.

    Not its name: a folder that was renamed holds the same backbone.
    """
    spec = {field: value for field, value in self.spec.to_json().items() if field != 'name'}
    return {'spec': spec, 'sha256': self.sha256}

  def released(self) -> 'Backbone':
    """The same without its file, which may be in memory: everything but reading is possible.

    Of a public checkpoint, its hash is computed first: a pass over its files.
    """
    if self.weights is None:
      return self
    weights = _Released(self.weights.spec, self.weights.shapes, self.weights.sha256)
    return dataclasses.replace(self, weights=weights)


@dataclasses.dataclass(frozen=True)
class _Released:
  """What remains of `Weights` that are no longer needed."""

  spec: BackboneSpec
  shapes: Mapping[str, tuple[int, ...]]
  sha256: str

  def read(self, path: str) -> np.ndarray:
    raise ValueError(f'{path} cannot be read: the weights were released.')

  def verify(self) -> None:
    pass


def packaged() -> list[str]:
  """Names of the pretrained backbones that ship with the package."""
  return sorted(path.stem for path in _PACKAGED.glob('*.json'))


def find(name: str, changes: Mapping[str, Any] | None = None) -> Backbone:
  """Looks a backbone up; reads its description, not its weights.

  Args:
    name: a packaged backbone; a folder or NAME.json that `convert` or `export_backbone` wrote; a
      public checkpoint, file or folder (see `sources.open_source`); or a preset such as 'S/16',
      whose weights are random.
    changes: `BackboneSpec` fields: any for a preset; `CHANGEABLE` ones for stored weights; for a
      public checkpoint also those that it does not say. With frames, weights of images become those
      of clips (see `inflate`).

  Raises:
    errors.UserError: if there is no such backbone, its files are damaged, or a change would need
      other weights.
  """
  changes = {field: _as_field(value) for field, value in (changes or {}).items()}
  own = own_description(name)
  if own is not None:
    weights: Weights = stored.open_stored(own)
    for field in changes:
      if field not in CHANGEABLE:
        raise errors.UserError(
          f"backbone_configs.{field} cannot change for stored weights ('{name}'); only "
          f'{", ".join(CHANGEABLE)} can.'
        )
  elif _is_file(name):
    of_use = ('image_size', *inflate.FIELDS)
    given = {field: value for field, value in changes.items() if field not in of_use}
    weights = checkpoint.open_checkpoint(name, given)
  else:
    _check_preset(name)
    if 'inflation' in changes:
      raise errors.UserError(f"Backbone '{name}' has random weights: there is nothing to inflate.")
    return Backbone(presets.preset(name, **changes))
  if changes.get('pool') == 'map' and 'map_head/probe' not in weights.shapes:
    raise errors.UserError(f"Backbone '{name}' has no MAP head: its pooling cannot become 'map'.")
  family, facts = _facts(weights)
  spec = dataclasses.replace(weights.spec, **changes)
  inflate.check(weights.spec, spec, changes)
  given = dict.fromkeys(changes, 'given') if facts else {}
  if facts and spec.frames > weights.spec.frames:
    given.setdefault('inflation', 'convention')
  return Backbone(spec, weights, family, {**facts, **given})


def _facts(weights: Weights) -> tuple[str, Mapping[str, str]]:
  """Family and origins of the fields; of a converted backbone, what its card remembers of them."""
  if isinstance(weights, checkpoint.Checkpoint):
    return weights.layout.family.name, weights.described.origins
  card = weights.description.get('card') if isinstance(weights, stored.Stored) else None
  card = card if isinstance(card, Mapping) else {}
  facts = card.get('facts')
  return str(card.get('family', '')), facts if isinstance(facts, Mapping) else {}


def _check_preset(name: str) -> None:
  """Raises `UserError` if there is no such preset, with what may have been meant."""
  if '/' not in name and name not in presets.names():
    raise errors.unknown('backbone', name, packaged() + presets.names())
  try:
    presets.preset(name)
  except errors.UserError as e:
    raise errors.UserError(
      f'{e} There is no file or folder {name} here either: checkpoints of a hub must be downloaded '
      'first, and their folder named.'
    ) from None


def _as_field(value: Any) -> Any:
  return tuple(value) if isinstance(value, list) else value


def _is_file(name: str) -> bool:
  """Whether a name is a file or folder, or 'FILE:PART', or looks like nothing else."""
  path = pathlib.Path(name)
  looks = name.endswith(('.json', '.safetensors', '.npz', '.pth', '.pt', '.bin', '.msgpack'))
  return path.exists() or pathlib.Path(name.rpartition(':')[0] or '/nowhere').is_file() or looks


def own_description(name: str) -> pathlib.Path | None:
  """The JSON file of a backbone in our own format, or None."""
  if name in packaged():
    return _PACKAGED / f'{name}.json'
  path = pathlib.Path(name)
  if path.is_dir():
    return path / IN_FOLDER if (path / IN_FOLDER).exists() else None
  if name.endswith('.json') and not name.endswith('.index.json'):
    return path
  beside = path.with_suffix('.json')
  if name.endswith('.safetensors') and (_is_description(beside) or not path.exists()):
    return beside
  return None


def _is_description(path: pathlib.Path) -> bool:
  """Whether a file is a description of ours. Others have a JSON of that name for other ends."""
  try:
    content = json.loads(path.read_text())
  except (OSError, ValueError):
    return False
  return isinstance(content, dict) and 'format_version' in content


def load(
  backbone: Backbone,
  *,
  stack: bool = True,
  dtype: Callable[[str], Any] | None = None,
  place: Callable[[str, np.ndarray], jax.Array] = lambda _, value: jax.device_put(value),
  quantisation: str | None = None,
) -> dict[str, Any]:
  """Reads stored weights, one parameter after the other, onto the devices.

  Beside what was placed, host memory holds one parameter: of all layers if they are stacked. But
  .msgpack files are in memory as a whole from when they are opened. On a CPU, weights in our format
  that need no cast are not copied at all: they are used where the file is mapped.

  Args:
    backbone: one with weights.
    stack: stack the layers.
    dtype: the dtype to store a parameter in, by its path with layers as they will be; the file's
      when None.
    place: `place(path, value)` puts an array of the host on devices; with a sharding, each gets its
      part alone.
    quantisation: of the linear layers of blocks, one of `quantised.KINDS`: they are rounded here,
      one layer's after the other, and `dtype` is not for them. None: they stay floats.

  Returns:
    The tree of the plain backbone's parameters.

  Raises:
    errors.UserError: if a file is missing or damaged, or a name, shape, dtype or the hash is not
      the one that the description promises.
  """
  weights = backbone.weights
  if weights is None:
    raise ValueError('A preset has no stored weights.')
  weights.verify()
  wanted = checkpoint.param_shapes(backbone.spec)
  missing = [path for path in wanted if path not in weights.shapes]
  if missing:
    raise errors.UserError(f'The stored weights lack {missing[:8]}.')

  def read(path: str, as_path: str) -> dict[str, np.ndarray]:
    """What is stored in the place of a parameter: one value, or what quantising makes of it."""
    value = checkpoint.resized(path, weights.read(path), weights.spec, backbone.spec)
    if quantisation is not None and quantised.is_kernel(as_path):
      return quantised.in_place_of(as_path, value, quantisation)
    return {as_path: value if dtype is None else value.astype(dtype(as_path), copy=False)}

  flat: dict[str, Any] = {}
  for name, shape in (stored.stack_shapes(wanted) if stack else wanted).items():
    if not name.startswith('encoder/layers/'):
      parts = {path: _aligned(value) for path, value in read(name, name).items()}
    else:
      rounded = quantisation is not None and quantised.is_kernel(name)
      mapped = None if rounded else _mapped_layers(weights, backbone.spec, name, dtype)
      layers = (read(name.replace('/layers/', f'/layers_{i}/', 1), name) for i in range(shape[0]))
      parts = _stacked(layers, shape[0]) if mapped is None else {name: mapped}
    flat |= {path: place(path, value) for path, value in parts.items()}
  return trees.unflatten(flat)


def _stacked(layers: Iterable[Mapping[str, np.ndarray]], depth: int) -> dict[str, np.ndarray]:
  """Parameters of one layer after the other -> those of all layers, with a leading axis."""
  whole: dict[str, np.ndarray] = {}
  for i, layer in enumerate(layers):
    for path, value in layer.items():
      if i == 0:
        whole[path] = _empty((depth, *value.shape), value.dtype)
      whole[path][i] = value
  return whole


def _mapped_layers(
  weights: Weights, spec: BackboneSpec, name: str, dtype: Callable[[str], Any] | None
) -> np.ndarray | None:
  """All layers of a parameter where the file is mapped, if they can be used as they are."""
  resampled = name.endswith('relative_bias') and weights.spec.grid != spec.grid
  if not isinstance(weights, stored.Stored) or resampled:
    return None
  whole = weights.read_stacked(name)
  return whole if dtype is None or whole.dtype == jnp.dtype(dtype(name)) else None


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """An array that XLA can use without a copy on a CPU: it starts at a multiple of 64 bytes."""
  size = int(np.prod(shape)) * dtype.itemsize
  raw = np.empty(size + 64, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start : start + size].view(dtype).reshape(shape)


def _aligned(value: np.ndarray) -> np.ndarray:
  """The same values where XLA can use them without a copy of its own."""
  if value.ctypes.data % 64 == 0 and value.flags.c_contiguous:
    return value
  copy = _empty(value.shape, value.dtype)
  copy[...] = value
  return copy


def save(
  path: pathlib.Path,
  spec: BackboneSpec,
  params: Mapping[str, Any],
  dtype: str = 'float32',
  card: Mapping[str, Any] | None = None,
) -> Backbone:
  """Writes a tree of parameters as NAME.safetensors and NAME.json.

  Args:
    path: NAME.json or NAME.safetensors; its stem becomes the backbone's name.
    spec: geometry.
    params: the plain backbone's parameters, layers stacked.
    dtype: 'float32', 'bfloat16' or 'float16', the dtype of storage.
    card: what people should know: data, licence, recipe, accuracy.

  Returns:
    The backbone as `find` would return it.
  """
  flat = trees.flatten(params)

  def read(own: str) -> np.ndarray:
    name, layer = stored.stacked(own)
    return np.asarray(flat[name] if layer is None else flat[name][layer])

  spec = dataclasses.replace(spec, name=path.stem)
  weights = stored.write(path, spec, read, dtype, card)
  return Backbone(spec, weights)
