"""Writes peft_vit.npz: features and gradients of public adaptation code, for tests of our methods.

A tiny ViT with random weights (transformers) is adapted by peft and by adapters (AdapterHub), all
parameters of the adapter are random, and one loss is differentiated. Nothing here imports
losa_scenic: whoever changes a method does not change what it is compared with.

To write the file anew, in an environment of its own:

  pip install torch==2.13.0 transformers==4.57.6 peft==0.21.2 adapters==1.3.0 numpy==2.4.6
  python tests/golden/make_peft.py

Arrays in the file, with parameter names and layouts as in those packages:

  images               [2 3 32 32]
  cotangent            [2 32]; the loss is sum(feature * cotangent)
  plain/param/<name>   weights of the ViT
  plain/feature        [2 32], the class token after the final LayerNorm, without an adapter
  <case>/param/<name>  parameters of the adapter, whose gradient follows
  <case>/grad/<name>
  <case>/frozen/<name> random matrices that the adapter does not train
  <case>/feature

Everything is computed in float64 from float32 parameters and stored in float32. The script prints
how far the same computation in float32 is from that, relative to the largest value.

Where the adapters stand, read from adapters 1.3.0 (methods/modeling.py, models/vit): a sequential
bottleneck in a ViT is called with y, the output of the attention or of the MLP, and u, the residual
stream before it. With original_ln_before=False it yields u + y + up(act(down(y))): the adapter
reads the branch ('bottleneck_mlp', and 'bottleneck_both', which is 'double_seq_bn', Houlsby et al.
2019). With original_ln_before=True, the package's own 'seq_bn' (Pfeiffer et al. 2020), it yields
u + y + up(act(down(u + y))): the adapter reads the residual stream, so this is no case here. That
with a learned scale for each channel is 'adapter_plus'. 'par_bn' yields u + y + s up(act(down(u))).
"""

import pathlib
import zlib

import adapters
import numpy as np
import peft
import torch
import transformers

OUT = pathlib.Path(__file__).with_name('peft_vit.npz')
QV = r'.*\.attention\.(query|value)'
MLP = r'.*\.layer\.\d+\.(intermediate|output)\.dense'
QV_MLP = rf'{QV}|{MLP}'
ALL = rf'.*\.attention\.(query|key|value)|.*\.attention\.output\.dense|{MLP}'


def _lora(targets, **kwargs):
  return peft.LoraConfig(target_modules=targets, r=4, lora_alpha=8, **kwargs)


def _bottleneck(mlp=True, attn=False, **kwargs):
  fields = {'reduction_factor': 8, 'non_linearity': 'gelu'} | kwargs
  return adapters.BnConfig(mh_adapter=attn, output_adapter=mlp, **fields)


CASES = {
  'lora_qv': _lora(QV),
  'lora_all': _lora(ALL),
  'dora_qv': _lora(QV, use_dora=True),
  'dora_qv_mlp': _lora(QV_MLP, use_dora=True),
  'vera_qv': peft.VeraConfig(target_modules=QV, r=6),
  'vera_qv_mlp': peft.VeraConfig(target_modules=QV_MLP, r=6),  # Slices the shared matrices.
  'bottleneck_mlp': _bottleneck(non_linearity='quick_gelu'),
  'bottleneck_both': _bottleneck(attn=True),
  'adapter_plus': adapters.AdapterPlusConfig(reduction_factor=8, stochastic_depth=0.0),
  'par_bn': adapters.ParBnConfig(reduction_factor=8, scaling=0.5),
  'prefix': adapters.PrefixTuningConfig(flat=True, prefix_length=5),
  'prompt': adapters.PromptTuningConfig(prompt_length=5, combine='prefix_after_bos'),
}


def _random(rng, name, shape):
  """Far from every initial value, so that no term of an equation vanishes."""
  values = rng.standard_normal(shape)
  if 'layernorm' in name and name.endswith('weight'):
    values = 1 + 0.2 * values
  elif 'vera' in name:
    values = 0.5 * values
  elif not name.endswith(('control_trans', 'prompt_embedding.weight', 'scaling')):
    values = 0.2 * values
  return values.astype(np.float32)


