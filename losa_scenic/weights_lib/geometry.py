"""The `BackboneSpec` of a checkpoint: from names and shapes, the files beside it, and conventions.

Each field remembers where it is from. A convention is what the published checkpoints of a kind have
in common; where they differ and nothing tells, that is an error that says how to give the field.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from losa_scenic.common_lib import errors
from losa_scenic.model_lib.spec import BackboneSpec
from losa_scenic.weights_lib import evidence, timm_architectures
from losa_scenic.weights_lib.evidence import Fields
from losa_scenic.weights_lib.families import (
  CLIP_TRANSFORMERS,
  DINOV2_TRANSFORMERS,
  INTERNVIT,
  OPEN_CLIP,
  TIMM,
)
from losa_scenic.weights_lib.mapping import Layout
from losa_scenic.weights_lib.shapes import Shapes
from losa_scenic.weights_lib.tensors import Tensor

# What a user may want otherwise than a checkpoint says.
MAY_DIFFER = ('pool', 'mean', 'std', 'interpolation', 'position_resize')


@dataclasses.dataclass(frozen=True)
class Described:
  """A spec and where its fields are from.

  Attributes:
    spec: the geometry of the checkpoint.
    origins: field -> 'shapes', the name of a JSON file, 'convention' or 'given'.
  """

  spec: BackboneSpec
  origins: Mapping[str, str]


def describe(
  name: str,
  layout: Layout,
  tensors: Mapping[str, Tensor],
  metadata: Mapping[str, Any],
  given: Fields | None = None,
) -> Described:
  """The spec of a checkpoint.

  Args:
    name: of the backbone, for people.
    layout: what its tensors are.
    tensors: its tensors.
    metadata: contents of the JSON files beside it.
    given: fields of `BackboneSpec` that the user states; they count before everything else but
      what shapes say.

  Raises:
    errors.UserError: if a field is unknown, contradicts the shapes, or cannot be known.
  """
  shapes = Shapes(layout, tensors)
  found = shapes.fields()
  beside = evidence.read(metadata, layout.family.name, layout.prefix)
  conventions = _conventions(layout, tensors, found)
  fields: Fields = {'name': name}
  origins: dict[str, str] = {}
  for values, origin in (
    (conventions, 'convention'),
    *beside,
    ({k: tuple(v) if isinstance(v, list) else v for k, v in (given or {}).items()}, 'given'),
    (found, 'shapes'),
  ):
    for field, value in values.items():
      errors.one_of('backbone field', field, (f.name for f in dataclasses.fields(BackboneSpec)))
      stated = origins.get(field, 'convention')
      if origin == 'shapes' and stated != 'convention' and fields[field] != value:
        raise errors.UserError(
          f'{field}={fields[field]} ({stated}) contradicts the shapes of the checkpoint: {value}.'
        )
      known = stated != 'convention' and field not in MAY_DIFFER
      if origin == 'given' and known and fields[field] != value:
        raise errors.UserError(
          f'{field}={value} contradicts {stated} of the checkpoint: {fields[field]}.'
        )
      fields[field], origins[field] = value, origin
  _decide_heads(fields, origins)
  _decide_pool(fields, origins, layout)
  _check_map_pool(fields, layout, metadata)
  undecided = [field for field, value in fields.items() if value is None]
  if 'frames' in undecided:
    raise errors.UserError(
      'The weights are of clips, and do not say of how many frames: put the config.json of their '
      'model beside them.'
    )
  if undecided:
    positions = (
      f'It has no {layout.expected_name("pos_embedding")}. ' if 'rope' in undecided else ''
    )
    raise errors.UserError(
      f'{positions}The checkpoint does not say {", ".join(undecided)}, and published ones of its '
      'kind differ. Put the config.json of its model beside it, or say it: '
      f'--config.backbone_configs.{undecided[0]}=... of a run, --set {undecided[0]}=... of convert.'
    )
  return Described(BackboneSpec(**_with_side(fields, origins, shapes)), origins)


def _with_side(fields: Fields, origins: dict[str, str], shapes: Shapes) -> Fields:
  """Fields with the image size, which the number of positions gives."""
  prefix = int(fields['class_token']) + fields['registers']
  times = max(fields.get('frames', 0) // fields['tubelet'], 1)
  side = shapes.side(prefix, fields.get('image_size', 0) // fields['patch'], times)
  if side is not None:
    size = side * fields['patch']
    if origins.get('image_size') == 'given' and fields['image_size'] != size:
      raise errors.UserError(
        f'image_size={fields["image_size"]} contradicts the checkpoint, whose positions are for '
        f'{size}: resize it when it is used.'
      )
    origins['image_size'] = 'shapes'
    return fields | {'image_size': size}
  if fields.get('image_size', 0) % fields['patch']:
    fields = fields | {'image_size': fields['patch'] * (fields['image_size'] // fields['patch'])}
  return fields


def _decide_heads(fields: Fields, origins: dict[str, str]) -> None:
  if 'heads' not in fields:
    fields['heads'] = timm_architectures.heads_of(
      fields['width'], fields['depth'], fields['mlp'], fields['gated']
    )
    origins['heads'] = 'convention'


def _decide_pool(fields: Fields, origins: dict[str, str], layout: Layout) -> None:
  distilled = layout.name_of('registers').rsplit('.', 1)[-1] in (
    'dist_token',
    'distillation_token',
  )
  if fields.get('pool') == 'map' and 'map_head/probe' not in layout.origins:
    del fields['pool']
  if fields.get('pool') == 'cls' and distilled:
    fields['pool'] = 'cls_dist'
  if 'pool' not in fields:
    origins['pool'] = 'convention'
    if 'map_head/probe' in layout.origins:
      fields['pool'] = 'map'
    elif fields['final_norm'] == 'pooled' or not fields['class_token']:
      fields['pool'] = 'gap'
    else:
      fields['pool'] = 'cls_dist' if distilled else 'cls'


def _check_map_pool(fields: Fields, layout: Layout, metadata: Mapping[str, Any]) -> None:
  """timm's attention pooling leaves out class token and registers, ours reads all tokens."""
  arguments = metadata.get('config.json', {}).get('model_args') or {}
  prefix = int(fields['class_token']) + fields['registers']
  if fields['pool'] != 'map' or not prefix or layout.family is not TIMM:
    return
  if not arguments.get('pool_include_prefix'):
    raise errors.UserError(
      f"timm's attention pooling leaves out the {prefix} leading tokens of this checkpoint, which "
      'ours cannot: give another pooling (backbone_configs.pool, --set pool=...).'
    )


