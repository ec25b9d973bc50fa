"""Writes timm_architectures.json: what timm's ViTs have, by the name of the architecture.

python make_timm_architectures.py    # needs torch, torchvision and timm
"""

import json
import pathlib

import timm
import torch

ACTIVATIONS = {
  'GELU': 'gelu_erf',
  'GELUnone': 'gelu_erf',
  'GELUtanh': 'gelu_tanh',
  'GELUTanh': 'gelu_tanh',
  'QuickGELU': 'quick_gelu',
  'SiLU': 'silu',
}
ROPES = {'RotaryEmbeddingCat': 'eva', 'RotaryEmbeddingDinoV3': 'dinov3'}


def describe(name):
  """Fields of `BackboneSpec` of an architecture, or None if its blocks are of another kind."""
  with torch.device('meta'):
    model = timm.create_model(name)
  block, shapes = model.blocks[0], {k: tuple(v.shape) for k, v in model.state_dict().items()}
  fc1, fc2 = (shapes.get(f'blocks.0.mlp.{layer}.weight') for layer in ('fc1', 'fc2'))
  if fc2 is None or not hasattr(block, 'attn'):
    return None
  act, rope = block.mlp.act, getattr(model, 'rope', None)
  kind = type(act).__name__ + getattr(act, 'approximate', '')
  gated = 'blocks.0.mlp.fc1_g.weight' in shapes or bool(fc1 and fc1[0] == 2 * fc2[1])
  row = {
    'width': fc2[0],
    'depth': len(model.blocks),
    'mlp': fc2[1],
    'gated': gated,
    'heads': block.attn.num_heads,
    'activation': 'silu' if type(block.mlp).__name__ == 'SwiGLU' else ACTIVATIONS.get(kind, kind),
    'norm_eps': block.norm1.eps,
    'rope': ROPES.get(type(rope).__name__, 'none' if rope is None else type(rope).__name__),
    'block_norm': 'post' if 'Post' in type(block).__name__ else 'pre',
  }
  if row['rope'] in ROPES.values():
    row['rope_theta'] = float(rope.temperature)
  if row['rope'] == 'eva':
    row['rope_grid'] = str(rope.ref_feat_shape)
  return row


def main():
  modules = ('vision_transformer', 'eva', 'beit', 'deit')
  names = {name for module in modules for name in timm.list_models(module=module)}
  rows = {name: row for name in sorted(names) if (row := describe(name))}
  lines = ',\n'.join(f'"{name}": {json.dumps(row)}' for name, row in rows.items())
  text = f'{{\n"library": "timm {timm.__version__}",\n"architectures": {{\n{lines}\n}}}}\n'
  pathlib.Path(__file__).with_name('timm_architectures.json').write_text(text)


if __name__ == '__main__':
  main()
