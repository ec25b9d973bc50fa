"""config.json and preprocessor_config.json of timm and transformers for a backbone.

What `evidence` reads there, written: everything about a model that its weights do not say. timm
takes an argument that is None for one that was not given; transformers takes no integer for a
float, nor the reverse.
"""

from collections.abc import Mapping
from typing import Any

from losa_scenic.model_lib.spec import BackboneSpec
from losa_scenic.weights_lib import format_tables

Json = dict[str, Any]
_TIMM_ACTIVATIONS = {'gelu_erf': 'gelu'}  # The others have our names.
_HF_ACTIVATIONS = {'gelu_erf': 'gelu', 'gelu_tanh': 'gelu_pytorch_tanh'}
TIMM_POOLS = {'cls': 'token', 'cls_dist': 'token', 'gap': 'avg', 'map': 'map'}
# Pillow's numbers of its filters.
_RESAMPLING = {'nearest': 0, 'lanczos': 1, 'bilinear': 2, 'bicubic': 3, 'box': 4, 'hamming': 5}
# Layer scale exists where its initial value is given; weights that are loaded overwrite it.
_SOME = 1e-5
# What the preprocessing of an original says beside `BackboneSpec`'s fields.
_KEPT = ('crop_pct', 'crop_mode', 'license', 'origin_url', 'paper_name', 'paper_ids', 'tag')


def timm(
  spec: BackboneSpec, title: str, original: Mapping[str, Any], own: bool
) -> tuple[Json, list[str]]:
  """timm's config.json.

  Args:
    spec: the backbone.
    title: timm's class.
    original: the config.json of the file that it was converted from; {} if there is none.
    own: whether the names are that file's, so that its architecture holds them.

  Returns:
    The config, for create_model(architecture, **model_args), and what it cannot say.
  """
  size = [spec.image_size, spec.image_size]
  before = original.get('pretrained_cfg', original if 'architecture' in original else {})
  preprocessing = {
    **(before if own else {key: before[key] for key in _KEPT if key in before}),
    'custom_load': False,
    'input_size': [3, *size],
    'fixed_input_size': True,
    'interpolation': spec.interpolation,
    'mean': list(spec.mean),
    'std': list(spec.std),
    'num_classes': 0,
    'first_conv': 'patch_embed.proj',
    'classifier': ['head', 'head_dist'] if title == 'VisionTransformerDistilled' else 'head',
  }
  pool, remarks = TIMM_POOLS[spec.pool], []
  if own:
    architecture = original['architecture']
    arguments = {**original.get('model_args', {}), 'img_size': size, 'num_classes': 0}
    if 'global_pool' in original or 'global_pool' in arguments:
      arguments['global_pool'] = pool
  else:
    architecture, eps = _timm_architecture(spec, title)
    arguments = _timm_arguments(spec, title) | {'img_size': size, 'global_pool': pool}
    if spec.norm_eps != eps:
      remarks.append(
        f"timm's {architecture} has norm_eps={eps}, not {spec.norm_eps}; create_model takes "
        f'norm_layer=functools.partial(torch.nn.LayerNorm, eps={spec.norm_eps}).'
      )
  config = {
    'architecture': architecture,
    'num_classes': 0,
    'num_features': spec.width,
    'global_pool': pool,
    'model_args': arguments,
    'pretrained_cfg': preprocessing,
  }
  return config, remarks


def _timm_architecture(spec: BackboneSpec, title: str) -> tuple[str, float]:
  """A name that timm knows, of the class and with what arguments in JSON cannot say; its epsilon.

  That is the norm's epsilon, and the class of a gated MLP.
  """
  if title == 'Beit':
    return 'beit_base_patch16_224', 1e-6
  if title == 'VisionTransformerDistilled':
    return 'deit_base_distilled_patch16_224', 1e-6
  if title == 'Eva':
    if spec.layer_scale and spec.norm_eps > 3e-6:
      return f'vit_small_{"plus_" if spec.gated else ""}patch16_dinov3', 1e-5
    if spec.block_norm == 'post':
      return 'eva02_enormous_patch14_clip_224', 1e-6
    eva02 = spec.gated and spec.rope == 'eva'
    return ('eva02_base_patch14_224' if eva02 else 'eva_giant_patch14_224'), 1e-6
  if spec.gated:
    layer = spec.norm == 'layer'
    return ('vit_giant_patch14_dinov2', 1e-6) if layer else ('aimv2_large_patch14_224', 1e-5)
  if spec.norm == 'layer' and spec.norm_eps > 3e-6:
    return 'vit_base_patch16_clip_224', 1e-5
  return 'vit_base_patch16_224', 1e-6


