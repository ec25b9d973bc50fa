"""The models of timm, transformers, open_clip and big_vision that a backbone can be written for.

Read from timm 1.0.31, transformers 5.23 and open_clip 3.3.
"""

from collections.abc import Mapping
from typing import Any

from losa_scenic.model_lib.spec import BackboneSpec
from losa_scenic.weights_lib import families, flax_families
from losa_scenic.weights_lib.family import Family
from losa_scenic.weights_lib.formats import ANY, Format, Names


def packs(spec: BackboneSpec) -> bool:
  """Whether timm keeps gate and value of a gated MLP in one matrix."""
  if spec.rope == 'dinov3' and not spec.mlp % 8:
    return False
  return spec.gated and spec.norm == 'layer' and not spec.mlp_norm


def separates(spec: BackboneSpec) -> bool:
  """Whether timm's EVA keeps query, key and value apart: the larger EVA-02 do."""
  return spec.gated and spec.mlp_norm and spec.qkv_bias != 'qkv'


def _timm(spec: BackboneSpec) -> Names:
  names: dict[str, str | None] = {'query/bias': None, 'value/bias': None}
  if packs(spec):
    names |= {'gate': 'mlp.fc1[0/2]', 'fc1': 'mlp.fc1[1/2]'}
  elif not spec.gated:
    names['fc1'] = 'mlp.fc1'
  return names


def _timm_deit(spec: BackboneSpec) -> Names:
  return {**_timm(spec), 'registers': 'dist_token'}


def _timm_eva(spec: BackboneSpec) -> Names:
  names = {**_timm(spec), 'attn_scale': 'gamma_1', 'mlp_scale': 'gamma_2'}
  if separates(spec):
    return names | {'query': 'attn.q_proj', 'key': 'attn.k_proj', 'value': 'attn.v_proj'}
  if spec.qkv_bias == 'qv':
    names |= {'query/bias': 'attn.q_bias', 'value/bias': 'attn.v_bias'}
  return names


def _silu_where_gated(spec: BackboneSpec) -> str:
  if spec.gated and spec.activation != 'silu':
    return f'activation={spec.activation!r} of a gated MLP'
  return "pool='map' with a gated MLP" if spec.gated and spec.pool == 'map' else ''


def _bias_or_norm(spec: BackboneSpec) -> str:
  if spec.patch_bias == spec.pre_norm:
    return f'patch_bias={spec.patch_bias} with pre_norm={spec.pre_norm} (it has one of the two)'
  return ''


def _timm_vit_also(spec: BackboneSpec) -> str:
  if spec.gated and (spec.attn_norm or spec.mlp_norm):
    return 'attn_norm or mlp_norm with a gated MLP'
  if spec.norm == 'rms' and not spec.gated and spec.norm_eps != 1e-6:
    return f'RMS norms with norm_eps={spec.norm_eps} without a gated MLP'
  return _silu_where_gated(spec) or _bias_or_norm(spec)


def _timm_eva_also(spec: BackboneSpec) -> str:
  if spec.rope == 'none' and spec.block_norm == 'pre' and spec.qkv_bias != 'qv':
    return "rope='none' with block_norm='pre' and such qkv_bias: a plain ViT"
  if spec.block_norm == 'post' and (spec.layer_scale or spec.qk_norm != 'none'):
    return "layer scale or norms of queries where block_norm='post'"
  if spec.activation != ('silu' if spec.gated else 'gelu_erf'):
    return f'activation={spec.activation!r} with gated={spec.gated}'
  return _silu_where_gated(spec) or _bias_or_norm(spec)


