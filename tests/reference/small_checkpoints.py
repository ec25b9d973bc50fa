"""Writers of small checkpoints: names and layouts of three kinds of files, written by hand.

A geometry is a dict of heads, width, depth, mlp, patch (pixels), side (in patches) and seed.
"""

import json

import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {np.dtype('f4'): 'F32', np.dtype('f2'): 'F16', BF16: 'BF16', np.dtype('i1'): 'I8'}


def parameters(g, clip):
  """{path: array}: a ViT with class token, [in, out]; CLIP has a norm more and a bias less."""
  d, mlp, rng = g['width'], g['mlp'], np.random.default_rng(g['seed'])

  def linear(path, rows, columns):
    return {f'{path}/kernel': (rows, columns), f'{path}/bias': (columns,)}

  shapes = {
    'cls': (1, 1, d),
    'pos_embedding': (1, g['side'] ** 2 + 1, d),
    'patch/proj/kernel': (g['patch'], g['patch'], 3, d),
  }
  norms = ['norm', *(['pre_norm'] if clip else [])]
  shapes |= {} if clip else {'patch/proj/bias': (d,)}
  for i in range(g['depth']):
    block = f'encoder/layers_{i}/block'
    norms += [f'{block}/norm1', f'{block}/norm2']
    for part in ('query', 'key', 'value', 'out'):
      shapes |= linear(f'{block}/{part}', d, d)
    shapes |= linear(f'{block}/fc1', d, mlp) | linear(f'{block}/fc2', mlp, d)
  shapes |= {f'{norm}/{part}': (d,) for norm in norms for part in ('scale', 'bias')}
  return {path: rng.standard_normal(shape) for path, shape in shapes.items()}


def torch_leaves(ours, theirs, p):
  """A linear layer or a norm as PyTorch stores it."""
  weight = p[f'{ours}/kernel'].T if f'{ours}/kernel' in p else p[f'{ours}/scale']
  return {f'{theirs}.weight': weight, f'{theirs}.bias': p[f'{ours}/bias']}


def as_timm(p, g):
  """Query, key and value in one matrix."""
  named = {
    'cls_token': p['cls'],
    'pos_embed': p['pos_embedding'],
    'patch_embed.proj.weight': p['patch/proj/kernel'].transpose(3, 2, 0, 1),
    'patch_embed.proj.bias': p['patch/proj/bias'],
    **torch_leaves('norm', 'norm', p),
  }
  for i in range(g['depth']):
    ours, theirs = f'encoder/layers_{i}/block', f'blocks.{i}'
    for a, b in (('norm1',) * 2, ('norm2',) * 2, ('out', 'attn.proj')):
      named |= torch_leaves(f'{ours}/{a}', f'{theirs}.{b}', p)
    for part in ('fc1', 'fc2'):
      named |= torch_leaves(f'{ours}/{part}', f'{theirs}.mlp.{part}', p)
    parts = [f'{ours}/{part}' for part in ('query', 'key', 'value')]
    named[f'{theirs}.attn.qkv.weight'] = np.concatenate([p[f'{n}/kernel'].T for n in parts])
    named[f'{theirs}.attn.qkv.bias'] = np.concatenate([p[f'{n}/bias'] for n in parts])
  return named


def as_clip(p, g):
  """transformers' CLIP, with something of its text tower."""
  named = {
    'logit_scale': np.ones(()),
    'text_model.final_layer_norm.weight': np.ones(7),
    'vision_model.embeddings.class_embedding': p['cls'].ravel(),
    'vision_model.embeddings.position_embedding.weight': p['pos_embedding'][0],
    'vision_model.embeddings.patch_embedding.weight': (
      p['patch/proj/kernel'].transpose(3, 2, 0, 1)
    ),
    **torch_leaves('pre_norm', 'vision_model.pre_layrnorm', p),
    **torch_leaves('norm', 'vision_model.post_layernorm', p),
  }
  names = {
    'norm1': 'layer_norm1',
    'norm2': 'layer_norm2',
    'query': 'self_attn.q_proj',
    'key': 'self_attn.k_proj',
    'value': 'self_attn.v_proj',
    'out': 'self_attn.out_proj',
    'fc1': 'mlp.fc1',
    'fc2': 'mlp.fc2',
  }
  for i in range(g['depth']):
    for ours, theirs in names.items():
      named |= torch_leaves(
        f'encoder/layers_{i}/block/{ours}', f'vision_model.encoder.layers.{i}.{theirs}', p
      )
  return named


def as_npz(p, g):
  """vision_transformer: an axis of heads."""
  d, heads = g['width'], g['heads']
  named = {
    'cls': p['cls'],
    'Transformer/posembed_input/pos_embedding': p['pos_embedding'],
    'embedding/kernel': p['patch/proj/kernel'],
    'embedding/bias': p['patch/proj/bias'],
    'head/kernel': np.ones((d, 2)),
  }
  for part in ('scale', 'bias'):
    named[f'Transformer/encoder_norm/{part}'] = p[f'norm/{part}']
  for i in range(g['depth']):
    ours, theirs = f'encoder/layers_{i}/block', f'Transformer/encoderblock_{i}'
    attention = f'{theirs}/MultiHeadDotProductAttention_1'
    for part in ('scale', 'bias'):
      named[f'{theirs}/LayerNorm_0/{part}'] = p[f'{ours}/norm1/{part}']
      named[f'{theirs}/LayerNorm_2/{part}'] = p[f'{ours}/norm2/{part}']
    for part in ('query', 'key', 'value'):
      named[f'{attention}/{part}/kernel'] = p[f'{ours}/{part}/kernel'].reshape(d, heads, -1)
      named[f'{attention}/{part}/bias'] = p[f'{ours}/{part}/bias'].reshape(heads, -1)
    named[f'{attention}/out/kernel'] = p[f'{ours}/out/kernel'].reshape(heads, -1, d)
    named[f'{attention}/out/bias'] = p[f'{ours}/out/bias']
    for part in ('kernel', 'bias'):
      named[f'{theirs}/MlpBlock_3/Dense_0/{part}'] = p[f'{ours}/fc1/{part}']
      named[f'{theirs}/MlpBlock_3/Dense_1/{part}'] = p[f'{ours}/fc2/{part}']
  return named


WRITERS = {'timm': as_timm, 'clip': as_clip, 'npz': as_npz}


def write(folder, kind, named):
  """A safetensors file or an npz, in the order of `named`."""
  if kind == 'npz':
    path = folder / 'a.npz'
    raw = {n: x.view('V2') if x.dtype == BF16 else x for n, x in named.items()}
    np.savez(path, **raw)
    return path
  header, data = {}, b''
  for name, x in named.items():
    end = len(data) + x.nbytes
    header[name] = {'dtype': DTYPES[x.dtype], 'shape': x.shape, 'data_offsets': [len(data), end]}
    data += x.tobytes()
  text = json.dumps(header).encode()
  path = folder / 'a.safetensors'
  path.write_bytes(len(text).to_bytes(8, 'little') + text + data)
  return path
