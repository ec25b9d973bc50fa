"""What the files beside the weights say of a backbone, in fields of `BackboneSpec`.

Number of heads, activation, epsilon of the norms, kind of rotary positions, pooling, input size and
input normalisation do not show in a checkpoint's shapes. Hubs put them into JSON files.
"""

import re
from collections.abc import Mapping
from typing import Any

from losa_scenic.common_lib import errors

Fields = dict[str, Any]

IMAGENET = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
HALF = {'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5)}
OPENAI = {
  'mean': (0.48145466, 0.4578275, 0.40821073),
  'std': (0.26862954, 0.26130258, 0.27577711),
}

_ACTIVATIONS = {
  'gelu': 'gelu_erf',
  'gelu_python': 'gelu_erf',
  'gelu_new': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'gelu_tanh': 'gelu_tanh',
  'quick_gelu': 'quick_gelu',
  'silu': 'silu',
  'swish': 'silu',
  'relu': 'relu',
}
# What transformers takes where a config.json does not say; by the beginning of the model type.
_DEFAULTS: dict[str, Fields] = {
  'clip': {'activation': 'quick_gelu', 'norm_eps': 1e-5},
  'siglip': {'activation': 'gelu_tanh', 'norm_eps': 1e-6},
  'dinov2': {'activation': 'gelu_erf', 'norm_eps': 1e-6},
  'dinov3': {'activation': 'gelu_erf', 'norm_eps': 1e-5},
  'aimv2': {'activation': 'silu', 'norm_eps': 1e-5},
  'internvl': {'activation': 'gelu_erf', 'norm_eps': 1e-6},
  **{key: {'activation': 'gelu_erf', 'norm_eps': 1e-12} for key in ('vit', 'deit', 'beit')},
}
_TIMM_POOLS = {'token': 'cls', 'avg': 'gap', 'map': 'map', '': 'cls'}
# Pillow's filters by their numbers.
_RESAMPLING = {0: 'nearest', 1: 'lanczos', 2: 'bilinear', 3: 'bicubic', 4: 'box', 5: 'hamming'}

# timm's architectures by name: all rows that match hold, the later ones before the earlier ones.
_TIMM: tuple[tuple[str, Fields], ...] = (
  ('', {'activation': 'gelu_erf', 'norm_eps': 1e-6, 'rope': 'none', 'block_norm': 'pre'}),
  ('_tiny_', {'heads': 3}),
  ('_small_', {'heads': 6}),
  ('_base_', {'heads': 12}),
  ('_large_', {'heads': 16}),
  ('^aimv2_large', {'heads': 8}),
  ('^vit_.*_clip_', {'norm_eps': 1e-5}),
  ('^beit3_', {'norm_eps': 1e-5}),
  ('quickgelu', {'activation': 'quick_gelu'}),
  (
    'siglip.*_512|patch32_siglip|so400m_patch16_siglip|giantopt_patch16_siglip',
    {'activation': 'gelu_tanh'},
  ),
  ('^aimv2_', {'activation': 'silu', 'norm_eps': 1e-5}),
  ('giant_patch14.*(dinov2|tips)', {'activation': 'silu'}),
  (
    '^eva02_(tiny|small|base|large)|_rope_reg',
    {'rope': 'eva', 'rope_theta': 1e4, 'rope_grid': 16},
  ),
  ('^eva02_(tiny|small|base|large)', {'activation': 'silu'}),
  ('^eva02_enormous', {'block_norm': 'post'}),
  ('dinov3|lingbot', {'rope': 'dinov3', 'rope_theta': 100.0, 'norm_eps': 1e-5}),
  ('_plus_.*dinov3|7b.*dinov3|giant.*lingbot', {'activation': 'silu'}),
)
_TIMM_UNKNOWN = re.compile('_pe_|_rpn_|_18x2_|_xp_|pwee_|_rope_(mixed|ape|224)|naflex')

# Widths of published models whose heads have 64 channels, from vit_pwee to DINOv2's giant.
_WIDTHS_OF_64 = (192, 256, 320, 384, 512, 576, 640, 768, 832, 896, 1024, 1280, 1536)
# (width, depth, hidden channels of the MLP) -> heads, where a head has not 64 channels.
_HEADS = {
  (1280, 32, 5120): 16,
  (1408, 40, 6144): 16,
  (1664, 48, 8192): 16,
  (1792, 56, 15360): 16,
  (1792, 64, 15360): 16,
  (1152, 27, 4304): 16,
  (1536, 40, 6144): 16,
  (1536, 48, 6144): 16,
  (1024, 24, 2816): 8,
  (1536, 24, 4096): 12,
  (2048, 24, 5632): 16,
  (3072, 24, 8192): 24,
  (3200, 45, 12800): 25,
  (3200, 48, 12800): 25,
  (4096, 40, 8192): 32,
}


def heads_of(width: int, depth: int, mlp: int) -> int | None:
  """Heads of a published geometry, or None."""
  if (width, depth, mlp) in _HEADS:
    return _HEADS[width, depth, mlp]
  return width // 64 if width in _WIDTHS_OF_64 and depth >= 10 else None


def read(metadata: Mapping[str, Any], *, of_open_clip: bool = False) -> list[tuple[Fields, str]]:
  """Fields of `BackboneSpec` that the JSON files beside a checkpoint give, with the file's name.

  Args:
    metadata: contents of the files by name.
    of_open_clip: whether the weights have open_clip's names.

  Raises:
    errors.UserError: for an architecture that this encoder does not have.
  """
  config = metadata.get('config.json', {})
  # Some folders hold a model twice, under transformers' names and under open_clip's.
  if 'open_clip_config.json' in metadata and (of_open_clip or not config):
    return [(_open_clip(metadata['open_clip_config.json']), 'open_clip_config.json')]
  if 'architecture' in config:
    return [(_timm(config), 'config.json')]
  found = [(_transformers(config), 'config.json')] if 'model_type' in config else []
  preprocessor = metadata.get('preprocessor_config.json', {})
  return [*found, (_preprocessor(preprocessor), 'preprocessor_config.json')]


def of_timm_architecture(name: str) -> Fields:
  """Fields that timm's registered architecture of that name sets.

  Raises:
    errors.UserError: for one whose blocks this encoder does not have.
  """
  if _TIMM_UNKNOWN.search(name):
    raise errors.UserError(f"timm's architecture '{name}' has blocks that this encoder has not.")
  fields: Fields = {}
  for pattern, more in _TIMM:
    if re.search(pattern, name):
      fields |= more
  return fields


def _timm(config: Mapping[str, Any]) -> Fields:
  fields = of_timm_architecture(config['architecture'])
  arguments, preprocessing = config.get('model_args', {}), config.get('pretrained_cfg', config)
  names = {'num_heads': 'heads', 'embed_dim': 'width', 'depth': 'depth'}
  names['ref_feat_shape'] = 'rope_grid'
  for theirs, ours in names.items():
    if theirs in arguments:
      fields[ours] = _side(arguments[theirs])
  if 'rope_temperature' in arguments:
    fields['rope_theta'] = float(arguments['rope_temperature'])
  if isinstance(arguments.get('act_layer'), str):
    fields['activation'] = _activation(arguments['act_layer'])
  fields |= _eva_arguments(arguments)
  pool = config.get('global_pool', arguments.get('global_pool'))
  if pool in _TIMM_POOLS:
    fields['pool'] = _TIMM_POOLS[pool]
  if 'img_size' in arguments:
    fields['image_size'] = _side(arguments['img_size'])
  elif 'input_size' in preprocessing:
    fields['image_size'] = _side(preprocessing['input_size'][1:])
  return fields | _normalisation(preprocessing, 'mean', 'std', preprocessing.get('interpolation'))


def _eva_arguments(arguments: Mapping[str, Any]) -> Fields:
  """What arguments of timm's Eva class change of an architecture."""
  fields: Fields = {}
  if 'swiglu_mlp' in arguments:
    fields['activation'] = 'silu' if arguments['swiglu_mlp'] else 'gelu_erf'
  if 'use_post_norm' in arguments:
    fields['block_norm'] = 'post' if arguments['use_post_norm'] else 'pre'
  if not arguments.get('use_rot_pos_emb', True):
    fields['rope'] = 'none'
  elif 'rope_type' in arguments:
    kinds = {'cat': 'eva', 'dinov3': 'dinov3'}
    fields['rope'] = kinds[
      errors.one_of('rope_type of the checkpoint', arguments['rope_type'], kinds)
    ]
  return fields


def _open_clip(config: Mapping[str, Any]) -> Fields:
  model = config.get('model_cfg', config)
  vision, preprocessing = model.get('vision_cfg', {}), config.get('preprocess_cfg', {})
  fields: Fields = {'image_size': _side(vision.get('image_size', 224))}
  if 'timm_model_name' in vision:
    fields |= of_timm_architecture(vision['timm_model_name'])
  else:
    gelu = 'quick_gelu' if model.get('quick_gelu', False) else 'gelu_erf'
    eps = vision.get('norm_kwargs', {}).get('eps', 1e-5)
    fields |= {'activation': gelu, 'norm_eps': eps, 'rope': 'none', 'block_norm': 'pre'}
    fields['heads'] = vision['width'] // vision.get('head_width', 64)
    for refused in ('attentional_pool', 'final_ln_after_pool', 'no_ln_pre'):
      if vision.get(refused):
        raise errors.UserError(f'open_clip models with {refused} are not read.')
  return fields | _normalisation(preprocessing, 'mean', 'std', preprocessing.get('interpolation'))


def _transformers(config: Mapping[str, Any]) -> Fields:
  kind = str(config['model_type'])
  defaults = next((d for start, d in _DEFAULTS.items() if kind.startswith(start)), {})
  if isinstance(config.get('vision_config'), Mapping):
    config = {'model_type': kind, **config['vision_config']}
  fields: Fields = {'rope': 'none', 'block_norm': 'pre', **defaults}
  names = {'hidden_size': 'width', 'num_hidden_layers': 'depth', 'num_register_tokens': 'registers'}
  for theirs, ours in names.items():
    if theirs in config:
      fields[ours] = int(config[theirs])
  if 'num_attention_heads' in config:
    fields['heads'] = int(config['num_attention_heads'])
  if 'hidden_act' in config:
    fields['activation'] = _activation(config['hidden_act'])
  if config.get('use_swiglu_ffn'):
    fields['activation'] = 'silu'
  for theirs in ('layer_norm_eps', 'rms_norm_eps'):
    if theirs in config:
      fields['norm_eps'] = float(config[theirs])
  if 'image_size' in config:
    fields['image_size'] = _side(config['image_size'])
  if kind.startswith('dinov3'):
    fields |= {'rope': 'dinov3', 'rope_theta': float(config.get('rope_theta', 100.0))}
  if kind == 'internvl_vision' or 'use_mean_pooling' in config:
    fields['pool'] = 'gap' if config.get('use_mean_pooling', True) else 'cls'
  return fields


def _preprocessor(config: Mapping[str, Any]) -> Fields:
  resample = config.get('resample')
  name = _RESAMPLING.get(resample) if isinstance(resample, int) else resample
  return _normalisation(config, 'image_mean', 'image_std', name)


def _normalisation(config: Mapping[str, Any], mean: str, std: str, filter_: str | None) -> Fields:
  fields: Fields = {}
  for ours, theirs in (('mean', mean), ('std', std)):
    if theirs in config:
      fields[ours] = tuple(float(value) for value in config[theirs])
  return fields | ({'interpolation': filter_} if filter_ else {})


def _activation(name: str) -> str:
  return _ACTIVATIONS[errors.one_of('activation of the checkpoint', name, _ACTIVATIONS)]


def _side(size: Any) -> int:
  sides = {int(s) for s in size} if isinstance(size, (list, tuple)) else {int(size)}
  if len(sides) > 1:
    raise errors.UserError(f'Only square inputs are known; the checkpoint has {list(size)}.')
  return sides.pop()
