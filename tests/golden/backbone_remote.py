"""Cases in the key names and configs of code that is on the hub beside the weights, in no package.

InternViT's names are those of InternVL's published model code and its computation is transformers'
InternVLVisionModel; AIMv2's names are those that timm's loader of the hub's files knows.
"""

import json
import pathlib

import safetensors.torch
import torch
import transformers
from backbone_common import Golden
from backbone_originals import (
  DEPTH,
  MLP,
  PATCH,
  WIDTH,
  by_timm,
  linear,
  norm,
  read_by_timm,
  tensors,
)


def _aimv2():
  shapes = {
    'preprocessor.pos_embed': (1, 9, WIDTH),
    'preprocessor.patchifier.proj.weight': (WIDTH, 3, PATCH, PATCH),
    'preprocessor.patchifier.proj.bias': (WIDTH,),
    'preprocessor.patchifier.norm.weight': (WIDTH,),
    'trunk.post_trunk_norm.weight': (WIDTH,),
  }
  for i in range(DEPTH):
    block = f'trunk.blocks.{i}'
    shapes |= {
      f'{block}.attn.qkv.weight': (3 * WIDTH, WIDTH),
      f'{block}.attn.proj.weight': (WIDTH, WIDTH),
      f'{block}.mlp.fc1.weight': (MLP, WIDTH),
      f'{block}.mlp.fc2.weight': (WIDTH, MLP),
      f'{block}.mlp.fc3.weight': (MLP, WIDTH),
      f'{block}.norm_1.weight': (WIDTH,),
      f'{block}.norm_2.weight': (WIDTH,),
    }
  return shapes


def _aimv2_config(found):
  return {
    'architectures': ['AIMv2Model'],
    'attention_dropout': 0.0,
    'auto_map': {
      'AutoConfig': 'configuration_aimv2.AIMv2Config',
      'AutoModel': 'modeling_aimv2.AIMv2Model',
    },
    'hidden_size': found['width'],
    'image_size': found['image_size'],
    'intermediate_size': found['mlp'],
    'model_type': 'aimv2',
    'num_attention_heads': found['heads'],
    'num_channels': 3,
    'num_hidden_layers': found['depth'],
    'patch_size': found['patch'],
    'projection_dropout': 0.0,
    'qkv_bias': False,
    'rms_norm_eps': found['norm_eps'],
    'torch_dtype': 'float32',
    'use_bias': False,
  }


