"""Cases in the key names of the projects that trained the models, read by timm's own loaders.

The files are written here, tensor by tensor, with random values; timm's loaders of such files
decide what they compute.
"""

import importlib
import pathlib
from collections.abc import Iterable, Mapping

import backbone_timm
import timm
import timm.layers
import timm.models.vision_transformer
import torch
from backbone_common import Golden, generator, values

WIDTH, MLP, DEPTH, PATCH = 24, 26, 2, 4


def linear(name, rows, columns=WIDTH, bias=True):
  shapes = {f'{name}.weight': (rows, columns)}
  return shapes | ({f'{name}.bias': (rows,)} if bias else {})


def norm(name, width=WIDTH, bias=True):
  return {f'{name}.weight': (width,)} | ({f'{name}.bias': (width,)} if bias else {})


def _block(name, qkv_bias=True, scale=None, mlp=None, width=WIDTH, hidden=MLP):
  """Names and shapes of a block; `scale` are the names of the two layer scales."""
  shapes = {
    **norm(f'{name}.norm1', width),
    **linear(f'{name}.attn.qkv', 3 * width, width, qkv_bias),
    **linear(f'{name}.attn.proj', width, width),
    **norm(f'{name}.norm2', width),
  }
  shapes |= {f'{name}.{s}': (width,) for s in scale or ()}
  for part, (rows, columns) in (mlp or {'fc1': (hidden, width), 'fc2': (width, hidden)}).items():
    shapes |= linear(f'{name}.mlp.{part}', rows, columns)
  return shapes


def _blocks(**kwargs):
  return {k: v for i in range(DEPTH) for k, v in _block(f'blocks.{i}', **kwargs).items()}


def _embedding(tokens):
  """Class token, positions of that many tokens, patch embedding."""
  return {
    'cls_token': (1, 1, WIDTH),
    **({'pos_embed': (1, tokens, WIDTH)} if tokens else {}),
    'patch_embed.proj.weight': (WIDTH, 3, PATCH, PATCH),
    'patch_embed.proj.bias': (WIDTH,),
  }


_SCALES = ('ls1.gamma', 'ls2.gamma')
_W12 = {'w12': (2 * 32, WIDTH), 'w3': (WIDTH, 32)}
_W123 = {'w1': (64, WIDTH), 'w2': (64, WIDTH), 'w3': (WIDTH, 64)}


def _dinov3(shapes):
  return {
    'storage_tokens': (1, 4, WIDTH),
    'mask_token': (1, WIDTH),
    **_embedding(0),
    'rope_embed.periods': (2,),
    **shapes,
    **norm('norm'),
  }


def _beit(tables):
  shapes = _blocks(qkv_bias=False, scale=('gamma_1', 'gamma_2'))
  for i in range(DEPTH):
    shapes |= {f'blocks.{i}.attn.{k}_bias': (WIDTH,) for k in 'qv'}
    if tables:
      shapes[f'blocks.{i}.attn.relative_position_bias_table'] = (28, 2)
      shapes[f'blocks.{i}.attn.relative_position_index'] = (10, 10)
  return _embedding(0) | shapes


def _mae():
  decoder = {
    'mask_token': (1, 1, 8),
    'decoder_pos_embed': (1, 10, 8),
    **linear('decoder_embed', 8),
    **_block('decoder_blocks.0', width=8, hidden=12),
    **norm('decoder_norm', 8),
    **linear('decoder_pred', 3 * PATCH**2, 8),
  }
  return _embedding(10) | _blocks() | norm('norm') | decoder


