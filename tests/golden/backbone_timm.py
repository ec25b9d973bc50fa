"""Cases made by timm: its own models, saved as timm saves for the hub."""

import json
import pathlib

import timm
import timm.layers
import timm.models
import torch
from backbone_common import Golden, randomize, store_as

LIBRARY = f'timm {timm.__version__}'
_ACTIVATIONS = {
  torch.nn.GELU: 'gelu_erf',
  timm.layers.GELU: 'gelu_erf',
  timm.layers.GELUTanh: 'gelu_tanh',
  timm.layers.QuickGELU: 'quick_gelu',
  torch.nn.SiLU: 'silu',
}
_TINY = {'embed_dim': 24, 'depth': 2, 'num_heads': 2, 'mlp_ratio': 1.1, 'num_classes': 3}


def _sized(patch, grid, **kwargs):
  return {**_TINY, 'patch_size': patch, 'img_size': patch * grid, **kwargs}


# Saved in float32; the others in float16, to keep the files small. Both occur on the hub.
FULL = ('timm_vit_augreg',)
# Case -> (architecture.tag, arguments, what is special).
CASES = {
  'timm_vit_augreg': ('vit_base_patch16_224.augreg_in21k', _sized(5, 3), 'plain'),
  'timm_vit_so150m2': (
    'vit_so150m2_patch16_reg1_gap_256.sbb_e200_in12k',
    _sized(4, 3),
    'no qkv bias, layer scale, a register with a position',
  ),
  'timm_vit_reg_gap': (
    'vit_betwixt_patch16_reg4_gap_256.sbb_in1k',
    _sized(4, 4, num_heads=3),
    'registers, no class token, positions of patches only, layer scale, norm after pooling',
  ),
  'timm_vit_gap': (
    'vit_giant_patch16_gap_224.in22k_ijepa',
    _sized(4, 3),
    'I-JEPA: norm before pooling; no class token',
  ),
  'timm_vit_rope_reg': (
    'vit_medium_patch16_rope_reg1_gap_256.sbb_in1k',
    _sized(4, 3, num_heads=3, ref_feat_shape=16),
    'eva.py: rope, a register, no learned positions',
  ),
  'timm_deit': ('deit_tiny_patch16_224.fb_in1k', _sized(4, 3), 'plain'),
  'timm_deit_distilled': (
    'deit_tiny_distilled_patch16_224.fb_in1k',
    _sized(4, 3, num_heads=3),
    'distillation token; pooled is the mean of both normed tokens',
  ),
  'timm_deit3': (
    'deit3_small_patch16_224.fb_in1k',
    _sized(4, 3, depth=3),
    'layer scale, no position of the class token',
  ),
  'timm_vit_clip': (
    'vit_huge_patch14_clip_224.laion2b',
    _sized(5, 3, num_heads=3),
    'norm before the first block, no patch bias',
  ),
  'timm_vit_clip_quickgelu': (
    'vit_base_patch16_clip_quickgelu_224.openai',
    _sized(4, 3),
    'quick_gelu',
  ),
  'timm_siglip': (
    'vit_so400m_patch14_siglip_224.v2_webli',
    _sized(4, 3, mlp_ratio=1.22),
    'map head',
  ),
  'timm_siglip_tanh': (
    'vit_giantopt_patch16_siglip_256.v2_webli',
    _sized(4, 3),
    'map head, tanh GELU',
  ),
  'timm_dinov2': ('vit_small_patch14_dinov2.lvd142m', _sized(4, 4), 'layer scale'),
  'timm_dinov2_reg_swiglu': (
    'vit_giant_patch14_reg4_dinov2.lvd142m',
    _sized(4, 3, mlp_ratio=2.09, num_heads=3),
    'packed SwiGLU, registers, no position of the class token',
  ),
  'timm_dinov3': (
    'vit_small_patch16_dinov3.lvd1689m',
    _sized(4, 3, num_heads=3),
    "rope; no qkv bias; timm's own default pooling is avg",
  ),
  'timm_dinov3_swiglu': (
    'vit_small_plus_patch16_dinov3_qkvb.lvd1689m',
    _sized(4, 3, global_pool='token'),
    'rope, SwiGLU in two linears, biases of query and value',
  ),
  'timm_eva_giant_clip': ('eva_giant_patch14_clip_224.laion400m', _sized(4, 3), 'no key bias'),
  'timm_eva02_tiny': (
    'eva02_tiny_patch14_224.mim_in22k',
    _sized(4, 4, num_heads=3),
    'rope, fused qkv, packed SwiGLU',
  ),
  'timm_eva02_base': (
    'eva02_base_patch14_448.mim_in22k_ft_in22k_in1k',
    _sized(4, 4),
    'rope, separate query, key and value, SwiGLU with a norm',
  ),
  'timm_eva02_base_clip': (
    'eva02_base_patch16_clip_224.merged2b',
    _sized(4, 3),
    'as eva02_base, and a norm inside attention',
  ),
  'timm_eva02_enormous_clip': (
    'eva02_enormous_patch14_clip_224.laion2b_plus',
    _sized(4, 3),
    'norms after the branches',
  ),
  'timm_beitv2': (
    'beitv2_base_patch16_224.in1k_ft_in22k',
    _sized(4, 3, num_heads=3),
    'relative positions; norm after pooling',
  ),
  'timm_beit3': (
    'beit3_base_patch16_224.in22k_ft_in1k',
    _sized(4, 3),
    'norms inside attention and MLP; pooled by mean, then normed',
  ),
  'timm_mae': ('vit_base_patch16_224.mae', _sized(4, 3, num_classes=0), 'no classifier'),
  'timm_aimv2': (
    'aimv2_large_patch14_224.apple_pt',
    _sized(4, 3, num_classes=0),
    'RMS norms, also of the patches, SwiGLU, no biases',
  ),
  'timm_intern300m': (
    'vit_intern300m_patch14_448.ogvl_dist',
    _sized(4, 3, num_classes=0),
    'layer scale, no final norm',
  ),
}