def _conventions(layout: Layout, tensors: Mapping[str, Tensor], found: Fields) -> Fields:
  """Fields that published checkpoints of this kind have in common; None where they differ."""
  family = layout.family
  names = {name.removeprefix(layout.prefix) for name in tensors}
  fields: Fields = {'norm_eps': 1e-6, 'activation': 'gelu_erf', 'rope': 'none'}
  fields |= {'block_norm': 'pre', 'image_size': 224, **evidence.IMAGENET}
  fields['position_resize'] = _position_resize(layout, tensors, found, names)
  fields |= {'activation': 'silu'} if found['gated'] else {}
  if len(tensors[layout.origins['patch/proj/kernel'].name].shape) == 5:
    fields['frames'] = None
  if family.jax:
    return fields | {'activation': 'gelu_tanh', **evidence.HALF}
  if 'map_head/probe' in layout.origins:
    fields |= {'activation': 'gelu_tanh', **evidence.HALF}
  elif found['pre_norm'] or family in (OPEN_CLIP, CLIP_TRANSFORMERS):
    fields |= {'activation': None, 'norm_eps': 1e-5, **evidence.OPENAI}
  if found['patch_norm']:
    fields |= {'norm_eps': 1e-5, **evidence.OPENAI}  # AIMv2
  if family is INTERNVIT:
    fields['pool'] = 'cls'
  elif 'encoder.layer.0.layernorm_before.weight' in names and found['final_norm'] != 'none':
    fields['norm_eps'] = 1e-12
  if family is TIMM:
    fields |= _timm_conventions(layout, tensors, found, names)
  if found['positions'] == 'none' and not found['relative_positions'] and fields['rope'] == 'none':
    fields['rope'] = None  # No ViT is without positions.
  return fields


def _position_resize(
  layout: Layout, tensors: Mapping[str, Tensor], found: Fields, names: set[str]
) -> str:
  """How the family resamples positions, or, of three kinds, the model."""
  patch = tensors[layout.origins['patch/proj/kernel'].name]
  if len(patch.shape) == 2:
    return 'bilinear_antialias'  # SigLIP 2 NaFlex.
  if layout.family is DINOV2_TRANSFORMERS and found['registers']:
    return 'bicubic_antialias'
  if layout.family is TIMM and 'mask_token' in names and found['layer_scale']:
    # DINOv2's own files: timm's have no mask token.
    return 'bicubic_antialias' if found['registers'] else 'bicubic_offset'
  return layout.family.resize


def _timm_conventions(
  layout: Layout, tensors: Mapping[str, Tensor], found: Fields, names: set[str]
) -> Fields:
  """Files without timm's config.json: its own, and those that the authors of a model published."""
  fields: Fields = {}
  periods = next((name for name in names if name.endswith('rope_embed.periods')), None)
  if periods or 'storage_tokens' in names:
    fields = {'rope': 'dinov3', 'rope_theta': 100.0, 'norm_eps': 1e-5}
    if periods:
      fields['heads'] = found['width'] // (4 * tensors[layout.prefix + periods].shape[0])
    # Of L and 7B there are those of photos and those of satellite images.
    return fields | (_UNKNOWN_INPUT if found['width'] in (1024, 4096) else {})
  if found['pre_norm'] and 'map_head/probe' in layout.origins:
    raise errors.UserError('Perception Encoder checkpoints (vit_pe_*) are not read.')
  if found['qkv_bias'] == 'qv' and not found['relative_positions'] and not found['registers']:
    # EVA-CLIP and EVA-02.
    if found['gated']:
      return {'rope': 'eva', 'rope_theta': 1e4, 'rope_grid': 16, **evidence.OPENAI}
    post = {(1792, 64): 'post', (1408, 40): 'pre'}.get((found['width'], found['depth']))
    return {'block_norm': post, **evidence.OPENAI}
  if 'blocks.0.gamma_1' in names and not found['relative_positions']:
    fields['rope'] = (
      None  # timm's ViTs with rotary positions are named so, with and without others.
    )
  if found['attn_norm']:
    fields['norm_eps'] = 1e-5  # BEiT-3
  if not found['class_token'] and not found['gated'] and 'map_head/probe' not in layout.origins:
    fields['activation'] = None
  marked = ('mask_token', 'dist_token', 'register_tokens', 'decoder_embed.weight')
  known = found['patch_norm'] or found['pre_norm'] or 'map_head/probe' in layout.origins
  if not known and (found['relative_positions'] or not names.intersection(marked)):
    fields |= _UNKNOWN_INPUT  # AugReg, BEiT and SigLIP have 0.5, DeiT, MAE and BEiT v2 ImageNet's.
  return fields


_UNKNOWN_INPUT: Fields = {'mean': None, 'std': None}
