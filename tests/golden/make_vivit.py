"""Writes vivit.npz: what public video transformers compute, for tests of our clip backbones.

Tiny models of transformers with random weights see two clips. Nothing here imports losa_scenic:
whoever changes a clip backbone does not change what it is compared with.

To write the file anew, in an environment of its own:

  pip install torch==2.13.0 transformers==5.23.0 numpy==2.4.6
  python tests/golden/make_vivit.py

Arrays in the file:

  clips                [2 8 12 12 3], already normalised
  <case>/config        the model's config.json, a text
  <case>/param/<name>  its weights, names and layouts as save_pretrained writes them for the hub
  <case>/tokens        last_hidden_state: [2 n 24], or [2 t n 24] of segments
  <case>/features      [2 24]

Cases:

  vivit       VivitForVideoClassification: tubelets and a class token, all of which attend to each
              other. `tokens` are normed, `features` their class token, the classifier's input.
  vivit_bare  VivitModel without biases of query, key and value, tubelets of 4 frames, 3 heads.
  segments    VivitModel for the 2 frames of one tubelet, run on each tubelet of the clip by itself;
              `features` are the mean of the class tokens: a factorised clip backbone.
  videomae    VideoMAEForVideoClassification: no class token, fixed sinusoid positions, no bias of
              the keys. `tokens` are the last block's, `features` the normed mean of them, the
              classifier's input. All norms have its epsilon of that last one.

Everything is computed in float64 from float32 parameters and stored in float32. The script prints
how far the same computation in float32 is from that, relative to the largest value.
"""

import pathlib
import tempfile
import zlib

import numpy as np
import safetensors.numpy
import torch
import transformers

OUT = pathlib.Path(__file__).with_name('vivit.npz')
FRAMES, SIDE, PATCH = 8, 12, 4
SIZE = {
  'image_size': SIDE,
  'hidden_size': 24,
  'num_hidden_layers': 2,
  'intermediate_size': 40,
  'num_labels': 2,
  'attn_implementation': 'sdpa',  # The eager softmax is float32 even in float64.
}


def _vivit(frames, tubelet, heads=2, **kwargs):
  sizes = {'num_frames': frames, 'tubelet_size': [tubelet, PATCH, PATCH]}
  return transformers.VivitConfig(**SIZE, **sizes, num_attention_heads=heads, **kwargs)


def _videomae():
  sizes = {'num_frames': FRAMES, 'tubelet_size': 2, 'patch_size': PATCH, 'num_attention_heads': 2}
  # The norm after the pooling has the epsilon of torch's LayerNorm, whatever the config says.
  return transformers.VideoMAEConfig(**SIZE, **sizes, layer_norm_eps=1e-5)


def _class_token(model, clips):
  tokens = getattr(model, 'vivit', model)(clips).last_hidden_state
  return tokens, tokens[:, 0]


def _class_tokens_of_segments(model, clips):
  tokens = torch.stack([model(part).last_hidden_state for part in clips.split(2, dim=1)], dim=1)
  return tokens, tokens[:, :, 0].mean(dim=1)


def _normed_mean(model, clips):
  """The features are recorded where the model itself computes them."""
  seen = []
  hook = model.classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
  model(clips)
  hook.remove()
  return model.videomae(clips).last_hidden_state, seen[0]


CASES = {
  'vivit': (transformers.VivitForVideoClassification, lambda: _vivit(FRAMES, 2), _class_token),
  'vivit_bare': (
    transformers.VivitModel,
    lambda: _vivit(FRAMES, 4, heads=3, qkv_bias=False),
    _class_token,
  ),
  'segments': (transformers.VivitModel, lambda: _vivit(2, 2), _class_tokens_of_segments),
  'videomae': (transformers.VideoMAEForVideoClassification, _videomae, _normed_mean),
}


def _random(rng, name, shape):
  """Far from every initial value, so that no term counts for nothing; few different ones."""
  values = rng.standard_normal(shape)
  if 'norm' in name and name.endswith('weight'):
    values = 1 + 0.2 * values
  elif len(shape) == 5:  # The convolution over tubelets.
    values = values / np.sqrt(np.prod(shape[1:]))
  else:
    values = (0.4 if 'token' in name or 'position' in name else 0.2) * values
  return (np.round(64 * values) / 64).astype(np.float32)


def randomize(model, case):
  rng = np.random.default_rng(zlib.crc32(case.encode()))
  with torch.no_grad():
    for name, x in model.named_parameters():
      x.copy_(torch.from_numpy(_random(rng, name, x.shape)))


def saved(model):
  """(config.json, {name: array}) as the library writes them."""
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    folder = pathlib.Path(folder)
    tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
    return (folder / 'config.json').read_text(), tensors


def run(model, outputs, clips, dtype):
  """Clips [b t h w 3] -> [tokens, features], computed in `dtype`."""
  clips = torch.tensor(clips, dtype=dtype).permute(0, 1, 4, 2, 3)
  with torch.no_grad():
    return [x.numpy() for x in outputs(model.to(dtype), clips)]


def main():
  transformers.utils.logging.disable_progress_bar()
  shape = (2, FRAMES, SIDE, SIDE, 3)
  clips = np.random.default_rng(0).integers(-8, 9, shape).astype(np.float32) / 4
  out = {'clips': clips}
  for case, (klass, config, outputs) in CASES.items():
    model = klass(config()).eval()
    randomize(model, case)
    text, tensors = saved(model)
    out[f'{case}/config'] = np.asarray(text)
    out |= {f'{case}/param/{name}': x for name, x in tensors.items()}
    single = run(model, outputs, clips, torch.float32)
    exact = run(model, outputs, clips, torch.float64)
    for what, x in zip(('tokens', 'features'), exact, strict=True):
      out[f'{case}/{what}'] = x.astype(np.float32)
    far = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(single, exact, strict=True)]
    print(f'{case:10} tokens {exact[0].shape}, float32 off by {far[0]:.0e} and {far[1]:.0e}')
  np.savez_compressed(OUT, **out)
  print(f'{OUT.name}: {OUT.stat().st_size} bytes, {len(out)} arrays')


if __name__ == '__main__':
  main()