_FREE_TOKENS = {'class_token': ANY, 'registers': ANY, 'positions': ANY, 'layer_scale': ANY}
_FREE_NORMS = {'pre_norm': ANY, 'attn_norm': ANY, 'mlp_norm': ANY, 'final_norm': ANY}
_TIMM_POOL = ('cls', 'gap', 'map')
_TIMM = (
  Format(
    'timm',
    families.TIMM,
    {'pool': ('cls', 'gap'), 'positions': ANY, 'layer_scale': ANY, 'mlp_norm': ANY}
    | {'qkv_bias': ('qv', 'none'), 'final_norm': ('tokens', 'pooled'), 'activation': ('gelu_erf',)}
    | {'relative_positions': (True,)},
    _timm_eva,
    title='Beit',
  ),
  Format(
    'timm',
    families.TIMM,
    {'pool': ('cls_dist',), 'registers': (1,), 'layer_scale': ANY},
    _timm_deit,
    title='VisionTransformerDistilled',
  ),
  Format(
    'timm',
    families.TIMM,
    {**_FREE_TOKENS, **_FREE_NORMS, 'pool': _TIMM_POOL, 'gated': ANY, 'block_norm': ANY}
    | {'qk_norm': ('none', 'head'), 'qkv_bias': ('qv', 'none', 'qkv'), 'rope': ANY}
    | {'patch_bias': ANY},
    _timm_eva,
    _timm_eva_also,
    title='Eva',
  ),
  Format(
    'timm',
    families.TIMM,
    {**_FREE_TOKENS, **_FREE_NORMS, 'pool': _TIMM_POOL, 'gated': ANY, 'norm': ANY}
    | {'qk_norm': ('none', 'head'), 'patch_norm': ANY, 'patch_bias': ANY, 'linear_bias': ANY},
    _timm,
    _timm_vit_also,
    title='VisionTransformer',
  ),
)


def _vit(spec: BackboneSpec) -> Names:
  del spec
  return dict.fromkeys(('attn_scale', 'mlp_scale', 'relative_bias', 'query_norm', 'key_norm'))


def _deit(spec: BackboneSpec) -> Names:
  return {**_vit(spec), 'registers': 'embeddings.distillation_token'}


def _internvl(spec: BackboneSpec) -> Names:
  del spec
  names = {name: f'attention.{name[0]}_proj' for name in ('query', 'key', 'value')}
  return names | {'out': 'attention.projection_layer', 'fc1': 'mlp.fc1', 'fc2': 'mlp.fc2'}


def _dinov2(spec: BackboneSpec) -> Names:
  return {} if spec.gated else {'fc1': 'mlp.fc1', 'fc2': 'mlp.fc2'}


def _dinov2_also(spec: BackboneSpec) -> str:
  if dinov2_ratio(spec) is None:
    kind = 'two thirds of ' if spec.gated else ''
    return f'mlp={spec.mlp}, which is not {kind}a multiple of the width {spec.width}'
  return _silu_where_gated(spec)