def _is(module) -> bool:
  """Whether there is such a module or parameter."""
  return module is not None and not isinstance(module, torch.nn.Identity)


def _mlp(mlp) -> dict:
  if hasattr(mlp, 'fc1_g'):
    hidden, gated = mlp.fc1_g.out_features, True
  else:
    gated = isinstance(mlp, timm.layers.GluMlp)
    hidden = mlp.fc1.out_features // (2 if gated else 1)
  return {'mlp': hidden, 'gated': gated, 'activation': _ACTIVATIONS[type(mlp.act)]}


def _qkv_bias(attn) -> str:
  if getattr(attn, 'q_proj', None) is not None:
    has = {k: getattr(attn, f'{k}_proj').bias is not None for k in 'qkv'}
    return ''.join(k for k in 'qkv' if has[k]) or 'none'
  if getattr(attn, 'q_bias', None) is not None:
    return 'qv'
  return 'none' if attn.qkv.bias is None else 'qkv'


def _rope(model) -> dict:
  rope = getattr(model, 'rope', None)
  if rope is None:
    return {}
  if isinstance(rope, timm.layers.RotaryEmbeddingDinoV3):
    return {'rope': 'dinov3', 'rope_theta': float(rope.temperature)}
  assert isinstance(rope, timm.layers.RotaryEmbeddingCat)
  return {
    'rope': 'eva',
    'rope_theta': float(rope.temperature),
    'rope_grid': int(rope.ref_feat_shape[0]),
  }


def fields(model) -> dict:
  """What a timm model is, read off its modules."""
  block = model.blocks[0]
  attn, distilled = block.attn, hasattr(model, 'dist_token')
  pools = {'token': 'cls_dist' if distilled else 'cls', 'avg': 'gap', 'map': 'map'}
  final = [
    k for k, name in (('tokens', 'norm'), ('pooled', 'fc_norm')) if _is(getattr(model, name, None))
  ]
  assert len(final) <= 1
  if model.global_pool == 'map':
    assert type(model.attn_pool.mlp.act) is type(block.mlp.act)
  return {
    'width': model.embed_dim,
    'depth': len(model.blocks),
    'heads': attn.num_heads,
    **_mlp(block.mlp),
    'patch': model.patch_embed.patch_size[0],
    'image_size': model.patch_embed.img_size[0],
    'pool': pools[model.global_pool],
    'class_token': model.cls_token is not None,
    'registers': model.num_prefix_tokens - (model.cls_token is not None),
    'norm': 'rms' if isinstance(block.norm1, timm.layers.RmsNorm) else 'layer',
    'norm_eps': block.norm1.eps,
    'block_norm': 'post' if type(block).__name__ == 'EvaBlockPostNorm' else 'pre',
    'final_norm': final[0] if final else 'none',
    'patch_norm': _is(model.patch_embed.norm),
    'pre_norm': _is(getattr(model, 'norm_pre', None)),
    'attn_norm': _is(getattr(attn, 'norm', None)),
    'mlp_norm': _is(getattr(block.mlp, 'norm', None)),
    'qk_norm': 'head' if _is(getattr(attn, 'q_norm', None)) else 'none',
    'layer_scale': _is(getattr(block, 'ls1', getattr(block, 'gamma_1', None))),
    'patch_bias': model.patch_embed.proj.bias is not None,
    'qkv_bias': _qkv_bias(attn),
    'linear_bias': attn.proj.bias is not None,
    'positions': 'none' if model.pos_embed is None else 'learned',
    **_rope(model),
    'relative_positions': hasattr(attn, 'relative_position_bias_table')
    or getattr(model, 'rel_pos_bias', None) is not None,
  }


def golden(model, **kwargs) -> Golden:
  """A timm model and how it is read."""

  def pooled(images):
    return model.forward_head(model.forward_features(images), pre_logits=True)

  return Golden(model, model.blocks, pooled, **kwargs)


def make(folder: pathlib.Path, name: str) -> Golden:
  """Builds a case's model, saves it and reads its description."""
  architecture, args, special = CASES[name]
  model = timm.create_model(architecture, **args).eval()
  dtype = torch.float32 if name in FULL else torch.float16
  randomize(model, name, dtype)
  store_as(model, dtype)
  timm.models.save_for_hf(model, folder, safe_serialization=True)
  config = json.loads((folder / 'config.json').read_text())
  says = config['pretrained_cfg']
  found = fields(model) | {k: says[k] for k in ('mean', 'std', 'interpolation')}
  by_name = ['norm_eps', 'activation']
  by_name += [k for k in ('rope', 'rope_theta', 'rope_grid') if found.get('rope') and k in found]
  by_name = [k for k in by_name if not (k == 'rope_grid' and 'ref_feat_shape' in args)]
  about = (LIBRARY, config['architecture'], special)
  return golden(model, fields=found, by_family=tuple(by_name), about=about)
