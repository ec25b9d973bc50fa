"""What the files beside the weights say of a backbone, in fields of `BackboneSpec`.

Number of heads, activation, epsilon of the norms, kind of rotary positions, pooling, input size and
input normalisation do not show in a checkpoint's shapes. Hubs put them into JSON files.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from losa_scenic.common_lib import errors
from losa_scenic.weights_lib import timm_architectures

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
  'gelu_fast': 'gelu_tanh',
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
  'vivit': {'activation': 'gelu_tanh', 'norm_eps': 1e-6, **HALF},
  'internvl': {'activation': 'gelu_erf', 'norm_eps': 1e-6},
  **{key: {'activation': 'gelu_erf', 'norm_eps': 1e-12} for key in ('vit', 'deit', 'beit')},
}
_TIMM_POOLS = {'token': 'cls', 'avg': 'gap', 'map': 'map'}
_OPEN_CLIP_POOLS = {'tok': 'cls', 'avg': 'gap'}
# Pillow's filters by their numbers.
_RESAMPLING = {0: 'nearest', 1: 'lanczos', 2: 'bilinear', 3: 'bicubic', 4: 'box', 5: 'hamming'}

# Family of names -> how the model types of its config.json begin; timm's have an 'architecture'.
_KINDS: dict[str, tuple[str, ...]] = {
  'timm': (),
  'transformers': ('vit', 'deit', 'beit', 'internvl', 'ijepa', 'data2vec-vision', 'vivit'),
  'transformers (DINOv2)': ('dinov2',),
  'transformers (CLIP, SigLIP)': ('clip', 'siglip', 'metaclip'),
  'transformers (DINOv3)': ('dinov3',),
  'transformers (AIMv2)': ('aimv2',),
  'AIMv2': ('aimv2',),
  'InternViT': ('intern_vit', 'internvl'),
  'open_clip': ('clip',),
}


def read(metadata: Mapping[str, Any], family: str, prefix: str) -> list[tuple[Fields, str]]:
  """Fields of `BackboneSpec` that the JSON files beside a checkpoint give, with the file's name.

  Args:
    metadata: contents of the files by name.
    family: name of the family of the weights.
    prefix: of the encoder's names.

  Raises:
    errors.UserError: for an architecture that this encoder does not have, a file that is not of the
      weights beside it, or one that is not understood.
  """
  if family not in _KINDS:
    return []  # Projects without such files: what lies there is of something else.
  metadata = {name: _without_nulls(metadata[name]) for name in metadata if name.endswith('.json')}
  found = []
  for name, reader in _readers(metadata, family, prefix):
    try:
      found.append((reader(metadata[name]), name))
    except errors.UserError:
      raise
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as e:
      raise errors.UserError(f'{name} beside the weights is not understood: {e!r}.') from None
  return found


def _readers(
  metadata: Mapping[str, Any], family: str, prefix: str
) -> list[tuple[str, Callable[[Any], Fields]]]:
  """The files that are of these weights, with what reads them."""
  config = metadata.get('config.json')
  # Some folders hold a model twice, under transformers' names and under open_clip's.
  of_open_clip = family == 'open_clip' or prefix.startswith('visual.')
  if of_open_clip and 'open_clip_config.json' in metadata:
    return [('open_clip_config.json', _open_clip)]
  if config is None:
    return []
  if family == 'timm' and 'architecture' in config:
    return [('config.json', _timm)]
  kinds = [str(c.get('model_type', '')) for c in (config, config.get('vision_config', {}))]
  if not any(kind.startswith(start) for kind in kinds for start in _KINDS[family]):
    of = f"timm's {config['architecture']}" if 'architecture' in config else f"a '{kinds[0]}'"
    raise errors.UserError(
      f"config.json beside the weights is of {of}, but their names are those of '{family}': put "
      'them into a folder of their own, with the config.json that belongs to them, if there is one.'
    )
  readers: list[tuple[str, Callable[[Any], Fields]]] = [('config.json', _transformers)]
  if 'preprocessor_config.json' in metadata:
    readers.append(('preprocessor_config.json', _preprocessor))
  return readers


def _without_nulls(value: Any) -> Any:
  """The same without entries that are null: they say nothing."""
  if isinstance(value, Mapping):
    return {k: _without_nulls(v) for k, v in value.items() if v is not None}
  return value


def _timm(config: Mapping[str, Any]) -> Fields:
  fields = timm_architectures.fields_of(config['architecture'])
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
  if pool:
    fields['pool'] = _TIMM_POOLS[errors.one_of('global_pool of the checkpoint', pool, _TIMM_POOLS)]
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
    fields |= timm_architectures.fields_of(vision['timm_model_name'])
  else:
    gelu = 'quick_gelu' if model.get('quick_gelu', False) else 'gelu_erf'
    if vision.get('act_kwargs'):
      if vision['act_kwargs'] != {'approximate': 'tanh'}:
        raise errors.UserError(f"open_clip's act_kwargs {vision['act_kwargs']} are not known.")
      gelu = 'gelu_tanh'
    pool = vision.get('pool_type', 'tok')
    fields['pool'] = _OPEN_CLIP_POOLS[
      errors.one_of('pool_type of the checkpoint', pool, _OPEN_CLIP_POOLS)
    ]
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
  if not kind.startswith('dinov2'):  # It follows from mlp_ratio there.
    names['intermediate_size'] = 'mlp'
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
  for theirs, ours in (('image_size', 'image_size'), ('patch_size', 'patch')):
    if theirs in config:
      fields[ours] = _side(config[theirs])
  if kind == 'vivit':
    tubelet, *sides = config.get('tubelet_size', (2, 16, 16))
    fields |= {'frames': int(config.get('num_frames', 32)), 'tubelet': int(tubelet)}
    fields['patch'] = _side(sides)
  if kind.startswith('dinov3'):
    fields |= {'rope': 'dinov3', 'rope_theta': float(config.get('rope_theta', 100.0))}
  if kind == 'internvl_vision' or 'use_mean_pooling' in config:
    fields['pool'] = 'gap' if config.get('use_mean_pooling', True) else 'cls'
  return fields


def _preprocessor(config: Mapping[str, Any]) -> Fields:
  factor = config.get('rescale_factor', 1 / 255) if config.get('do_rescale', True) else 1.0
  centred = bool(config.get('offset'))  # ViViT's: pixels become x / 127.5 - 1 before all else.
  whole = 127.5 if centred else 255
  if not math.isclose(factor, 1 / whole, rel_tol=1e-3):
    raise errors.UserError(
      f'preprocessor_config.json multiplies pixels by {factor}, not by 1 / {whole}.'
    )
  if not config.get('do_normalize', True):
    config = {**config, 'image_mean': (0.0,) * 3, 'image_std': (1.0,) * 3}
  name = config.get('resample')
  if isinstance(name, int):
    errors.one_of('resample of the checkpoint', str(name), map(str, _RESAMPLING))
    name = _RESAMPLING[name]
  fields = _normalisation(config, 'image_mean', 'image_std', name)
  if centred:
    fields['mean'] = tuple((mean + 1) / 2 for mean in fields.get('mean', HALF['mean']))
    fields['std'] = tuple(std / 2 for std in fields.get('std', HALF['std']))
  return fields


def _normalisation(config: Mapping[str, Any], mean: str, std: str, filter_: str | None) -> Fields:
  fields: Fields = {}
  for ours, theirs in (('mean', mean), ('std', std)):
    if theirs in config:
      fields[ours] = tuple(float(value) for value in config[theirs])
  return fields | ({'interpolation': filter_} if filter_ else {})


def _activation(name: str) -> str:
  return _ACTIVATIONS[errors.one_of('activation of the checkpoint', name, _ACTIVATIONS)]


def _side(size: Any) -> int:
  size = list(size.values()) if isinstance(size, Mapping) else size
  sides = {int(s) for s in size} if isinstance(size, (list, tuple)) else {int(size)}
  if len(sides) > 1:
    raise errors.UserError(f'Only square inputs are known; the checkpoint has {list(size)}.')
  return sides.pop()
