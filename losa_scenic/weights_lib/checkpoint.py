"""A public checkpoint as a backbone of ours: found out, checked, and read leaf by leaf."""

import dataclasses
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib.spec import BackboneSpec
from losa_scenic.model_lib.vit import ViT
from losa_scenic.weights_lib import geometry, inflate, mapping, resize, sources
from losa_scenic.weights_lib.evidence import Fields


@functools.cache  # A pass through the model, on shapes.
def param_shapes(spec: BackboneSpec) -> dict[str, tuple[int, ...]]:
  """{path: shape} of a plain backbone's parameters, layers unrolled."""
  return dict(_shapes(dataclasses.replace(spec, name='')))


@functools.lru_cache(maxsize=16)
def _shapes(spec: BackboneSpec) -> dict[str, tuple[int, ...]]:
  images = jax.ShapeDtypeStruct((1, *spec.input_shape), jnp.float32)
  shapes = jax.eval_shape(ViT(spec, {}).init, jax.random.key(0), images)['params']
  return {path: leaf.shape for path, leaf in trees.flatten(shapes).items()}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """An opened checkpoint, every tensor of which has its place. Weights are read by `read`.

  Attributes:
    source: the file.
    layout: what its tensors are.
    described: its geometry and where that is from.
  """

  source: sources.Source
  layout: mapping.Layout
  described: geometry.Described

  @property
  def spec(self) -> BackboneSpec:
    """The geometry."""
    return self.described.spec

  @property
  def sha256(self) -> str:
    """Hash of the files' bytes."""
    return self._sha256

  @functools.cached_property
  def _sha256(self) -> str:
    return self.source.sha256()

  def verify(self) -> None:
    """Public files promise no hash; what is broken is found while reading."""

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """{path: shape} of all parameters, layers unrolled."""
    return param_shapes(self.spec)

  def read(self, path: str) -> np.ndarray:
    """Reads one parameter in the dtype of the file.

    Raises:
      errors.UserError: if the file is damaged, or a value is NaN or infinite.
    """
    shape, origin = self.shapes[path], self.layout.origins[path]
    tensor = self.source.tensors[origin.name]
    if path == 'pos_embedding':
      value = _positions(tensor.read(), self.spec)
    else:
      value = mapping.read(tensor, origin, path, shape, _heads(self.layout, self.spec))
    if not np.isfinite(value).all():
      raise errors.UserError(f'{origin.name} ({path}) holds values that are no finite numbers.')
    return value


def open_checkpoint(
  path: str | pathlib.Path,
  given: Fields | None = None,
  prefix: str | None = None,
  family: str = 'auto',
) -> Checkpoint:
  """Opens a public checkpoint.

  Args:
    path: as `sources.open_source` takes it.
    given: fields of `BackboneSpec` that the user states; none of `inflate.FIELDS`, as files are of
      images.
    prefix: which encoder of a file with several.
    family: name of its family of names, or 'auto'.

  Raises:
    errors.UserError: if the file is no ViT of a known family, a tensor is left over, one is missing
      or has another shape, or a field cannot be known.
  """
  for field in inflate.FIELDS:
    if field in (given or {}):
      raise errors.UserError(
        f'{field}: checkpoints of images become those of clips when they are used: '
        f'--config.backbone_configs.{field}=...'
      )
  source = sources.open_source(path)
  layout = mapping.find(source.tensors, prefix, family)
  name = pathlib.Path(str(path).rstrip('/')).name
  described = geometry.describe(name, layout, source.tensors, source.metadata, given)
  checkpoint = Checkpoint(source, layout, described)
  wanted = checkpoint.shapes
  unused = [
    origin.name
    for path, origin in layout.origins.items()
    if path not in wanted and not path.startswith('map_head/')
  ]
  missing = [path for path in wanted if path not in layout.origins]
  missing += _always_there(checkpoint, given or {})
  if missing or unused:
    lacks = [layout.expected_name(path) for path in missing[:8]]
    raise errors.UserError(
      f'{path} does not fit the ViT that it seems to be ({layout.family.name}). '
      f'Missing: {", ".join(lacks) or "nothing"}; '
      f'without a place: {", ".join(unused[:8]) or "nothing"}.'
    )
  for leaf, shape in wanted.items():
    origin = layout.origins[leaf]
    tensor = source.tensors[origin.name]
    if leaf == 'pos_embedding':
      _check_positions(layout, tensor.shape, checkpoint.spec)
      shape = tensor.shape
    mapping.locate(tensor, origin, leaf, shape, _heads(layout, checkpoint.spec))
  return checkpoint


def _heads(layout: mapping.Layout, spec: BackboneSpec) -> int | None:
  return spec.heads if layout.family.jax else None


def _always_there(checkpoint: Checkpoint, given: Fields) -> list[str]:
  """Parameters that published ViTs have, and whose absence would only look like another ViT."""
  spec, origins = checkpoint.spec, checkpoint.layout.origins
  missing = []
  if not (spec.patch_bias or spec.pre_norm or 'patch_bias' in given):  # CLIP's have none.
    missing.append('patch/proj/bias')
  knows_places = spec.positions != 'none' or spec.relative_positions or spec.rope != 'none'
  if not (knows_places or 'positions' in given):
    missing.append('pos_embedding')
  if any(path.startswith('map_head/') for path in origins) and 'map_head/probe' not in origins:
    missing.append('map_head/probe')
  return missing


def _check_positions(layout: mapping.Layout, shape: tuple[int, ...], spec: BackboneSpec) -> None:
  """Refuses a table that is wider than the model, or covers more tokens than it has."""
  name, patches = layout.origins['pos_embedding'].name, math.prod(spec.grid)
  covered = shape[-2] - patches
  if covered > spec.prefix:
    lacks = [layout.expected_name(path) for path in ('cls', 'registers')]
    raise errors.UserError(
      f'{name} {list(shape)} is of {covered} tokens before {patches} patches; the checkpoint has '
      f'{spec.prefix} such tokens. Is {" or ".join(lacks)} missing?'
    )
  if shape[-1] != spec.width or math.prod(shape[:-2]) != 1:
    raise errors.UserError(f'{name} {list(shape)} does not fit the width {spec.width}.')


def _positions(table: np.ndarray, spec: BackboneSpec) -> np.ndarray:
  """A file's position embedding as ours, which covers every token: zeros where the file's does not.

  Files cover all leading tokens (DeiT), the class token alone (DINOv2 with registers) or none.
  """
  table = table.reshape(1, -1, table.shape[-1])
  patches = math.prod(spec.grid)
  covered = table.shape[1] - patches
  own = [table[:, :covered]]
  own.append(np.zeros((1, spec.prefix - covered, spec.width), table.dtype))
  return np.concatenate([*own, table[:, covered:]], axis=1)


def resized(path: str, value: np.ndarray, old: BackboneSpec, new: BackboneSpec) -> np.ndarray:
  """A parameter for another input: positions are resampled, of an image's the clip's are made."""
  inflated = bool(new.frames) and not old.frames
  if old.grid == new.grid and not inflated:
    return value
  if path == 'patch/proj/kernel' and inflated:
    return inflate.patch_kernel(value, new.tubelet, new.inflation)
  if path == 'pos_embedding':
    return inflate.positions(value, old, new)
  if path.endswith('relative_bias'):
    return resize.relative_bias(value, old.grid[1:], new.grid[1:])
  return value
