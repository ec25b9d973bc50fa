"""Which tensor of a public file each parameter of ours goes to: the way back of `mapping`.

A spelling is from a library's tables (`formats`), or it is that of the very file that a backbone
was converted from: `Original`, which fits into a few lines of JSON.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.model_lib.spec import BackboneSpec
from losa_scenic.weights_lib.checkpoint import Checkpoint
from losa_scenic.weights_lib.families import FAMILIES
from losa_scenic.weights_lib.family import Family

_LAYER = re.compile(r'encoder/layers_(\d+)/block/(.*)')
_BLOCK = 'encoder/layers_{i}/block/'
# Of a config.json: what is of other towers, or of a classifier, which is not written.
_NOT_KEPT = ('text_config', 'id2label', 'label2id')


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a parameter goes.

  Attributes:
    name: the tensor.
    shape: what the parameter is there, without the axis of layers: of a part of a tensor, the part.
    part: (i, n): the i-th of n equal parts along the first axis.
    layer: the index along an axis before that, or None.
  """

  name: str
  shape: tuple[int, ...]
  part: tuple[int, int] = (0, 1)
  layer: int | None = None


@dataclasses.dataclass(frozen=True)
class Spelling:
  """Places of all parameters.

  Attributes:
    places: path, layers unrolled -> place. Several layers may share one.
    covered: leading tokens, at least 0, that the tensor of position embeddings has rows for.
    jax: kernels are [in, ..., out].
  """

  places: Mapping[str, Place]
  covered: int
  jax: bool


def as_stored(value: np.ndarray, place: Place, path: str, jax: bool) -> np.ndarray:
  """A parameter as a file has it; the inverse of `mapping.read`.

  Raises:
    errors.UserError: if it does not fit there.
  """
  if value.size != math.prod(place.shape):
    raise errors.UserError(
      f'{path} {list(value.shape)} does not fit {place.name}, where it would be '
      f'{list(place.shape)}.'
    )
  if not path.endswith('kernel') or jax:
    return value.reshape(place.shape)
  # [in, out] -> [out, in]; a patch kernel [rows, d], rows of (y, x, channel) -> [d, 3, y, x].
  order = (*range(2, len(place.shape)), 1, 0)
  return value.reshape([place.shape[axis] for axis in order]).transpose(np.argsort(order))


def layer_of(path: str) -> tuple[int | None, str]:
  """'encoder/layers_3/block/norm1/bias' -> (3, 'norm1/bias'); (None, path) outside of layers."""
  match = _LAYER.fullmatch(path)
  return (int(match[1]), match[2]) if match else (None, path)


@dataclasses.dataclass(frozen=True)
class Original:
  """How the file spelled its parameters that a backbone was converted from.

  Attributes:
    family: `Family.name`.
    prefix: what stands before every name of the encoder.
    leaves: path of a parameter -> (name, shape of that tensor, part), with '{i}' in the place of
      the layer and without the axis of stacked layers.
    covered: leading tokens that its position embedding has rows for.
    config: the config.json beside it, as far as it is about the encoder.
  """

  family: str
  prefix: str
  leaves: Mapping[str, tuple[str, tuple[int, ...], tuple[int, int]]]
  covered: int = 0
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @classmethod
  def of(cls, checkpoint: Checkpoint) -> 'Original':
    """The spelling of an opened public checkpoint.

    Raises:
      errors.UserError: if its layers are spelled in different ways.
    """
    layout, tensors = checkpoint.layout, checkpoint.source.tensors
    stacked, leaves = layout.family.stacked, {}
    first = layout.prefix + layout.family.layer.format(i=0)
    for path, origin in layout.origins.items():
      layer, own = layer_of(path)
      shape, name = tensors[origin.name].shape, origin.name
      if layer is None:
        leaves[path] = (name, shape, origin.part)
      elif layer == 0:
        if name.startswith(first):
          name = layout.prefix + layout.family.layer + name.removeprefix(first)
        leaves[_BLOCK + own] = (name, shape[1:] if stacked else shape, origin.part)
    rows = leaves['pos_embedding'][1][-2] if 'pos_embedding' in leaves else 0
    covered = rows - math.prod(checkpoint.spec.grid) if rows else 0
    config = checkpoint.source.metadata.get('config.json', {})
    config = {key: value for key, value in config.items() if key not in _NOT_KEPT}
    found = cls(layout.family.name, layout.prefix, leaves, covered, config)
    places = found.spelling(checkpoint.spec, checkpoint.shapes).places
    odd = [path for path, place in places.items() if layout.origins[path].name != place.name]
    if odd:
      raise errors.UserError(f'The layers of the checkpoint differ in their names: {odd[:4]}.')
    return found

  def to_json(self) -> dict[str, Any]:
    """The spelling as a JSON object; `from_json` reads it back."""
    leaves = {
      path: [name, list(shape), *([list(part)] if part[1] > 1 else [])]
      for path, (name, shape, part) in self.leaves.items()
    }
    return dataclasses.asdict(self) | {'leaves': leaves}

  @classmethod
  def from_json(cls, fields: Mapping[str, Any]) -> 'Original':
    """Reads `to_json`'s object. Raises `UserError` if it is not one."""
    try:
      leaves = {
        path: (str(name), tuple(map(int, shape)), (int(part[0][0]), int(part[0][1])))
        if part
        else (str(name), tuple(map(int, shape)), (0, 1))
        for path, (name, shape, *part) in fields['leaves'].items()
      }
      names = ('family', 'prefix', 'covered', 'config')
      return cls(leaves=leaves, **{name: fields[name] for name in names})
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
      raise errors.UserError(f'This is no record of how a file was spelled: {e!r}.') from None

  def table(self) -> Family:
    """The family's table. Raises `UserError` if there is none of that name."""
    families = {family.name: family for family in FAMILIES}
    return families[errors.one_of('family of checkpoints', self.family, families)]

  def spelling(
    self,
    spec: BackboneSpec,
    shapes: Mapping[str, tuple[int, ...]],
    prefix: str | None = None,
  ) -> Spelling:
    """The places of a backbone's parameters in such a file.

    Args:
      spec: the backbone, which may be for another input size than the file was.
      shapes: {path: shape} of its parameters, layers unrolled.
      prefix: another prefix than the file's.

    Raises:
      errors.UserError: if the file had no such parameter.
    """
    family = self.table()
    places = {}
    for path, ours in shapes.items():
      layer, own = layer_of(path)
      found = self.leaves.get(path if layer is None else _BLOCK + own)
      if found is None:
        raise errors.UserError(
          f'The file that the backbone was converted from ({self.family}) has no {path}.'
        )
      name, shape, (i, n) = found
      if prefix is not None:
        name = prefix + name.removeprefix(self.prefix)
      if own == 'relative_bias':
        shape = ours
      elif own == 'pos_embedding':
        shape = (*shape[:-2], self.covered + math.prod(spec.grid), shape[-1])
      shape = (shape[0] // n, *shape[1:]) if n > 1 else shape
      name = name.replace('{i}', str(layer))
      places[path] = Place(name, shape, (i, n), layer if family.stacked else None)
    return Spelling(places, self.covered, family.jax)
