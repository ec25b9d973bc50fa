"""Checks by hand that timm and transformers load what weights_lib/export.py writes.

The two halves run in different environments, because losa_scenic needs no torch:

  python tests/golden/check_export.py write FOLDER    # where losa_scenic is installed
  python tests/golden/check_export.py check FOLDER    # with the packages of make_backbones.py

`write` exports every case of backbones/ that a library can hold to timm and to transformers, with
the names of the case's own file (-like) where it is of that library, and without; backbones with
LoRA merged into them (lora-); and random ones that no case is like (random-), one with a position
for every register among them. `check` lets the library build the model from the JSON files and load
the weights, and compares the output of its last block and its pooled features with what the
original computes (lora-, random-: with what our model computes). Differences are relative to the
largest value, in float32; the check fails above 1e-5, or where a library misses a weight of the
encoder or does not know one.
"""

import json
import pathlib
import sys

import numpy as np

HERE = pathlib.Path(__file__).parent
CASES = HERE / 'backbones'
LIBRARIES = ('timm', 'transformers')
TOLERANCE = 1e-5
_SIZE = {'width': 24, 'depth': 2, 'heads': 2, 'mlp': 48, 'patch': 4, 'image_size': 12}
_ERF = {**_SIZE, 'activation': 'gelu_erf'}
_ROPE = {**_ERF, 'heads': 3, 'rope': 'eva', 'rope_theta': 1e4}
_GATED = {**_SIZE, 'activation': 'silu', 'gated': True}
_DINO3 = {'rope': 'dinov3', 'positions': 'none', 'norm_eps': 1e-5, 'layer_scale': True}
# Name -> fields of `BackboneSpec`.
RANDOM = {
  'positions_of_registers': {**_ERF, 'registers': 3, 'layer_scale': True},
  'relu_norm_of_queries': {**_SIZE, 'activation': 'relu', 'qk_norm': 'head', 'pool': 'gap'},
  'rms': {**_ERF, 'norm': 'rms', 'final_norm': 'pooled', 'pool': 'gap'},
  'patch_norm': {**_ERF, 'patch_norm': True, 'norm_eps': 1e-5},
  'gated': {**_GATED, 'registers': 1, 'layer_scale': True},
  'gated_rms_no_patch_norm': {**_GATED, 'norm': 'rms', 'norm_eps': 1e-5, 'linear_bias': False},
  'no_positions': {**_ERF, 'positions': 'none', 'class_token': False, 'pool': 'gap'},
  'map_with_class_token': {**_ERF, 'pool': 'map'},
  'siglip_without_head': {**_SIZE, 'class_token': False, 'pool': 'gap'},
  'rope_key_bias': {**_ROPE, 'registers': 2},
  'rope_no_bias_pre_norm': {**_ROPE, 'qkv_bias': 'none', 'pre_norm': True, 'patch_bias': False},
  'rope_norm_of_queries_map': {**_ROPE, 'qkv_bias': 'qv', 'qk_norm': 'head', 'pool': 'map'},
  'rope_gated_key_bias': {**_ROPE, **_GATED, 'heads': 3, 'mlp_norm': True},
  'rope_gated_attn_norm': {**_ROPE, **_GATED, 'heads': 3, 'attn_norm': True, 'mlp': 50},
  'post_norm_key_bias': {**_ERF, 'block_norm': 'post', 'final_norm': 'none'},
  'dinov3_key_bias': {**_ERF, **_DINO3, 'heads': 3, 'registers': 1},
  'dinov3_no_registers_odd_mlp': {**_GATED, **_DINO3, 'heads': 3, 'mlp': 50, 'qkv_bias': 'qv'},
  'beit_absolute': {**_ERF, 'layer_scale': True, 'qkv_bias': 'qv', 'norm_eps': 1e-12},
  'beit_no_scale': {**_ERF, 'relative_positions': True, 'qkv_bias': 'none', 'positions': 'none'},
  'key_bias_added': {**_ERF, 'qkv_bias': 'qv', 'final_norm': 'none', 'layer_scale': True},
  'distilled_scale': {**_ERF, 'registers': 1, 'pool': 'cls_dist', 'layer_scale': True},
}
TUNED = ('timm_vit_augreg', 'timm_vit_gap', 'timm_siglip', 'hf_vit', 'hf_clip')