def _ratio(spec: BackboneSpec, hidden: int) -> float:
  """A ratio that timm makes `hidden` of: it takes the integer part of width * ratio."""
  ratio = hidden / spec.width
  return ratio if int(spec.width * ratio) == hidden else (hidden + 0.5) / spec.width


def _timm_arguments(spec: BackboneSpec, title: str) -> Json:
  """Arguments of timm's class, every one that is about the geometry."""
  arguments: Json = {
    'patch_size': spec.patch,
    'embed_dim': spec.width,
    'depth': spec.depth,
    'num_heads': spec.heads,
    'mlp_ratio': _ratio(spec, spec.mlp),
    'qkv_bias': spec.qkv_bias != 'none',
    'init_values': _SOME if spec.layer_scale else 0,
    'num_classes': 0,
  }
  if title == 'Beit':
    return arguments | {
      'scale_mlp': spec.mlp_norm,
      'use_abs_pos_emb': spec.positions == 'learned',
      'use_rel_pos_bias': True,
      'use_fc_norm': spec.final_norm == 'pooled',
    }
  if title == 'VisionTransformerDistilled':
    return arguments | {'act_layer': _TIMM_ACTIVATIONS.get(spec.activation, spec.activation)}
  arguments |= {'class_token': spec.class_token, 'no_embed_class': False}
  if title == 'Eva' and not spec.layer_scale:
    del arguments[
      'init_values'
    ]  # This class scales by 0; its architectures without scale have none.
  return arguments | (_eva(spec) if title == 'Eva' else _vit(spec))


def _vit(spec: BackboneSpec) -> Json:
  packed = spec.gated and format_tables.packs(spec)
  kinds = {'layer': 'layernorm', 'rms': 'rmsnorm'}
  arguments: Json = {
    'mlp_ratio': _ratio(spec, 2 * spec.mlp if packed else spec.mlp),
    'reg_tokens': spec.registers,
    'pos_embed': 'learn' if spec.positions == 'learned' else 'none',
    'pre_norm': spec.pre_norm,
    'final_norm': spec.final_norm != 'none',
    'fc_norm': spec.final_norm == 'pooled',
    'qk_norm': spec.qk_norm == 'head',
    'scale_attn_norm': spec.attn_norm,
    'scale_mlp_norm': spec.mlp_norm,
    'proj_bias': spec.linear_bias,
    'act_layer': _TIMM_ACTIVATIONS.get(spec.activation, spec.activation),
  }
  if spec.pool == 'map' and spec.prefix:
    arguments['pool_include_prefix'] = True  # Our MAP head, as big_vision's, looks at all tokens.
  if spec.gated and spec.norm == 'rms':  # aimv2_*, which has both norms.
    return arguments if spec.patch_norm else arguments | {'embed_norm_layer': ''}
  if spec.norm == 'rms':
    arguments['norm_layer'] = kinds['rms']
  return arguments | ({'embed_norm_layer': kinds[spec.norm]} if spec.patch_norm else {})


def _eva(spec: BackboneSpec) -> Json:
  arguments: Json = {
    'num_reg_tokens': spec.registers,
    'qkv_fused': not format_tables.separates(spec),
    'attn_type': 'rope' if spec.qkv_bias == 'qkv' else 'eva',
    'qk_norm': spec.qk_norm == 'head',
    'swiglu_mlp': spec.gated,
    'swiglu_align_to': 0 if spec.mlp % 8 or format_tables.packs(spec) else 8,
    'scale_mlp': spec.mlp_norm,
    'scale_attn_inner': spec.attn_norm,
    'use_abs_pos_emb': spec.positions == 'learned',
    'use_rot_pos_emb': spec.rope != 'none',
    'rope_type': 'dinov3' if spec.rope == 'dinov3' else 'cat',
    'rope_rotate_half': spec.rope == 'dinov3',
    'dynamic_img_size': False,
    'use_post_norm': spec.block_norm == 'post',
    'use_pre_transformer_norm': spec.pre_norm,
    'use_post_transformer_norm': spec.final_norm == 'tokens',
    'use_fc_norm': spec.final_norm == 'pooled',
  }
  if spec.rope != 'none':
    arguments['rope_temperature'] = spec.rope_theta
  return arguments | ({'ref_feat_shape': spec.rope_grid} if spec.rope == 'eva' else {})