def _aimv2_case(folder: pathlib.Path, name: str) -> Golden:
  """AIMv2's own code: one file."""
  state = tensors(name, _aimv2(), torch.float16)
  safetensors.torch.save_file(state, folder / 'model.safetensors', metadata={'format': 'pt'})
  architecture = 'aimv2_large_patch14_224.apple_pt'
  model = read_by_timm(state, architecture, {'num_heads': 2})
  special = 'SwiGLU: fc1 gate, fc3 value, fc2; no image processor in the folder'
  by_family = ('activation', 'pool', 'mean', 'std', 'interpolation')
  golden = by_timm(model, architecture, special, by_family=by_family)
  config = _aimv2_config(golden.fields)
  (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
  return golden


_INTERNVIT_CONFIG = {
  'architectures': ['InternVisionModel'],
  'attention_dropout': 0.0,
  'auto_map': {
    'AutoConfig': 'configuration_intern_vit.InternVisionConfig',
    'AutoModel': 'modeling_intern_vit.InternVisionModel',
  },
  'drop_path_rate': 0.0,
  'dropout': 0.0,
  'hidden_act': 'gelu',
  'hidden_size': WIDTH,
  'image_size': 3 * PATCH,
  'initializer_factor': 0.1,
  'initializer_range': 0.02,
  'intermediate_size': MLP,
  'layer_norm_eps': 1e-06,
  'model_type': 'intern_vit_6b',
  'norm_type': 'rms_norm',
  'num_attention_heads': 3,
  'num_channels': 3,
  'num_hidden_layers': DEPTH,
  'patch_size': PATCH,
  'qk_normalization': True,
  'qkv_bias': False,
  'torch_dtype': 'bfloat16',
  'use_flash_attn': True,
}


def _internvit_shapes():
  shapes = {
    'embeddings.class_embedding': (1, 1, WIDTH),
    'embeddings.position_embedding': (1, 10, WIDTH),
    'embeddings.patch_embedding.weight': (WIDTH, 3, PATCH, PATCH),
    'embeddings.patch_embedding.bias': (WIDTH,),
  }
  for i in range(DEPTH):
    layer = f'encoder.layers.{i}'
    shapes |= {
      **linear(f'{layer}.attn.qkv', 3 * WIDTH, bias=False),
      **linear(f'{layer}.attn.proj', WIDTH),
      **linear(f'{layer}.mlp.fc1', MLP),
      **linear(f'{layer}.mlp.fc2', WIDTH, MLP),
      f'{layer}.ls1': (WIDTH,),
      f'{layer}.ls2': (WIDTH,),
    }
    for part in ('norm1', 'norm2', 'attn.q_norm', 'attn.k_norm'):
      shapes |= norm(f'{layer}.{part}', bias=False)
  return shapes


def _internvit(folder: pathlib.Path, name: str) -> Golden:
  """InternViT-6B: bfloat16, two files and their index."""
  state = tensors(name, _internvit_shapes(), torch.bfloat16)
  _write_shards(folder, state)
  config = _INTERNVIT_CONFIG
  (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
  own = transformers.InternVLVisionConfig(
    hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=3, intermediate_size=MLP,
    use_qk_norm=True, norm_type='rms_norm', image_size=3 * PATCH, patch_size=PATCH,
  )  # fmt: skip
  model = transformers.InternVLVisionModel._from_config(own, attn_implementation='sdpa')
  model.load_state_dict(_to_transformers(state))
  processor = transformers.CLIPImageProcessor(
    image_mean=[0.485, 0.456, 0.406],
    image_std=[0.229, 0.224, 0.225],
    size={'shortest_edge': 3 * PATCH},
    crop_size={'height': 3 * PATCH, 'width': 3 * PATCH},
  )
  processor.save_pretrained(folder)
  found = {
    'width': WIDTH, 'depth': DEPTH, 'heads': 3, 'mlp': MLP, 'patch': PATCH,
    'image_size': 3 * PATCH, 'pool': 'cls', 'activation': 'gelu_erf', 'norm': 'rms',
    'norm_eps': 1e-6, 'final_norm': 'none', 'qk_norm': 'width', 'layer_scale': True,
    'qkv_bias': 'none', 'mean': processor.image_mean, 'std': processor.image_std,
    'interpolation': 'bicubic',
  }  # fmt: skip

  def pooled(images):
    return model(pixel_values=images).last_hidden_state[:, 0]

  library = f'transformers {transformers.__version__}'
  special = 'remote code of the 6B; bfloat16 in two files; pooled is the class token, not normed'
  return Golden(
    model, model.encoder.layer, pooled, found, about=(library, 'InternVLVisionModel', special)
  )


def _write_shards(folder, state):
  """Two files and the index that names the file of each tensor, as the hub has them."""
  keys = sorted(state)
  parts = keys[: len(keys) // 2], keys[len(keys) // 2 :]
  places = {}
  for i, part in enumerate(parts, start=1):
    file = f'model-{i:05d}-of-{len(parts):05d}.safetensors'
    safetensors.torch.save_file(
      {k: state[k] for k in part}, folder / file, metadata={'format': 'pt'}
    )
    places |= dict.fromkeys(part, file)
  size = sum(x.numel() * x.element_size() for x in state.values())
  index = {'metadata': {'total_size': size}, 'weight_map': places}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index, indent=2) + '\n')


_NAMES = (
  ('embeddings.class_embedding', 'embeddings.cls_token'),
  ('embeddings.position_embedding', 'embeddings.position_embeddings'),
  ('embeddings.patch_embedding.', 'embeddings.patch_embeddings.projection.'),
  ('.layers.', '.layer.'),
  ('.attn.proj', '.attention.projection_layer'),
  ('.attn.', '.attention.'),
  ('.ls', '.lambda_'),
  ('.norm1', '.layernorm_before'),
  ('.norm2', '.layernorm_after'),
)


def _to_transformers(state):
  """InternViT's remote-code names -> InternVLVisionModel's."""
  renamed = {}
  for key, x in state.items():
    for old, new in _NAMES:
      key = key.replace(old, new)
    if '.qkv.' in key:
      for part, rows in zip(('q_proj', 'k_proj', 'v_proj'), x.float().chunk(3), strict=True):
        renamed[key.replace('qkv', part)] = rows
    else:
      renamed[key] = x.float()
  return renamed


CASES = {'remote_aimv2': _aimv2_case, 'remote_internvit_6b': _internvit}


def make(folder: pathlib.Path, name: str) -> Golden:
  return CASES[name](folder, name)