def write(out):
  from losa_scenic.common_lib import errors
  from losa_scenic.weights_lib import checkpoint, export, spelling

  def save(name, spec, params, library, expected, like=None):
    try:
      remarks = export.write(out / name, spec, params, library, like=like)
    except errors.UserError as error:
      print(f'{name}: not written: {error}')
      return
    np.savez(out / name / 'expected.npz', **expected)
    says = {'pool': spec.pool, 'prefix': spec.prefix, 'remarks': remarks}
    (out / name / 'case.json').write_text(json.dumps(says))

  for name, case in json.loads((CASES / 'INDEX.json').read_text()).items():
    files = [f for f in case['files'] if not f.endswith('.json')]
    path = CASES / name / files[0] if len(files) == 1 else CASES / name
    opened = checkpoint.open_checkpoint(path, {field: case[field] for field in case['needs']})
    params = {path: opened.read(path) for path in opened.shapes}
    like, expected = spelling.Original.of(opened), dict(np.load(CASES / name / 'expected.npz'))
    for library in LIBRARIES:
      save(f'{name}-{library}', opened.spec, params, library, expected)
      config = like.config
      if {'timm': 'architecture', 'transformers': 'model_type'}[library] in config:
        save(f'{name}-{library}-like', opened.spec, params, library, expected, like)
    if name in TUNED:
      for library in LIBRARIES:
        save(f'lora-{name}-{library}', *_tuned(opened.spec, params, expected, library))
  for name, fields in RANDOM.items():
    for library in LIBRARIES:
      save(f'random-{name}-{library}', *_random(name, fields, library))


def _tuned(spec, params, expected, library):
  """A backbone with random LoRA in every linear layer, merged, and the features of the adapted."""
  import jax

  from losa_scenic.adapt_lib import fold, lora
  from losa_scenic.common_lib import trees
  from losa_scenic.model_lib.adapted import Adapted

  targets = 'query,value,out' if spec.pool == 'map' else 'query,value,out,fc1,fc2'
  model = Adapted(spec, lora.build(spec, rank=3, targets=targets, map_head=True), 2)
  rng = np.random.default_rng(0)
  flat = {
    path: np.asarray(params[path.removeprefix('backbone/')], np.float32)
    if path.removeprefix('backbone/') in params
    else rng.normal(0, 0.2, leaf.shape).astype(np.float32)
    for path, leaf in trees.flatten(model.param_shapes()).items()
  }
  tree = trees.unflatten(flat)
  with jax.default_matmul_precision('highest'):
    pooled = model.apply({'params': tree}, expected['image'], method='features')
  far = np.abs(pooled - expected['pooled']).max() / np.abs(expected['pooled']).max()
  assert far > 0.05, far  # The increments count.
  merged = trees.flatten(fold.fold(model, tree))
  return spec, merged, library, {'image': expected['image'], 'pooled': np.asarray(pooled)}


def _random(name, fields, library):
  """A backbone with random values in all parameters."""
  import jax

  from losa_scenic.common_lib import trees
  from losa_scenic.model_lib.spec import BackboneSpec
  from losa_scenic.model_lib.vit import ViT
  from losa_scenic.weights_lib import checkpoint

  spec, rng = BackboneSpec(name=name, **fields), np.random.default_rng(0)
  params = {
    path: rng.normal(path.endswith('scale'), 0.3, shape).astype(np.float32)
    for path, shape in checkpoint.param_shapes(spec).items()
  }
  images = rng.normal(size=(2, *spec.input_shape)).astype(np.float32)
  with jax.default_matmul_precision('highest'):
    pooled = ViT(spec, {}).apply({'params': trees.unflatten(params)}, images)
  return spec, params, library, {'image': images, 'pooled': np.asarray(pooled)}