def transformers(
  spec: BackboneSpec, kind: str, title: str, dtype: str, original: Mapping[str, Any]
) -> tuple[Json, list[str]]:
  """transformers' config.json.

  Args:
    spec: the backbone.
    kind: transformers' `model_type`.
    title: its class.
    dtype: of the weights.
    original: the config.json of the file that the backbone was converted from, if the names are
      that file's; else {}.

  Returns:
    The config, and what it cannot say.
  """
  remarks = []
  if spec.pool != _pool_of(spec, kind):
    remarks.append(
      f"transformers' {title} does not pool by '{spec.pool}': do so with its last_hidden_state."
    )
  head = {'architectures': [title], 'model_type': kind, 'dtype': dtype}
  if original:
    config = dict(original.get('vision_config', original))
    side = config.get('image_size')
    if side is not None or kind != 'siglip2_vision_model':
      size = spec.image_size
      config['image_size'] = [size] * len(side) if isinstance(side, list) else size
    if 'num_patches' in config:
      config['num_patches'] = spec.grid[1] * spec.grid[2]
    config.pop('auto_map', None)
    return config | head, remarks
  config = {
    **head,
    'hidden_size': spec.width,
    'num_hidden_layers': spec.depth,
    'num_attention_heads': spec.heads,
    'intermediate_size': spec.mlp,
    'hidden_act': _HF_ACTIVATIONS.get(spec.activation, spec.activation),
    'layer_norm_eps': float(spec.norm_eps),
    'image_size': spec.image_size,
    'patch_size': spec.patch,
    'num_channels': 3,
    'qkv_bias': spec.qkv_bias != 'none',
  }
  return config | _of_kind(spec, kind), remarks


def _pool_of(spec: BackboneSpec, kind: str) -> str:
  """How a model pools itself, or what it is published to be pooled by."""
  if kind.startswith('siglip'):
    return 'map' if spec.pool == 'map' else 'gap'
  if kind == 'deit':
    return 'cls_dist'
  if kind == 'beit':
    return 'gap' if spec.final_norm == 'pooled' else 'cls'
  return 'gap' if kind in ('internvl_vision', 'aimv2_vision_model') else 'cls'


def _of_kind(spec: BackboneSpec, kind: str) -> Json:
  """Fields that one kind of model has, or means in its own way."""
  match kind:
    case 'dinov2' | 'dinov2_with_registers':
      registers = {'num_register_tokens': spec.registers} if spec.registers else {}
      ratio = format_tables.dinov2_ratio(spec)
      return {'mlp_ratio': ratio, 'use_swiglu_ffn': spec.gated, **registers}
    case 'dinov3_vit':
      biases = {f'{name}_bias': spec.has_bias(name) for name in ('query', 'key', 'value')}
      linear = dict.fromkeys(('proj_bias', 'mlp_bias'), spec.linear_bias)
      rope = {'rope_theta': float(spec.rope_theta), 'num_register_tokens': spec.registers}
      return {'use_gated_mlp': spec.gated, **biases, **linear, **rope}
    case 'siglip_vision_model' | 'siglip2_vision_model':
      return {'vision_use_head': spec.pool == 'map', 'num_patches': spec.grid[1] * spec.grid[2]}
    case 'beit':
      return {
        'layer_scale_init_value': 0.1 if spec.layer_scale else 0.0,
        'use_absolute_position_embeddings': spec.positions == 'learned',
        'use_relative_position_bias': spec.relative_positions,
        'use_shared_relative_position_bias': False,
        'use_mean_pooling': spec.final_norm == 'pooled',
      }
    case 'internvl_vision':
      return {
        'image_size': [spec.image_size] * 2,
        'patch_size': [spec.patch] * 2,
        'attention_bias': spec.qkv_bias == 'qkv',
        'use_qk_norm': spec.qk_norm == 'width',
        'norm_type': f'{spec.norm}_norm',
        'use_mean_pooling': True,
      }
    case 'aimv2_vision_model':
      return {'rms_norm_eps': float(spec.norm_eps), 'use_head': False, 'mlp_bias': False}
  return {}


def preprocessor(spec: BackboneSpec) -> Json:
  """transformers' preprocessor_config.json."""
  return {
    'image_processor_type': 'ViTImageProcessor',
    'do_resize': True,
    'size': {'height': spec.image_size, 'width': spec.image_size},
    'resample': _RESAMPLING[spec.interpolation],
    'do_rescale': True,
    'rescale_factor': 1 / 255,
    'do_normalize': True,
    'image_mean': list(spec.mean),
    'image_std': list(spec.std),
  }