def dinov2_ratio(spec: BackboneSpec) -> int | None:
  """`mlp_ratio` of transformers' DINOv2 configs, an integer, or None if there is none."""
  for ratio in range(1, 17):
    hidden = spec.width * ratio
    if spec.mlp == ((int(hidden * 2 / 3) + 7) // 8 * 8 if spec.gated else hidden):
      return ratio
  return None


def _dinov2_registers_also(spec: BackboneSpec) -> str:
  return _dinov2_also(spec) if spec.registers else 'registers=0'


def _internvl_also(spec: BackboneSpec) -> str:
  if spec.qk_norm != 'none' and (spec.norm != 'rms' or spec.norm_eps != 1e-6):
    return f'norms of queries with norm={spec.norm!r}, norm_eps={spec.norm_eps}'
  return ''


def _transformers(
  kind: str, family: Family, title: str, holds: Mapping[str, Any], **more: Any
) -> Format:
  return Format(f'transformers:{kind}', family, holds, title=title, **more)


_HF, _DINO, _CLIP = (
  families.TRANSFORMERS,
  families.DINOV2_TRANSFORMERS,
  families.CLIP_TRANSFORMERS,
)
_DINO_HOLDS = {'layer_scale': (True,), 'gated': ANY}
_AIM_HOLDS = {'class_token': (False,), 'gated': (True,), 'norm': ('rms',), 'patch_norm': (True,)}
_TOWER = {'prefix': 'vision_model.'}
_NO_CLASS = {'class_token': (False,), 'qkv_bias': ('qkv',), 'pool': ('gap', 'map')}
# In the order in which 'transformers' tries them.
_TRANSFORMERS = (
  _transformers('vit', _HF, 'ViTModel', {}, names=_vit),
  _transformers('deit', _HF, 'DeiTModel', {'registers': (1,)}, names=_deit),
  _transformers('dinov2', _DINO, 'Dinov2Model', _DINO_HOLDS, names=_dinov2, also=_dinov2_also),
  _transformers(
    'dinov2_with_registers',
    _DINO,
    'Dinov2WithRegistersModel',
    {**_DINO_HOLDS, 'registers': ANY},
    names=_dinov2,
    also=_dinov2_registers_also,
    covered='class',
  ),
  _transformers(
    'dinov3_vit',
    families.DINOV3_TRANSFORMERS,
    'DINOv3ViTModel',
    {**_DINO_HOLDS, 'registers': ANY, 'positions': ('none',), 'rope': ('dinov3',)}
    | {'qkv_bias': ('none', 'qv', 'qkv'), 'linear_bias': ANY},
  ),
  _transformers(
    'clip_vision_model',
    _CLIP,
    'CLIPVisionModel',
    {'pre_norm': (True,), 'patch_bias': (False,), 'qkv_bias': ('qkv',), 'pool': ('cls', 'gap')},
    flat=('cls', 'pos_embedding'),
    **_TOWER,
  ),
  _transformers(
    'siglip_vision_model',
    _CLIP,
    'SiglipVisionModel',
    _NO_CLASS,
    flat=('pos_embedding',),
    **_TOWER,
  ),
  _transformers(
    'siglip2_vision_model',
    _CLIP,
    'Siglip2VisionModel',
    _NO_CLASS,
    flat=('pos_embedding', 'patch/proj/kernel'),
    **_TOWER,
  ),
  _transformers(
    'beit',
    _HF,
    'BeitModel',
    {'layer_scale': ANY, 'positions': ANY, 'relative_positions': ANY, 'qkv_bias': ('qv',)}
    | {'final_norm': ('tokens', 'pooled')},
  ),
  _transformers(
    'internvl_vision',
    _HF,
    'InternVLVisionModel',
    {'layer_scale': (True,), 'norm': ANY, 'qk_norm': ('none', 'width'), 'final_norm': ('none',)},
    names=_internvl,
    also=_internvl_also,
  ),
  _transformers(
    'aimv2_vision_model',
    families.AIMV2_TRANSFORMERS,
    'Aimv2VisionModel',
    {**_AIM_HOLDS, 'qkv_bias': ('none',), 'linear_bias': (False,)},
    flat=('pos_embedding',),
  ),
  _transformers('vit_mae', _HF, 'ViTMAEModel', {}, names=_vit),
)
_OPEN_CLIP = Format(
  'open_clip',
  families.OPEN_CLIP,
  {'pre_norm': (True,), 'patch_bias': (False,), 'qkv_bias': ('qkv',), 'layer_scale': ANY}
  | {'activation': ('gelu_erf', 'quick_gelu'), 'pool': ('cls',)},
  prefix='visual.',
  flat=('cls', 'pos_embedding'),
  title='VisionTransformer',
)
_BIG_VISION = Format(
  'big_vision',
  flax_families.BIG_VISION,
  {'class_token': ANY, 'qkv_bias': ('qkv',), 'pool': ('cls', 'gap', 'map')}
  | {'activation': ('gelu_tanh',), 'norm_eps': (1e-6,)},
  title='vit',
)

# What a user types -> the models that may hold a backbone, of which the first that can is taken.
FORMATS: dict[str, tuple[Format, ...]] = {
  'timm': _TIMM,
  'transformers': _TRANSFORMERS,
  **{kind.name: (kind,) for kind in _TRANSFORMERS},
  'open_clip': (_OPEN_CLIP,),
  'big_vision': (_BIG_VISION,),
}