def check(out):
  import make_backbones  # noqa: F401 (torchvision for another build of torch)
  import torch

  worst = 0.0
  for folder in sorted(path.parent for path in out.glob('*/case.json')):
    says, expected = (
      json.loads((folder / 'case.json').read_text()),
      np.load(folder / 'expected.npz'),
    )
    config = json.loads((folder / 'config.json').read_text())
    build = _timm if 'architecture' in config else _transformers
    model, blocks, pooled = build(folder, config, says)
    model.eval()
    seen = []
    blocks[-1].register_forward_hook(
      lambda module, args, output, seen=seen: seen.append(
        output[0] if isinstance(output, tuple) else output
      )
    )
    with torch.no_grad():
      have = {'pooled': pooled(torch.tensor(expected['image']).permute(0, 3, 1, 2)).numpy()}
    have['last block'] = seen[0].numpy()
    want = {'pooled': expected['pooled']}
    if 'blocks' in expected:
      want['last block'] = expected['blocks'][-1]
    far = {k: float(np.abs(have[k] - want[k]).max() / np.abs(want[k]).max()) for k in want}
    worst = max(worst, *far.values())
    shown = ', '.join(f'{key} {value:.1e}' for key, value in far.items())
    mark = '' if max(far.values()) <= TOLERANCE else '   <-- TOO FAR'
    kind = config.get('architecture', config.get('model_type'))
    print(f'{folder.name:45} {kind:37} {shown}{mark}', *says['remarks'], flush=True)
  print(f'largest difference: {worst:.1e}')
  sys.exit(worst > TOLERANCE)


def _timm(folder, config, says):
  import timm

  path = str(folder / 'model.safetensors')
  model = timm.create_model(config['architecture'], checkpoint_path=path, **config['model_args'])
  hub = timm.create_model(f'local-dir:{folder}', pretrained=True)
  for name, weight in model.state_dict().items():
    assert (hub.state_dict()[name] == weight).all(), name
  mean = list(hub.pretrained_cfg['mean'])
  assert mean == config['pretrained_cfg']['mean'], mean
  return model, model.blocks, model


def _transformers(folder, config, says):
  import torch
  import transformers
  from backbone_pooling import naflex

  more = {'mask_ratio': 0.0} if config['model_type'] == 'vit_mae' else {}
  model, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True, **more)
  # What the encoder does not use, and DINOv3's empty array where there are no registers.
  unused = ['pooler.dense', 'mask_token']
  unused += [] if getattr(model.config, 'num_register_tokens', 1) else ['register_tokens']
  missing = [k for k in info['missing_keys'] if not any(part in k for part in unused)]
  assert not missing and not info['unexpected_keys'], info
  assert type(model).__name__ == config['architectures'][0]
  transformers.AutoImageProcessor.from_pretrained(folder)
  depth = model.config.num_hidden_layers
  blocks = next(
    m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth
  )

  def pooled(images):
    given = {}
    if more:
      count = model.embeddings.patch_embeddings.num_patches
      given['noise'] = torch.arange(count).expand(len(images), -1)
    output = model(pixel_values=images, **given)
    tokens = output.last_hidden_state
    if says['pool'] == 'map' or config['model_type'] in ('clip_vision_model', 'beit'):
      return output.pooler_output
    if says['pool'] == 'gap':
      return tokens[:, says['prefix'] :].mean(1)
    return tokens[:, :2].mean(1) if says['pool'] == 'cls_dist' else tokens[:, 0]

  return model, blocks, naflex(model) if config['model_type'] == 'siglip2_vision_model' else pooled


if __name__ == '__main__':
  {'write': write, 'check': check}[sys.argv[1]](pathlib.Path(sys.argv[2]))
