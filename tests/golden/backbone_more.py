"""Cases of JAX .npz files, which timm reads, and of open_clip's models."""

import dataclasses
import pathlib

import backbone_timm
import numpy as np
import open_clip
import timm
import timm.layers
import torch
from backbone_common import Golden, generator, randomize, store_as, values
from open_clip.push_to_hf_hub import save_for_hf

LIBRARY = f'open_clip {open_clip.__version__}'
WIDTH, HEADS, MLP, DEPTH = 24, 3, 26, 2
_TEXT = {'context_length': 4, 'vocab_size': 11, 'width': 8, 'heads': 1, 'layers': 1}


def _augreg(patch, grid, hidden=None):
  """Names and shapes of a checkpoint of vision_transformer (AugReg and the originals).

  Every file of the project has them in this older spelling of Flax modules; `hidden` is the width
  of pre_logits, which only the originals have.
  """
  each, of_out = (WIDTH, HEADS, WIDTH // HEADS), (HEADS, WIDTH // HEADS, WIDTH)
  shapes = {
    'cls': (1, 1, WIDTH),
    'embedding/kernel': (patch, patch, 3, WIDTH),
    'embedding/bias': (WIDTH,),
    'Transformer/posembed_input/pos_embedding': (1, grid**2 + 1, WIDTH),
    'Transformer/encoder_norm/scale': (WIDTH,),
    'Transformer/encoder_norm/bias': (WIDTH,),
    'head/kernel': (hidden or WIDTH, 3),
    'head/bias': (3,),
  }
  if hidden:
    shapes |= {'pre_logits/kernel': (WIDTH, hidden), 'pre_logits/bias': (hidden,)}
  for i in range(DEPTH):
    block = f'Transformer/encoderblock_{i}'
    attention = f'{block}/MultiHeadDotProductAttention_1'
    for part in ('query', 'key', 'value'):
      shapes |= {f'{attention}/{part}/kernel': each, f'{attention}/{part}/bias': each[1:]}
    shapes |= {f'{attention}/out/kernel': of_out, f'{attention}/out/bias': (WIDTH,)}
    for norm in ('LayerNorm_0', 'LayerNorm_2'):
      shapes |= {f'{block}/{norm}/{part}': (WIDTH,) for part in ('scale', 'bias')}
    for part, size in (('Dense_0', (WIDTH, MLP)), ('Dense_1', (MLP, WIDTH))):
      shapes |= {
        f'{block}/MlpBlock_3/{part}/kernel': size,
        f'{block}/MlpBlock_3/{part}/bias': size[1:],
      }
  return shapes


def _value(rng, name, shape):
  """As `values`, but biases of this project are [heads e], and its convolutions [y x in out]."""
  if name.endswith('bias'):
    return values(rng, name, (int(np.prod(shape)),)).reshape(shape)
  if name == 'embedding/kernel':
    return values(rng, name, shape[::-1]).T
  return values(rng, name, shape)


def _npz(folder: pathlib.Path, name: str) -> Golden:
  file, patch, grid, hidden, special = NPZ[name]
  rng = generator(name)
  shapes = _augreg(patch, grid, hidden)
  np.savez_compressed(
    folder / file, **{key: _value(rng, key, shape) for key, shape in shapes.items()}
  )
  model = timm.create_model(
    'vit_base_patch16_224.augreg_in21k',
    embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, mlp_ratio=MLP / WIDTH, patch_size=patch,
    img_size=patch * grid, num_classes=0, act_layer='gelu_tanh',
  )  # fmt: skip
  assert model.blocks[0].mlp.fc1.out_features == MLP
  with torch.no_grad():
    model.load_pretrained(str(folder / file))
  about = (backbone_timm.LIBRARY, 'VisionTransformer.load_pretrained', special)
  found = backbone_timm.fields(model) | {'mean': [0.5] * 3, 'std': [0.5] * 3}
  by_family = ('norm_eps', 'activation', 'mean', 'std')
  return backbone_timm.golden(model, fields=found, by_family=by_family, about=about)


NPZ = {
  'npz_augreg': (
    'B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0.npz', 4, 3, None,
    'timm with the tanh GELU that the JAX models were trained with',
  ),
  'npz_pre_logits': (
    'imagenet21k_ViT-B_16.npz', 4, 3, 5,
    'with pre_logits, which is part of the classifier: pooled is before it',
  ),
}  # fmt: skip


# What the name of timm's model says, and no file.
_BY_NAME = ('heads', 'norm_eps', 'activation')


class _NoTokenizer:
  """What open_clip saves beside the model is not needed."""

  def save_pretrained(self, folder):
    del folder


def _open_clip(folder: pathlib.Path, name: str) -> Golden:
  config, special = OPEN_CLIP[name]
  vision = config['vision_cfg']
  trunk = 'timm_model_name' in vision
  klass = open_clip.CustomTextCLIP if config.get('custom_text') else open_clip.CLIP
  kwargs = {k: v for k, v in config.items() if k != 'custom_text'}
  if trunk:
    with _small_trunk():
      model = klass(**kwargs)
  else:
    model = klass(**kwargs)
  randomize(model, name, torch.float16)
  store_as(model, torch.float16)
  mean, std = (
    ([0.5] * 3, [0.5] * 3)
    if trunk
    else (list(open_clip.OPENAI_DATASET_MEAN), list(open_clip.OPENAI_DATASET_STD))
  )
  preprocess = {'mean': mean, 'std': std, 'interpolation': 'bicubic', 'resize_mode': 'shortest'}
  open_clip.model.set_model_preprocess_cfg(model, preprocess)
  save_for_hf(model, _NoTokenizer(), config, folder, safe_serialization=True)
  data = {k: preprocess[k] for k in ('mean', 'std', 'interpolation')}
  if trunk:
    golden = backbone_timm.golden(
      model.visual.trunk,
      fields=backbone_timm.fields(model.visual.trunk) | data,
      about=(LIBRARY, f'CustomTextCLIP, {vision["timm_model_name"]}', special),
    )
    return dataclasses.replace(golden, pooled=model.visual.trunk, by_family=_BY_NAME)
  tower = model.visual
  found = {
    'width': vision['width'],
    'depth': vision['layers'],
    'heads': tower.transformer.resblocks[0].attn.num_heads,
    'mlp': tower.transformer.resblocks[0].mlp.c_fc.out_features,
    'patch': vision['patch_size'],
    'image_size': vision['image_size'],
    'pool': 'cls',
    'activation': 'quick_gelu' if config.get('quick_gelu') else 'gelu_erf',
    'norm_eps': tower.ln_post.eps,
    'pre_norm': True,
    'patch_bias': False,
    **data,
  }

  def pooled(images):
    return tower(images)

  tower.proj = None  # What is saved has it; pooled is before it.
  return Golden(tower, tower.transformer.resblocks, pooled, found, about=(LIBRARY, 'CLIP', special))


class _small_trunk:
  """timm's model of a name, made small: open_clip cannot say so."""

  def __enter__(self):
    self.real = timm.create_model

    def create_model(name, **kwargs):
      kwargs |= {'embed_dim': WIDTH, 'depth': DEPTH, 'mlp_ratio': 1.1}
      kwargs |= {'patch_size': 4, 'img_size': 12}
      return self.real(name, **kwargs)

    timm.create_model = create_model

  def __exit__(self, *args):
    timm.create_model = self.real


_VISION = {'image_size': 12, 'layers': DEPTH, 'width': WIDTH, 'patch_size': 4, 'mlp_ratio': 1.1}
OPEN_CLIP = {
  'open_clip': (
    {'embed_dim': 6, 'vision_cfg': _VISION | {'head_width': 8}, 'text_cfg': _TEXT},
    'LAION style: gelu; with a text tower, whose names have no prefix',
  ),
  'open_clip_quickgelu': (
    {
      'embed_dim': 6, 'quick_gelu': True, 'vision_cfg': _VISION | {'head_width': 12},
      'text_cfg': _TEXT,
    },
    'quick_gelu, as the models of OpenAI, DFN and MetaCLIP',
  ),
  'open_clip_siglip': (
    {
      'embed_dim': WIDTH,
      'init_logit_bias': -10,
      'custom_text': True,
      'vision_cfg': {
        'image_size': 12, 'timm_model_name': 'vit_base_patch16_siglip_224',
        'timm_model_pretrained': False, 'timm_pool': 'map', 'timm_proj': 'none',
      },
      'text_cfg': {
        **_TEXT, 'no_causal_mask': True, 'proj_bias': True, 'pool_type': 'last',
        'norm_kwargs': {'eps': 1e-6},
      },
    },
    "timm's model as visual.trunk; 12 heads by its name, although it is small",
  ),
}  # fmt: skip
CASES = dict.fromkeys(NPZ, _npz) | dict.fromkeys(OPEN_CLIP, _open_clip)


def make(folder: pathlib.Path, name: str) -> Golden:
  return CASES[name](folder, name)