# Case -> (file, key that the state is under, names and shapes, timm's model and its arguments, what
# is special).
CASES = {
  'orig_dinov2': (
    'dinov2_vits14_reg4_pretrain.pth', None,
    {
      'register_tokens': (1, 4, WIDTH), 'mask_token': (1, WIDTH), **_embedding(10),
      **_blocks(scale=_SCALES), **norm('norm'),
    },
    'vit_small_patch14_reg4_dinov2.lvd142m', {'num_heads': 2},
    'registers after the class token, which alone has a position of its own',
  ),
  'orig_dinov2_swiglu': (
    'dinov2_vitg14_pretrain.pth', None,
    {
      'mask_token': (1, WIDTH), **_embedding(10), **_blocks(scale=_SCALES, mlp=_W12),
      **norm('norm'),
    },
    'vit_giant_patch14_dinov2.lvd142m', {'num_heads': 3, 'mlp_ratio': 64 / WIDTH},
    'packed SwiGLU: w12 is (gate, value), w3',
  ),
  'orig_dinov3': (
    'dinov3_vits16_pretrain_lvd1689m.pth', None,
    _dinov3(
      _blocks(scale=_SCALES) | {f'blocks.{i}.attn.qkv.bias_mask': (72,) for i in range(DEPTH)}
    ),
    'vit_small_patch16_dinov3_qkvb.lvd1689m', {'num_heads': 3, 'global_pool': 'token'},
    'qkv.bias counts only where qkv.bias_mask is 1: never for the key',
  ),
  'orig_dinov3_swiglu': (
    'dinov3_vit7b16_pretrain_lvd1689m.pth', None,
    _dinov3(
      _blocks(scale=_SCALES, mlp=_W123, qkv_bias=False) | norm('local_cls_norm')
    ),
    'vit_7b_patch16_dinov3.lvd1689m',
    {'num_heads': 3, 'global_pool': 'token', 'mlp_ratio': 64 / WIDTH},
    'as the 7B: no qkv bias; SwiGLU: w1 gate, w2 value, w3; a norm that is used in training only',
  ),
  'orig_mae': (
    'mae_visualize_vit_base.pth', 'model', _mae(),
    'vit_base_patch16_224.mae', {'num_heads': 2, 'num_classes': 0}, 'with the decoder',
  ),
  'orig_deit_distilled': (
    'deit_base_distilled_patch16_224.pth', 'model',
    {
      'dist_token': (1, 1, WIDTH), **_embedding(11), **_blocks(), **norm('norm'),
      **linear('head', 3), **linear('head_dist', 3),
    },
    'deit_base_distilled_patch16_224.fb_in1k', {'num_heads': 2, 'num_classes': 3},
    'distillation token; pooled is the mean of both normed tokens',
  ),
  'orig_beitv2': (
    'beitv2_base_patch16_224_pt1k_ft21k.pth', 'model',
    _beit(tables=True) | norm('fc_norm') | linear('head', 3),
    'beitv2_base_patch16_224.in1k_ft_in22k', {'num_heads': 2, 'num_classes': 3},
    'fine-tuned: a table of relative positions in each layer, norm after pooling',
  ),
  'orig_beitv2_pretrained': (
    'beitv2_base_patch16_224_pt1k.pth', 'model',
    {
      'mask_token': (1, 1, WIDTH), **_beit(tables=False),
      'rel_pos_bias.relative_position_bias_table': (28, 2),
      'rel_pos_bias.relative_position_index': (10, 10),
      **norm('norm'), **linear('lm_head', 11), **linear('cls_pt_layers.0.attn.proj', WIDTH),
    },
    'beitv2_base_patch16_224.in1k_ft_in22k',
    {
      'num_heads': 2, 'num_classes': 0, 'use_rel_pos_bias': False,
      'use_shared_rel_pos_bias': True, 'global_pool': 'token',
    },
    'pretrained only: one table for all layers; pooled is the normed class token',
  ),
}  # fmt: skip


def tensors(name: str, shapes: Mapping[str, Iterable[int]], dtype: torch.dtype):
  """Random tensors of those names; what is no weight has the value that it has in a real file."""
  rng = generator(name)
  made = {key: torch.from_numpy(values(rng, key, shape)).to(dtype) for key, shape in shapes.items()}
  for key, x in made.items():
    if key.endswith('periods'):
      made[key] = 100.0 ** (torch.arange(len(x)) / len(x))
    elif key.endswith('bias_mask'):
      made[key] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(len(x) // 3)
    elif key.endswith('relative_position_index'):
      made[key] = timm.layers.pos_embed_rel.gen_relative_position_index((3, 3), class_token=True)
  return made


def read_by_timm(state, architecture: str, args) -> torch.nn.Module:
  """timm's model with the weights of a state that timm's own loader understands."""
  size = {'embed_dim': WIDTH, 'depth': DEPTH, 'mlp_ratio': MLP / WIDTH, 'patch_size': PATCH}
  model = timm.create_model(
    architecture, **(size | {'img_size': 3 * PATCH, 'num_classes': 0} | args)
  )
  module = importlib.import_module(type(model).__module__)
  if not hasattr(module, 'checkpoint_filter_fn'):  # DeiT's is the ViT's.
    module = timm.models.vision_transformer
  result = model.load_state_dict(module.checkpoint_filter_fn(state, model), strict=False)
  assert not result.missing_keys, result
  return model


def by_timm(model, architecture: str, special: str, needs=(), by_family=()) -> Golden:
  """The golden outputs of a model that `read_by_timm` made."""
  says = model.pretrained_cfg
  found = backbone_timm.fields(model) | {
    'mean': list(says['mean']),
    'std': list(says['std']),
    'interpolation': says['interpolation'],
  }
  about = (backbone_timm.LIBRARY, architecture, special)
  return backbone_timm.golden(model, fields=found, needs=needs, by_family=by_family, about=about)


def make(folder: pathlib.Path, name: str) -> Golden:
  """Writes a case's file and reads it with timm."""
  file, under, shapes, architecture, args, special = CASES[name]
  state = tensors(name, shapes, torch.float16)  # To keep it small; the real files are float32.
  torch.save({under: state} if under else state, folder / file)
  # In float32: timm adds the class token's position to it.
  exact = {key: x.float() if x.is_floating_point() else x for key, x in state.items()}
  model = read_by_timm({under: exact} if under else exact, architecture, args)
  needs = ('heads',)
  if 'rope_embed.periods' in shapes:  # They say how wide a head is; nothing says the grid.
    needs = ('image_size',)
  if any('relative_position_bias_table' in key for key in shapes):  # Has a column per head.
    needs = ('mean', 'std')  # Of BEiT 0.5, of BEiT v2 ImageNet's.
  by_family = ('norm_eps', 'activation', 'pool', 'mean', 'std', 'interpolation')
  by_family = tuple(field for field in by_family if field not in needs)
  return by_timm(model, architecture, special, needs, by_family)
