"""Clip backbones against transformers' ViViT and VideoMAE (golden/make_vivit.py)."""

import dataclasses
import functools
import pathlib

import flax.linen as nn
import jax
import numpy as np
import pytest

from losa_scenic.common_lib import trees
from losa_scenic.model_lib.spec import BackboneSpec
from losa_scenic.model_lib.vit import ViT

GOLDEN = dict(np.load(pathlib.Path(__file__).parents[1] / 'golden' / 'vivit.npz'))
VIVIT = BackboneSpec(
  'vivit', width=24, depth=2, mlp=40, heads=2, patch=4, image_size=12, frames=8, tubelet=2
)
SPECS = {
  'vivit': VIVIT,
  'vivit_bare': dataclasses.replace(VIVIT, tubelet=4, heads=3, qkv_bias='none'),
  'segments': dataclasses.replace(VIVIT, factorised=True),
  'videomae': dataclasses.replace(
    VIVIT,
    class_token=False,
    pool='gap',
    final_norm='pooled',
    activation='gelu_erf',
    norm_eps=1e-5,
    qkv_bias='qv',
  ),
}
BLOCK = {
  'norm1': 'layernorm_before',
  'norm2': 'layernorm_after',
  'query': 'attention.attention.query',
  'key': 'attention.attention.key',
  'value': 'attention.attention.value',
  'out': 'attention.output.dense',
  'fc1': 'intermediate.dense',
  'fc2': 'output.dense',
}


def sinusoids(tokens, width):
  """Vaswani et al. 2017, section 3.5: even channels are sines, odd ones cosines."""
  angle = np.arange(tokens)[:, None] / 10000 ** (np.arange(0, width, 2) / width)
  return np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(1, tokens, width)


def params_of(case):
  """The case's weights as ours."""
  start = f'{case}/param/'
  left = {name.removeprefix(start): x for name, x in GOLDEN.items() if name.startswith(start)}
  of_model = {name.removeprefix('vivit.').removeprefix('videomae.'): name for name in left}

  def take(name):
    return left.pop(of_model[name])

  def module(path, name):
    """[out, in] -> [in, out]; [d 3 t p p] -> [t p p 3, d]."""
    weight, bias = f'{name}.weight', f'{name}.bias'
    found = {f'{path}/bias': take(bias)} if bias in of_model else {}
    x = take(weight)
    if x.ndim == 1:
      return {f'{path}/scale': x} | found
    return {f'{path}/kernel': np.moveaxis(x, (0, 1), (-1, -2)).reshape(-1, len(x))} | found

  params = module('patch/proj', 'embeddings.patch_embeddings.projection')
  for i in range(2):
    layer, block = f'encoder.layer.{i}.', f'encoder/layers_{i}/block'
    for ours, theirs in BLOCK.items():
      params |= module(f'{block}/{ours}', layer + theirs)
  if case == 'videomae':
    params['pos_embedding'] = sinusoids(36, 24).astype(np.float32)
    params |= module('norm', 'fc_norm')
    for i in range(2):
      for name in ('query', 'value'):
        theirs = f'encoder.layer.{i}.attention.attention.{name[0]}_bias'
        params[f'encoder/layers_{i}/block/{name}/bias'] = take(theirs)
  else:
    params['cls'] = take('embeddings.cls_token')
    params['pos_embedding'] = take('embeddings.position_embeddings')
    params |= module('norm', 'layernorm')
  assert all(name.startswith(('classifier.', 'pooler.')) for name in left), left.keys()
  return trees.unflatten(params)


@functools.partial(jax.jit, static_argnums=0)
def outputs(spec, params, clips):
  """Normed tokens and features."""

  def both(model):
    encoded = model.encode(clips).tokens
    return model.normed(encoded), model.features(encoded)

  return nn.apply(both, ViT(spec, {}))({'params': params})


def in_segments(tokens):
  """Class tokens of all times and then the grid -> [b t n d]: each time with its own."""
  b, _, d = tokens.shape
  own, grid = tokens[:, :4], tokens[:, 4:]
  return np.concatenate([own[:, :, None], grid.reshape(b, 4, 9, d)], axis=2)


@pytest.mark.parametrize('case', SPECS)
def test_tokens_and_features_are_those_of_transformers(case):
  tokens, features = outputs(SPECS[case], params_of(case), GOLDEN['clips'])
  tokens = in_segments(tokens) if case == 'segments' else tokens
  for have, what in ((tokens, 'tokens'), (features, 'features')):
    want = GOLDEN[f'{case}/{what}']
    np.testing.assert_allclose(have, want, rtol=0, atol=2e-6 * np.abs(want).max())