def _set(tensor, values):
  with torch.no_grad():
    tensor.copy_(torch.from_numpy(values))


def plain(weights=None):
  """The ViT, with those weights if given."""
  config = transformers.ViTConfig(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=64,
    hidden_act='gelu',
    layer_norm_eps=1e-6,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    image_size=32,
    patch_size=8,
    attn_implementation='sdpa',  # The package's eager softmax is float32 even in float64.
  )
  model = transformers.ViTModel(config, add_pooling_layer=False)
  for name, tensor in model.named_parameters():
    if weights:
      _set(tensor, weights[name])
  return model.eval()


def adapted(config, weights):
  """-> (model, its trainable parameters by name, its random frozen matrices by name)."""
  model = plain(weights)
  frozen = {}
  if isinstance(config, peft.PeftConfig):
    model = peft.get_peft_model(model, config)
    if isinstance(config, peft.VeraConfig):
      frozen = {k: getattr(model.base_model, k)['default'] for k in ('vera_A', 'vera_B')}
  else:
    adapters.init(model)
    model.add_adapter('default', config=config, set_active=True)
    model.train_adapter('default')
  trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
  return model.eval(), trained, frozen


def feature_and_grads(model, trained, images, cotangent, dtype):
  """The class token after the final norm, and the gradients by name, as numpy arrays."""
  model = model.to(dtype)
  feature = model(pixel_values=torch.tensor(images, dtype=dtype)).last_hidden_state[:, 0]
  (feature * torch.tensor(cotangent, dtype=dtype)).sum().backward()
  grads = {name: x.grad.numpy().copy() for name, x in trained.items()}
  model.zero_grad()
  return feature.detach().numpy().copy(), grads


def distance(have, want):
  """Largest difference relative to the largest value."""
  return np.abs(have - want).max() / np.abs(want).max()


def main():
  rng = np.random.default_rng(0)
  images = rng.standard_normal((2, 3, 32, 32)).astype(np.float32)
  cotangent = rng.standard_normal((2, 32)).astype(np.float32)
  weights = {name: _random(rng, name, x.shape) for name, x in plain().named_parameters()}
  out = {'images': images, 'cotangent': cotangent}
  out |= {f'plain/param/{name}': values for name, values in weights.items()}
  with torch.no_grad():
    model = plain(weights).to(torch.float64)
    feature = model(pixel_values=torch.from_numpy(images).double()).last_hidden_state[:, 0]
  out['plain/feature'] = feature.numpy()
  for case, config in CASES.items():
    rng = np.random.default_rng(zlib.crc32(case.encode()))
    model, trained, frozen = adapted(config, weights)
    for name, x in frozen.items():
      _set(x, _random(rng, name, x.shape))
      out[f'{case}/frozen/{name}'] = x.numpy().copy()
    for name, x in trained.items():
      values = _random(rng, name, x.shape)
      if 'magnitude' in name:  # Starts at the norms of the pretrained weight.
        values = x.detach().numpy() * (1 + values)
      _set(x, values)
      out[f'{case}/param/{name}'] = values
    single = feature_and_grads(model, trained, images, cotangent, torch.float32)
    feature, grads = feature_and_grads(model, trained, images, cotangent, torch.float64)
    out[f'{case}/feature'] = feature
    out |= {f'{case}/grad/{name}': grad for name, grad in grads.items()}
    far = max(distance(single[1][name], grad) for name, grad in grads.items())
    count = sum(grad.size for grad in grads.values())
    matters = distance(feature, out['plain/feature'])
    print(
      f'{case:18} {len(grads):3} gradients of {count:5} values; float32 against float64: '
      f'feature {distance(single[0], feature):.1e}, gradients {far:.1e}; '
      f'the adapter changes the feature by {matters:.2f}'
    )
  np.savez_compressed(OUT, **{key: np.asarray(x, np.float32) for key, x in out.items()})
  print(f'{OUT.name}: {OUT.stat().st_size} bytes, {len(out)} arrays')


if __name__ == '__main__':
  main()
