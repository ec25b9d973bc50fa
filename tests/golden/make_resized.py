"""Writes backbones_resized.npz: some of backbones/ used at another input size by their libraries.

Each library resamples the position embeddings with its own code: timm's and open_clip's when a
checkpoint is loaded, transformers' in each call. What only the authors' code does is called here as
they call it: scipy.ndimage.zoom for vision_transformer, and the interpolation of DINOv2's models
without registers, whose factor is 0.1 / side too large. Nothing here imports losa_scenic.

To write the file anew, in the environment of make_backbones.py with scipy==1.16.3:

  python tests/golden/make_resized.py

Arrays in the file, float32: <case>/image [1 h w 3], already normalised, and <case>/tokens [1 n d],
the output of the last block, computed in float64.
"""

import json
import pathlib
import tempfile

import make_backbones  # noqa: F401  (imports torchvision in a way that works)

import backbone_more  # isort: skip
import backbone_originals
import backbone_timm
import backbone_transformers
import numpy as np
import open_clip
import safetensors.torch
import scipy.ndimage
import timm
import torch
import torch.nn.functional as F
from backbone_common import OUT, generator
from backbone_pooling import naflex

# Case -> new side in patches, larger and smaller.
TIMM = {
  'timm_vit_augreg': 5,
  'timm_vit_reg_gap': 2,
  'timm_vit_rope_reg': 5,
  'timm_deit_distilled': 5,
  'timm_deit3': 2,
  'timm_siglip': 5,
  'timm_dinov2_reg_swiglu': 5,
  'timm_dinov3': 5,
  'timm_eva02_base': 6,
  'timm_beitv2': 5,
}
TRANSFORMERS = {
  'hf_vit': 5,
  'hf_deit_teacher': 2,
  'hf_clip_vision': 5,
  'hf_siglip_vision': 5,
  'hf_siglip2_naflex': 5,
  'hf_dinov2': 5,
  'hf_dinov2_registers': 5,
  'hf_dinov3': 5,
  'hf_internvl': 5,
}
ORIGINALS = {'orig_dinov2': 5, 'orig_dinov2_swiglu': 5}
OTHERS = {'open_clip': 5, 'npz_augreg': 5}


def _state(name: str):
  state = safetensors.torch.load_file(OUT / name / 'model.safetensors')
  return {k: x.float() if x.is_floating_point() else x for k, x in state.items()}


def _timm(name: str, grid: int):
  architecture, args, _ = backbone_timm.CASES[name]
  args = {**args, 'img_size': args['patch_size'] * grid}
  model = backbone_originals.read_by_timm(_state(name), architecture, args)
  return model, model.blocks, model


def _transformers(name: str, grid: int):
  del grid
  klass, _, _, inside, *_ = backbone_transformers.CASES[name]
  model = klass.from_pretrained(OUT / name, attn_implementation='sdpa', dtype=torch.float32)
  encoder = getattr(model, inside) if inside else model
  depth = encoder.config.num_hidden_layers
  lists = (m for m in encoder.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth)
  always = name in ('hf_dinov2', 'hf_dinov2_registers', 'hf_dinov3', 'hf_internvl')
  kwargs = {} if always else {'interpolate_pos_encoding': True}
  run = naflex(model) if 'naflex' in name else lambda x: encoder(pixel_values=x, **kwargs)
  return encoder, next(lists), run


def _original(name: str, grid: int):
  file, _, shapes, architecture, args, _ = backbone_originals.CASES[name]
  state = torch.load(OUT / name / file, weights_only=True)
  state = {k: x.float() for k, x in state.items()}
  if 'register_tokens' not in shapes:
    table = state['pos_embed']
    side = int((table.shape[1] - 1) ** 0.5)
    patches = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    factor = (grid + 0.1) / side
    patches = F.interpolate(patches, scale_factor=(factor, factor), mode='bicubic')
    patches = patches.permute(0, 2, 3, 1).reshape(1, grid**2, -1)
    state['pos_embed'] = torch.cat([table[:, :1], patches], dim=1)
  args = {**args, 'img_size': backbone_originals.PATCH * grid}
  model = backbone_originals.read_by_timm(state, architecture, args)
  return model, model.blocks, model


def _open_clip(name: str, grid: int):
  folder = OUT / name
  config = json.loads((folder / 'open_clip_config.json').read_text())['model_cfg']
  config['vision_cfg']['image_size'] = config['vision_cfg']['patch_size'] * grid
  model = open_clip.CLIP(**config)
  state = safetensors.torch.load_file(folder / 'open_clip_model.safetensors')
  state = {k: x.float() if x.is_floating_point() else x for k, x in state.items()}
  open_clip.model.resize_pos_embed(state, model)
  model.load_state_dict(state)
  return model.visual, model.visual.transformer.resblocks, model.visual


def _npz(name: str, grid: int):
  file, patch, side, _, _ = backbone_more.NPZ[name]
  arrays = dict(np.load(OUT / name / file))
  key = 'Transformer/posembed_input/pos_embedding'
  patches = arrays[key][0, 1:].reshape(side, side, -1)
  patches = scipy.ndimage.zoom(patches, (grid / side, grid / side, 1), order=1)
  patches = patches.reshape(1, grid**2, -1)
  arrays[key] = np.concatenate([arrays[key][:, :1], patches], axis=1)
  model = timm.create_model(
    'vit_base_patch16_224.augreg_in21k',
    embed_dim=backbone_more.WIDTH, depth=backbone_more.DEPTH, num_heads=backbone_more.HEADS,
    mlp_ratio=backbone_more.MLP / backbone_more.WIDTH, patch_size=patch, img_size=patch * grid,
    num_classes=0, act_layer='gelu_tanh',
  )  # fmt: skip
  with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    np.savez(f'{folder}/resized.npz', **arrays)
    model.load_pretrained(f'{folder}/resized.npz')
  return model, model.blocks, model


def _tokens(model, blocks, run, images: np.ndarray) -> np.ndarray:
  """Output of the last block for images [b h w 3]."""
  seen = []

  def keep(module, args, output):
    del module, args
    seen.append(output[0] if isinstance(output, tuple) else output)

  model.double().eval()
  blocks[-1].register_forward_hook(keep)
  with torch.no_grad():
    run(torch.tensor(images, dtype=torch.float64).permute(0, 3, 1, 2))
  (tokens,) = seen
  return tokens.numpy().astype(np.float32)


def main() -> None:
  """Writes the file next to this script."""
  index, arrays = json.loads((OUT / 'INDEX.json').read_text()), {}
  for cases, make in (
    (TIMM, _timm),
    (TRANSFORMERS, _transformers),
    (ORIGINALS, _original),
    ({'open_clip': OTHERS['open_clip']}, _open_clip),
    ({'npz_augreg': OTHERS['npz_augreg']}, _npz),
  ):
    for name, grid in cases.items():
      side = index[name]['patch'] * grid
      rng = generator(f'{name} resized')
      images = rng.integers(-8, 9, (1, side, side, 3)).astype(np.float32) / 4
      tokens = _tokens(*make(name, grid), images)
      prefix = index[name]['class_token'] + index[name]['registers']
      assert tokens.shape == (1, prefix + grid**2, index[name]['width']), (name, tokens.shape)
      arrays |= {f'{name}/image': images, f'{name}/tokens': tokens}
      print(name, tokens.shape, flush=True)
  path = pathlib.Path(__file__).with_name('backbones_resized.npz')
  np.savez_compressed(path, **arrays)
  print(f'{path}: {len(arrays)} arrays, {path.stat().st_size} bytes')


if __name__ == '__main__':
  main()
