"""Our methods against peft and adapters (AdapterHub): equal features, equal gradients.

tests/golden/make_peft.py wrote the file with a tiny ViT's weights, random adapters and what those
packages make of them; here only its arrays are read.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from losa_scenic.adapt_lib import methods
from losa_scenic.common_lib import trees
from losa_scenic.model_lib import presets
from losa_scenic.model_lib.adapted import Adapted

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / 'golden' / 'peft_vit.npz')
SPEC = presets.preset('test/8', activation='gelu_erf')
TOLERANCE = 1e-5  # Of the largest value.
# The case in the file: (our method, its options).
CASES = {
  'plain': ('linear', {}),
  'lora_qv': ('lora', {'rank': 4, 'alpha': 8.0, 'targets': 'query,value'}),
  'lora_all': ('lora', {'rank': 4, 'alpha': 8.0, 'targets': 'query,key,value,out,fc1,fc2'}),
  'dora_qv': ('dora', {'rank': 4, 'alpha': 8.0, 'targets': 'query,value'}),
  'dora_qv_mlp': ('dora', {'rank': 4, 'alpha': 8.0, 'targets': 'query,value,fc1,fc2'}),
  'vera_qv': ('vera', {'rank': 6, 'targets': 'query,value'}),
  'vera_qv_mlp': ('vera', {'rank': 6, 'targets': 'query,value,fc1,fc2'}),
  'bottleneck_mlp': ('adapter', {'bottleneck': 4, 'activation': 'quick_gelu'}),
  'bottleneck_both': (
    'adapter',
    {'bottleneck': 4, 'activation': 'gelu_erf', 'placement': 'houlsby'},
  ),
  'adapter_plus': ('adapter_plus', {'bottleneck': 4}),
  'par_bn': ('adaptformer', {'bottleneck': 4, 'scale': 0.5}),
  'prefix': ('prefix', {'length': 5}),
  'prompt': ('vpt_shallow', {'prompts': 5}),
}
# What a module of theirs is with us: the block's own layer, or the site where an insert stands.
SITES = {
  'attention.attention.query': 'query',
  'attention.attention.key': 'key',
  'attention.attention.value': 'value',
  'attention.output.dense': 'out',
  'intermediate.dense': 'fc1',
  'output.dense': 'fc2',
  'layernorm_before': 'norm1',
  'layernorm_after': 'norm2',
  'output.output_adapters.adapters.default': 'mlp',
  'attention_adapters.adapters.default': 'attn',
}
# Their name of a parameter: ours. Matrices are [out in] there and [in out] here.
LEAVES = {
  'lora_A.default.weight': 'a',
  'lora_B.default.weight': 'b',
  'lora_magnitude_vector.default.weight': 'magnitude_bias',
  'vera_lambda_b.default': 'lambda_b',
  'vera_lambda_d.default': 'lambda_d',
  'adapter_down.0.weight': 'delta/down_kernel',
  'adapter_down.0.bias': 'delta/down_bias',
  'adapter_up.weight': 'delta/up_kernel',
  'adapter_up.bias': 'delta/up_bias',
  'scaling': 'scale',
}


def of(case: str, kind: str) -> dict[str, np.ndarray]:
  """{name: array} of one kind ('param', 'grad', 'frozen')."""
  start = f'{case}/{kind}/'
  return {key.removeprefix(start): GOLDEN[key] for key in GOLDEN if key.startswith(start)}


def backbone() -> dict[str, np.ndarray]:
  """{our path: array} of the ViT's weights."""
  theirs, ours = of('plain', 'param'), {}
  ours['cls'] = theirs.pop('embeddings.cls_token')
  ours['pos_embedding'] = theirs.pop('embeddings.position_embeddings')
  patch = theirs.pop('embeddings.patch_embeddings.projection.weight')  # [d, channel, y, x]
  ours['patch/proj/kernel'] = patch.transpose(2, 3, 1, 0).reshape(-1, SPEC.width)
  ours['patch/proj/bias'] = theirs.pop('embeddings.patch_embeddings.projection.bias')
  ours['norm/scale'] = theirs.pop('layernorm.weight')
  ours['norm/bias'] = theirs.pop('layernorm.bias')
  for name, value in theirs.items():
    layer, module, leaf = re.fullmatch(r'encoder\.layer\.(\d+)\.(.+)\.(\w+)', name).groups()
    leaf = {('weight', 1): 'scale', ('weight', 2): 'kernel'}.get((leaf, value.ndim), leaf)
    ours[f'encoder/layers_{layer}/block/{SITES[module]}/{leaf}'] = value.T
  return {f'backbone/{path}': value for path, value in ours.items()}


