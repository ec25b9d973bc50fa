"""Cases made by transformers: its own models, saved by their save_pretrained."""

import json
import pathlib

import safetensors.torch
import torch
import transformers
from backbone_common import Golden, randomize, store_as
from backbone_pooling import cls, mean, mean_of_patches, naflex, pooler, two_tokens, unshuffled

LIBRARY = f'transformers {transformers.__version__}'
_SIZE = {'hidden_size': 24, 'intermediate_size': 26}
_TEXT = {
  'vocab_size': 11,
  'hidden_size': 8,
  'intermediate_size': 12,
  'num_hidden_layers': 1,
  'num_attention_heads': 1,
  'max_position_embeddings': 5,
  'bos_token_id': 0,
  'eos_token_id': 1,
  'pad_token_id': 2,
}
_ACTIVATIONS = {
  'gelu': 'gelu_erf',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'quick_gelu': 'quick_gelu',
  'silu': 'silu',
}
_RESAMPLE = {2: 'bilinear', 3: 'bicubic'}


def _sized(patch, grid, heads=2, depth=2):
  size = {'patch_size': patch, 'image_size': patch * grid}
  return _SIZE | size | {'num_attention_heads': heads, 'num_hidden_layers': depth}


_VIT = {'pool': 'cls'}
_CLIP = {'pool': 'cls', 'pre_norm': True, 'patch_bias': False}
_MAP = {'pool': 'map', 'class_token': False}
_BEIT = {
  'pool': 'gap',
  'final_norm': 'pooled',
  'qkv_bias': 'qv',
  'layer_scale': True,
  'positions': 'none',
  'relative_positions': True,
}
_DINO = {'pool': 'cls', 'layer_scale': True}
_DINO3 = {**_DINO, 'positions': 'none', 'rope': 'dinov3'}
_INTERN = {'pool': 'gap', 'final_norm': 'none', 'layer_scale': True}
_AIM = {
  'pool': 'gap',
  'class_token': False,
  'norm': 'rms',
  'gated': True,
  'patch_norm': True,
  'qkv_bias': 'none',
  'linear_bias': False,
}


def _two_towers(kind, patch, grid, **vision):
  """Config of a model with a text tower."""
  kwargs = {'projection_dim': 6} if kind == 'CLIP' else {}
  vision = _sized(patch, grid, heads=3) | vision
  klass = getattr(transformers, f'{kind}Config')
  return klass(text_config=_TEXT, vision_config=vision, **kwargs)


def _naflex_config():
  size = {k: v for k, v in _sized(4, 3).items() if k != 'image_size'}
  return transformers.Siglip2VisionConfig(**size, num_patches=9)


transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
T = transformers
# Case -> (model class, config, image processor, encoder within the model, pooling, fields that the
# class itself decides, what is special). Fields of the config are read below.
CASES = {
  'hf_vit': (
    T.ViTModel, lambda: T.ViTConfig(**_sized(4, 3)), 'ViT', '', cls, _VIT,
    'pooler weights, which are not used; eps 1e-12',
  ),
  'hf_vit_classifier': (
    T.ViTForImageClassification,
    lambda: T.ViTConfig(**_sized(4, 3, heads=3, depth=3), qkv_bias=False, num_labels=3),
    'ViT', 'vit', cls, _VIT, "names begin with 'vit.'; no qkv bias",
  ),
  'hf_deit_teacher': (
    T.DeiTForImageClassificationWithTeacher, lambda: T.DeiTConfig(**_sized(4, 3), num_labels=3),
    'DeiT', 'deit', two_tokens, {'pool': 'cls_dist', 'registers': 1}, "names begin with 'deit.'",
  ),
  'hf_clip_vision': (
    T.CLIPVisionModel, lambda: T.CLIPVisionConfig(**_sized(4, 3)), 'CLIP', '', pooler, _CLIP,
    'names without the vision_model. of older versions; quick_gelu',
  ),
  'hf_clip': (
    T.CLIPModel, lambda: _two_towers('CLIP', 5, 3, hidden_act='gelu'), 'CLIP', 'vision_model',
    pooler, _CLIP, 'with a text tower; position_ids, as old files have them; gelu as LAION has',
  ),
  'hf_siglip_vision': (
    T.SiglipVisionModel, lambda: T.SiglipVisionConfig(**_sized(4, 3)), 'Siglip', '', pooler, _MAP,
    'names without the vision_model. of older versions',
  ),
  'hf_siglip': (
    T.SiglipModel, lambda: _two_towers('Siglip', 4, 3), 'Siglip', 'vision_model', pooler, _MAP,
    'with a text tower; nested configs leave out defaults, as older versions wrote them',
  ),
  'hf_siglip2_naflex': (
    T.Siglip2VisionModel, _naflex_config, 'Siglip2', '', naflex, _MAP,
    'NaFlex: the patch embedding is a linear layer over (y, x, channel)',
  ),
  'hf_dinov2': (
    T.Dinov2Model, lambda: T.Dinov2Config(**_sized(4, 3), mlp_ratio=2), 'Bit', '', pooler, _DINO,
    'mask token; the size of the MLP is mlp_ratio, not intermediate_size',
  ),
  'hf_dinov2_swiglu': (
    T.Dinov2Model,
    lambda: T.Dinov2Config(**_sized(4, 3, heads=3), mlp_ratio=3, use_swiglu_ffn=True), 'Bit', '',
    pooler, {**_DINO, 'gated': True, 'activation': 'silu'},
    'packed SwiGLU, whatever hidden_act says',
  ),
  'hf_dinov2_registers': (
    T.Dinov2WithRegistersModel,
    lambda: T.Dinov2WithRegistersConfig(**_sized(4, 3), mlp_ratio=2, num_register_tokens=3),
    'Bit', '', pooler, _DINO,
    'registers, which alone have no position; several files and their index',
  ),
  'hf_dinov3': (
    T.DINOv3ViTModel, lambda: T.DINOv3ViTConfig(**_sized(4, 3, heads=3), num_register_tokens=4),
    'DINOv3ViT', '', pooler, _DINO3, 'no key bias',
  ),
  'hf_dinov3_gated': (
    T.DINOv3ViTModel,
    lambda: T.DINOv3ViTConfig(
      **_sized(4, 4), num_register_tokens=2, use_gated_mlp=True, hidden_act='silu',
      query_bias=False, value_bias=False,
    ),
    'DINOv3ViT', '', pooler, {**_DINO3, 'gated': True}, 'as the 7B: no qkv bias',
  ),
  'hf_mae': (
    T.ViTMAEModel, lambda: T.ViTMAEConfig(**_sized(4, 3), mask_ratio=0.0), 'ViT', '', unshuffled,
    _VIT, 'eps 1e-12',
  ),
  'hf_mae_pretraining': (
    T.ViTMAEForPreTraining,
    lambda: T.ViTMAEConfig(
      **_sized(4, 3, heads=3), mask_ratio=0.0, decoder_hidden_size=8, decoder_num_hidden_layers=1,
      decoder_num_attention_heads=2, decoder_intermediate_size=12,
    ),
    'ViT', 'vit', unshuffled, _VIT, "with a decoder; names begin with 'vit.'; pytorch_model.bin",
  ),
  'hf_beit': (
    T.BeitModel, lambda: T.BeitConfig(**_sized(4, 3), use_relative_position_bias=True), 'Beit', '',
    pooler, _BEIT, 'relative positions of each layer',
  ),
  'hf_beit_classifier': (
    T.BeitForImageClassification,
    lambda: T.BeitConfig(**_sized(4, 3, heads=3), use_relative_position_bias=True, num_labels=3),
    'Beit', 'beit', pooler, _BEIT, "names begin with 'beit.'",
  ),
  'hf_beit_shared': (
    T.BeitModel, lambda: T.BeitConfig(**_sized(4, 3), use_shared_relative_position_bias=True),
    'Beit', '', pooler, _BEIT, 'one table of relative positions for all layers',
  ),
  'hf_aimv2': (
    T.Aimv2VisionModel, lambda: T.Aimv2VisionConfig(**_sized(4, 3), use_head=False), 'CLIP', '',
    mean, _AIM, 'RMS norms, also of the patches; SwiGLU; no biases',
  ),
  'hf_internvl': (
    T.InternVLVisionModel, lambda: T.InternVLVisionConfig(**_sized(4, 3), attention_bias=True),
    'CLIP', '', mean_of_patches, _INTERN,
    'as the 300M: LayerNorm, qkv bias; no final norm; pooled as the class describes it',
  ),
  'hf_internvl_6b': (
    T.InternVLVisionModel,
    lambda: T.InternVLVisionConfig(**_sized(4, 3, heads=3), norm_type='rms_norm', use_qk_norm=True),
    'CLIP', '', mean_of_patches,
    {**_INTERN, 'norm': 'rms', 'qk_norm': 'width', 'qkv_bias': 'none'},
    'as the 6B: RMS norms, also of query and key over all channels',
  ),
}  # fmt: skip


