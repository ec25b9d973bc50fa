"""Backbone files: safetensors + JSON, verified by name, shape and hash; and the packaged ones.

A backbone named NAME is two files: `NAME.safetensors` holds the weights, layers stacked, in one
float dtype; `NAME.json` holds {format_version, name, spec, sha256, leaves, card}. The hash covers
paths, shapes, dtypes and bytes of all leaves, so a flipped bit or a swapped file is an error.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

from losa_scenic.common_lib import errors, trees
from losa_scenic.common_lib.types import Params
from losa_scenic.model_lib import presets

FORMAT_VERSION = 1
_PACKAGED = pathlib.Path(__file__).parent.parent / 'pretrained'


@dataclasses.dataclass(frozen=True)
class Backbone:
  """A backbone as a config names it.

  Attributes:
    spec: its geometry.
    path: its JSON file, or None if it is a preset and its weights are random.
    sha256: hash of the stored weights, or None for random ones.
  """

  spec: presets.BackboneSpec
  path: pathlib.Path | None = None
  sha256: str | None = None

  def identity(self) -> dict[str, Any]:
    """What a checkpoint of adapted parameters says about the backbone it belongs to."""
    return {'spec': self.spec.to_json(), 'sha256': self.sha256}


def packaged() -> list[str]:
  """Names of the pretrained backbones that ship with the package."""
  return sorted(path.stem for path in _PACKAGED.glob('*.json'))


def find(name: str, changes: Mapping[str, Any] | None = None) -> Backbone:
  """Looks a backbone up; reads its description, not its weights.

  Args:
    name: a packaged backbone, the path of a NAME.json or NAME.safetensors, or a preset such as
      'S/16', whose weights are random.
    changes: `BackboneSpec` fields to change: any for a preset; only 'pool' for stored weights.

  Raises:
    errors.UserError: if there is no such backbone, its files are damaged, or a change would need
      other weights.
  """
  changes = dict(changes or {})
  if name in packaged():
    path = _PACKAGED / f'{name}.json'
  elif name.endswith(('.json', '.safetensors')):
    path = pathlib.Path(name).with_suffix('.json')
  elif pathlib.Path(name).exists():
    raise errors.UserError(f'Backbone {name} is no NAME.json or NAME.safetensors file.')
  else:
    if name not in presets.names() and '/' not in name:
      raise errors.unknown('backbone', name, packaged() + presets.names())
    return Backbone(presets.preset(name, **changes))
  description = _read_description(path)
  spec = presets.BackboneSpec.from_json(description['spec'])
  for field in changes:
    if field != 'pool':
      raise errors.UserError(
        f"backbone_configs.{field} cannot change for stored weights ('{name}'); only 'pool' can."
      )
  if changes.get('pool') == 'map' and spec.pool != 'map':
    raise errors.UserError(f"Backbone '{name}' has no MAP head: its pooling cannot become 'map'.")
  return Backbone(dataclasses.replace(spec, **changes), path, description['sha256'])


def _read_description(path: pathlib.Path) -> dict[str, Any]:
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
  return description


def load(backbone: Backbone) -> dict[str, Any]:
  """Reads stored weights: numpy leaves in the stored dtype, layers stacked.

  Raises:
    errors.UserError: if a file is missing or damaged, or a name, shape, dtype or the hash is not
      the one that the description promises.
  """
  if backbone.path is None:
    raise ValueError('A preset has no stored weights.')
  description = _read_description(backbone.path)
  path = backbone.path.with_suffix('.safetensors')
  try:
    flat = safetensors_numpy.load_file(path)
  except FileNotFoundError:
    raise errors.UserError(f'There is no weights file {path}.') from None
  except (OSError, SafetensorError) as e:
    raise errors.UserError(f'Cannot read the weights file {path}: {e}') from None
  params = trees.unflatten(flat)
  differences = trees.differences(description['leaves'], trees.describe(params))
  if differences:
    raise errors.UserError('\n  '.join([f'{path} does not fit {backbone.path}:', *differences]))
  if trees.digest(params) != description['sha256']:
    raise errors.UserError(f'{path} is damaged: its hash is not the one in {backbone.path.name}.')
  if backbone.spec.pool != 'map':
    params.pop('map_head', None)  # Stored with a MAP head, asked for with another pooling.
  return params


def save(
  path: pathlib.Path,
  spec: presets.BackboneSpec,
  params: Params,
  dtype: str = 'float32',
  card: Mapping[str, Any] | None = None,
) -> Backbone:
  """Writes NAME.safetensors and NAME.json.

  Args:
    path: NAME.json or NAME.safetensors; its stem becomes the backbone's name.
    spec: geometry.
    params: the plain backbone's parameters, layers stacked.
    dtype: 'float32', 'bfloat16' or 'float16', the dtype of storage.
    card: what people should know: data, licence, recipe, accuracy.

  Returns:
    The backbone as `find` would return it.
  """
  path = path.with_suffix('.json')
  flat = {
    k: np.ascontiguousarray(np.asarray(v).astype(jnp.dtype(dtype)))
    for k, v in trees.flatten(params).items()
  }
  overflown = [name for name, leaf in flat.items() if not np.isfinite(leaf.astype('float32')).all()]
  if overflown:
    raise errors.UserError(f'{path}: not finite in {dtype}: {overflown[:5]}. Nothing is written.')
  stored = trees.unflatten(flat)
  spec = dataclasses.replace(spec, name=path.stem)
  description = {
    'format_version': FORMAT_VERSION,
    'name': path.stem,
    'spec': spec.to_json(),
    'sha256': trees.digest(stored),
    'leaves': trees.describe(stored),
    'card': dict(card or {}),
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  weights = path.with_suffix('.safetensors')
  safetensors_numpy.save_file(flat, weights)
  weights.chmod(0o644)  # safetensors makes files that only their owner can read.
  path.write_text(json.dumps(description, indent=1) + '\n')
  return Backbone(spec, path, description['sha256'])