def inserts(theirs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """{our path: array} of an adapter's parameters, or of their gradients."""
  modules, leaves = ('|'.join(map(re.escape, table)) for table in (SITES, LEAVES))
  ours = {}
  for name, value in theirs.items():
    match = re.fullmatch(rf'.*encoder\.layer\.(\d+)\.({modules})\.({leaves})', name)
    layer, module, leaf = match.groups()
    ours[f'encoder/layers_{layer}/insert_{SITES[module]}/{LEAVES[leaf]}'] = value.T
  return {f'backbone/{path}': value for path, value in ours.items()}


def prefix(theirs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  (value,) = theirs.values()  # Of keys and values in turn, for each layer.
  value = value.reshape(-1, SPEC.depth, 2, SPEC.width)
  return {
    f'backbone/encoder/layers_{i}/insert_attend/{name}': value[:, i, j]
    for i in range(SPEC.depth)
    for j, name in enumerate(('keys', 'values'))
  }


def prompt(theirs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  (value,) = theirs.values()
  return {'backbone/insert_encoder/prompts': value}


def moved(to: str) -> Callable:
  """As `inserts`, but what they place at the MLP's output stands elsewhere with us."""

  def rename(theirs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {path.replace('insert_mlp', to): value for path, value in inserts(theirs).items()}

  return rename


RENAME: dict[str, Callable] = {
  'adapter_plus': moved('insert_block/delta'),
  'par_bn': moved('insert_mlp_block'),
  'prefix': prefix,
  'prompt': prompt,
}


class Given(nn.Module):
  """VeRA's frozen matrices, in the place of the method's own random ones."""

  a: np.ndarray
  b: np.ndarray

  def __call__(self):
    return {'a': jnp.asarray(self.a), 'b': jnp.asarray(self.b)}


def close(have, want, name):
  have, want = np.asarray(have), np.asarray(want)
  assert have.shape == want.shape, name
  assert np.abs(have - want).max() <= TOLERANCE * np.abs(want).max(), name


@pytest.mark.parametrize('case', CASES)
def test_features_and_gradients_are_theirs(case):
  name, options = CASES[case]
  method = methods.build(name, SPEC, options)
  if frozen := of(case, 'frozen'):
    a, b = frozen['vera_A'].T, frozen['vera_B'].T
    method = dataclasses.replace(method, shared=lambda: Given(a, b))
  model = Adapted(SPEC, method, 5)
  rename = RENAME.get(case, inserts)
  trained = rename({} if case == 'plain' else of(case, 'param'))
  for path, value in trained.items():
    if path.endswith('/magnitude_bias'):  # Ours is the difference from the pretrained norms.
      kernel = backbone()[path.replace('insert_', 'block/').replace('magnitude_bias', 'kernel')]
      trained[path] = value - np.linalg.norm(kernel, axis=0)
  params = backbone() | trained
  shapes = {k: v.shape for k, v in trees.flatten(model.param_shapes()).items()}
  shapes = {k: v for k, v in shapes.items() if not k.startswith('output_projection/')}
  assert {k: v.shape for k, v in params.items()} == shapes
  images = GOLDEN['images'].transpose(0, 2, 3, 1)

  def loss(trained):
    tree = trees.unflatten(params | trained)
    tree['output_projection'] = {'kernel': np.zeros((32, 5)), 'bias': np.zeros(5)}
    feature = model.apply({'params': tree}, images, method='features')
    return (feature * GOLDEN['cotangent']).sum(), feature

  grads, feature = jax.jit(jax.grad(loss, has_aux=True))(trained)
  close(feature, GOLDEN[f'{case}/feature'], 'feature')
  want = rename(of(case, 'grad'))
  assert set(grads) == set(want)
  for path, value in want.items():
    close(grads[path], value, path)


@pytest.mark.parametrize('case', [case for case in CASES if case != 'plain'])
def test_no_adapter_of_the_file_is_idle(case):
  assert np.abs(GOLDEN[f'{case}/feature'] - GOLDEN['plain/feature']).max() > 0.1
  assert all(np.any(grad) for grad in of(case, 'grad').values())
