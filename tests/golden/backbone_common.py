"""What the scripts behind backbones/ share: random weights, exact outputs, the index."""

import dataclasses
import json
import math
import pathlib
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

OUT = pathlib.Path(__file__).with_name('backbones')
# Fields of an index entry that detection is to find; the defaults are filled in here.
DEFAULTS = {
  'class_token': True,
  'registers': 0,
  'gated': False,
  'norm': 'layer',
  'block_norm': 'pre',
  'final_norm': 'tokens',
  'patch_norm': False,
  'pre_norm': False,
  'attn_norm': False,
  'mlp_norm': False,
  'qk_norm': 'none',
  'layer_scale': False,
  'patch_bias': True,
  'qkv_bias': 'qkv',
  'linear_bias': True,
  'positions': 'learned',
  'rope': 'none',
  'relative_positions': False,
}
_SCALE_OF_BRANCH = re.compile(r'(^|\.)(gamma_[12]|lambda_?[12]|ls[12]|layer_scale[12])(\.|$)')
_NORM = re.compile(r'norm|(^|\.)ln_', re.IGNORECASE)
_TOKEN = re.compile(r'pos_embed|position|token|latent|probe|class_embed|relative|rel_pos')


@dataclasses.dataclass
class Golden:
  """A saved model and how its outputs are read.

  Attributes:
    model: the library's model, with the weights that were saved.
    blocks: its transformer blocks, whose outputs are recorded.
    pooled: images [2 3 h w] -> pooled features [2 d]; calls the model once.
    fields: what detection should find; see INDEX.json in the README.
    needs: fields that nothing in the saved files says.
    by_family: fields that only the architecture's name, or the project that such key names come
      from, says.
    about: library's class, and what is special, for the README.
  """

  model: torch.nn.Module
  blocks: Sequence[torch.nn.Module]
  pooled: Callable[[torch.Tensor], torch.Tensor]
  fields: dict[str, Any]
  needs: tuple[str, ...] = ()
  by_family: tuple[str, ...] = ()
  about: tuple[str, str, str] = ('', '', '')


def generator(name: str) -> np.random.Generator:
  """Random numbers that depend on nothing but the name."""
  return np.random.default_rng(zlib.crc32(name.encode()))


def values(rng: np.random.Generator, name: str, shape: Sequence[int]) -> np.ndarray:
  """Random values for a parameter of that name, far from every initial value."""
  x = np.asarray(rng.standard_normal(tuple(shape)))
  if _SCALE_OF_BRANCH.search(name):
    x = 0.5 + 0.2 * x
  elif _NORM.search(name) and name.endswith(('weight', 'scale')) and len(shape) == 1:
    x = 1 + 0.2 * x
  elif name.endswith('bias') and len(shape) == 1:
    x = 0.2 * x
  elif _TOKEN.search(name):
    x = 0.4 * x
  elif len(shape) == 4:  # A convolution over patches.
    x = x / math.sqrt(np.prod(shape[1:]))
  else:
    x = 0.2 * x
  return np.asarray(x, np.float32)


def randomize(model: torch.nn.Module, seed: str, dtype: torch.dtype = torch.float32) -> None:
  """Gives every parameter random values that `dtype` can hold."""
  rng = generator(seed)
  with torch.no_grad():
    for name, x in model.named_parameters():
      x.copy_(torch.from_numpy(values(rng, name, x.shape)).to(dtype))


def store_as(model: torch.nn.Module, dtype: torch.dtype) -> None:
  """Casts the parameters alone: rounded frequencies of rotary positions would be another model."""
  for x in model.parameters():
    x.data = x.data.to(dtype)


def run(golden: Golden, images: np.ndarray, dtype: torch.dtype) -> dict[str, np.ndarray]:
  """Images [2 h w 3] -> {'blocks': [depth 2 n d], 'pooled': [2 d]}, computed in `dtype`."""
  seen: list[torch.Tensor] = []

  def keep(module, args, output):
    del module, args
    seen.append(output[0] if isinstance(output, tuple) else output)

  golden.model.to(dtype).eval()
  hooks = [block.register_forward_hook(keep) for block in golden.blocks]
  with torch.no_grad():
    pooled = golden.pooled(torch.tensor(images, dtype=dtype).permute(0, 3, 1, 2))
  for hook in hooks:
    hook.remove()
  return {'blocks': torch.stack(seen).numpy(), 'pooled': pooled.numpy()}