def _bias(config) -> str:
  if hasattr(config, 'query_bias'):
    return (
      ''.join(k[0] for k in ('query', 'key', 'value') if getattr(config, f'{k}_bias')) or 'none'
    )
  return 'qkv' if getattr(config, 'qkv_bias', getattr(config, 'attention_bias', True)) else 'none'


def _hidden(config, own) -> int:
  if not hasattr(config, 'mlp_ratio'):
    return config.intermediate_size
  hidden = int(config.hidden_size * config.mlp_ratio)
  return (int(hidden * 2 / 3) + 7) // 8 * 8 if own.get('gated') else hidden


def fields(config, own, processor) -> dict:
  """What a model is, from its config (of the vision tower) and what its class decides."""
  patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
  found = {
    'width': config.hidden_size,
    'depth': config.num_hidden_layers,
    'heads': config.num_attention_heads,
    'mlp': _hidden(config, own),
    'patch': patch,
    'image_size': _side(config),
    'activation': _ACTIVATIONS[config.hidden_act],
    'norm_eps': getattr(config, 'layer_norm_eps', None) or config.rms_norm_eps,
    'registers': getattr(config, 'num_register_tokens', 0),
    'qkv_bias': _bias(config),
    'mean': list(processor.image_mean),
    'std': list(processor.image_std),
    'interpolation': _RESAMPLE[int(processor.resample)],
  }
  if hasattr(config, 'rope_theta'):
    found['rope_theta'] = float(config.rope_theta)
  return found | own


def _side(config) -> int:
  """Side of the square input."""
  if not hasattr(config, 'image_size'):  # NaFlex
    return config.patch_size * int(config.num_patches**0.5)
  return config.image_size if isinstance(config.image_size, int) else config.image_size[0]


def _processor(kind, config):
  """The class's own image processor, for the model's image size."""
  klass = getattr(transformers, f'{kind}ImageProcessor')
  says = klass().to_dict()
  kwargs = {
    key: dict.fromkeys(says[key], _side(config)) for key in ('size', 'crop_size') if says.get(key)
  }
  if isinstance(config, transformers.InternVLVisionConfig):  # As in the hub's files.
    kwargs |= {'image_mean': [0.485, 0.456, 0.406], 'image_std': [0.229, 0.224, 0.225]}
  return klass(**kwargs)


def _as_pickle(folder):
  """The file as models from before safetensors have it."""
  path = folder / 'model.safetensors'
  torch.save(safetensors.torch.load_file(path), folder / 'pytorch_model.bin')
  path.unlink()


def _with_position_ids(folder):
  """Versions before 4.31 saved this buffer, and many files on the hub still have it."""
  path = folder / 'model.safetensors'
  state = safetensors.torch.load_file(path)
  for tower in ('text_model', 'vision_model'):
    count = len(state[f'{tower}.embeddings.position_embedding.weight'])
    state[f'{tower}.embeddings.position_ids'] = torch.arange(count)[None]
  safetensors.torch.save_file(state, path, metadata={'format': 'pt'})


def _without_defaults(folder):
  """Versions before 5 left out of nested configs what is the class's default."""
  path = folder / 'config.json'
  config = json.loads(path.read_text())
  for part, klass in (('text_config', T.SiglipTextConfig), ('vision_config', T.SiglipVisionConfig)):
    default = klass().to_dict()
    config[part] = {
      k: v for k, v in config[part].items() if k == 'model_type' or v != default.get(k)
    }
  path.write_text(json.dumps(config, indent=2) + '\n')


# Cases whose files are changed to what older versions of the library wrote.
OLDER = {
  'hf_mae_pretraining': _as_pickle,
  'hf_clip': _with_position_ids,
  'hf_siglip': _without_defaults,
}


def make(folder: pathlib.Path, name: str) -> Golden:
  """Builds a case's model, saves it and reads its description."""
  klass, config, processor, inside, pool, own, special = CASES[name]
  model = klass._from_config(config(), attn_implementation='sdpa').eval()
  dtype = torch.float32 if name == 'hf_vit' else torch.bfloat16  # Small files; both occur.
  randomize(model, name, dtype)
  # One in two files with their index, as large models are.
  shard = '12KB' if name == 'hf_dinov2_registers' else '5GB'
  store_as(model, dtype)
  model.save_pretrained(folder, max_shard_size=shard)
  if name in OLDER:
    OLDER[name](folder)
  encoder = getattr(model, inside) if inside else model
  vision = encoder.config
  processor = _processor(processor, vision)
  processor.save_pretrained(folder)
  found = fields(vision, own, processor)
  blocks = next(
    m for m in encoder.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == found['depth']
  )
  return Golden(encoder, blocks, pool(encoder), found, about=(LIBRARY, klass.__name__, special))