def tensor_files(folder: pathlib.Path) -> list[str]:
  return sorted(
    str(p.relative_to(folder))
    for p in folder.rglob('*')
    if p.is_file() and p.name != 'expected.npz'
  )


def write(name: str, make: Callable[[pathlib.Path, str], Golden]) -> None:
  """Makes a case: saves the model in its folder, then what it computes, then its index entry."""
  folder = OUT / name
  folder.mkdir(parents=True, exist_ok=True)
  for old in tensor_files(folder):
    (folder / old).unlink()
  golden = make(folder, name)
  side, width = golden.fields['image_size'], golden.fields['width']
  # Few different values, so that the file compresses well.
  images = generator(f'{name} images').integers(-8, 9, (2, side, side, 3)).astype(np.float32) / 4
  for file in tensor_files(folder):
    (folder / file).chmod(0o644)  # safetensors makes them private.
  single, exact = (run(golden, images, dtype) for dtype in (torch.float32, torch.float64))
  far = max(np.abs(single[k] - x).max() / np.abs(x).max() for k, x in exact.items())
  depth, _, tokens, _ = exact['blocks'].shape
  assert exact['blocks'].shape == (golden.fields['depth'], 2, tokens, width), exact['blocks'].shape
  assert exact['pooled'].shape == (2, width), exact['pooled'].shape
  grid = side // golden.fields['patch']
  fields = {**DEFAULTS, **golden.fields, 'tokens': tokens}
  assert tokens == grid**2 + fields['class_token'] + fields['registers'], (name, tokens)
  arrays = {k: x.astype(np.float32) for k, x in exact.items()}
  np.savez_compressed(folder / 'expected.npz', image=images, **arrays)
  library, klass, special = golden.about
  entry = {
    'files': tensor_files(folder),
    'library': library,
    'class': klass,
    'about': special,
    **fields,
    'needs': list(golden.needs),
    'by_family': list(golden.by_family),
  }
  index(name, entry)
  size = sum(p.stat().st_size for p in folder.rglob('*') if p.is_file())
  rms = [f'{np.sqrt((x**2).mean()):.1f}' for x in exact['blocks']]
  print(f'{name:34} {size:6} bytes, depth {depth}, rms {rms}, float32 off by {far:.0e}', flush=True)


def index(name: str, entry: dict[str, Any]) -> None:
  """Adds an entry to INDEX.json."""
  path = OUT / 'INDEX.json'
  entries = json.loads(path.read_text()) if path.exists() else {}
  entries[name] = entry
  lines = ',\n'.join(f'{json.dumps(k)}: {json.dumps(entries[k])}' for k in sorted(entries))
  path.write_text('{\n' + lines + '\n}\n')


_POOLED = {
  ('cls', 'tokens'): 'class token, normed',
  ('cls', 'none'): 'class token of the last block',
  ('cls_dist', 'tokens'): 'mean of class and distillation token, normed',
  ('gap', 'tokens'): 'mean of the normed patch tokens',
  ('gap', 'pooled'): 'norm of the mean of the patch tokens',
  ('gap', 'none'): 'mean of the patch tokens of the last block',
  ('map', 'tokens'): 'map head over the normed tokens',
}


def write_table() -> None:
  """Writes the table of cases at the end of README.md, from INDEX.json."""
  path = OUT / 'README.md'
  mark = '<!-- written by make_backbones.py from here on -->\n'
  head = path.read_text().split(mark)[0]
  rows = ['| case | library | class or architecture | pooled | special |', '|---|---|---|---|---|']
  for name, case in json.loads((OUT / 'INDEX.json').read_text()).items():
    pooled = _POOLED[case['pool'], case['final_norm']]
    rows.append(f'| {name} | {case["library"]} | {case["class"]} | {pooled} | {case["about"]} |')
  path.write_text(head + mark + '\n' + '\n'.join(rows) + '\n')
