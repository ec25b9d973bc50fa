"""Writes resize.npz: position embeddings resampled by the public code that families load with.

Nothing here imports losa_scenic. To write the file anew, in an environment of its own:

  pip install torch==2.13.0 timm==1.0.31 scipy==1.16.3 numpy==2.4.6
  python tests/golden/make_resize.py

Arrays in the file, float32:

  table/<h>x<w>                     [1, 1 + h w, 2], the first row stands for a class token
  <method>/<h>x<w>/<new h>x<new w>  the same resampled: 'bicubic_antialias' by timm, 'zoom_linear'
                                    by scipy, the others by torch as the families call it
  bias/<h>x<w>                      [(2h - 1)(2w - 1) + 3, 2] relative position biases
  bias/<h>x<w>/<new h>x<new w>      the same resampled by timm

scipy.ndimage.zoom writes zeros into the last row or column where its rounded step passes the end of
the input (8 -> 26); no such pair of sizes is among the cases.
"""

import pathlib

import numpy as np
import scipy.ndimage
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table

# Larger, smaller, odd and even, one axis only, not square, from one patch and to one patch.
SHAPES = [
  ((4, 4), (7, 7)),
  ((7, 7), (4, 4)),
  ((5, 6), (9, 3)),
  ((6, 4), (6, 9)),
  ((16, 16), (14, 14)),
  ((14, 14), (16, 16)),
  ((13, 13), (4, 5)),
  ((1, 1), (3, 2)),
  ((3, 2), (1, 1)),
]
BIAS_SHAPES = [
  ((4, 4), (7, 7)),
  ((7, 7), (4, 4)),
  ((5, 3), (6, 8)),
  ((5, 5), (5, 9)),
  ((9, 9), (14, 14)),
  ((2, 2), (6, 6)),
  ((1, 1), (2, 2)),
]


def _torch(grid: torch.Tensor, **kwargs) -> torch.Tensor:
  resized = F.interpolate(grid.permute(2, 0, 1)[None], align_corners=False, **kwargs)
  return resized[0].permute(1, 2, 0)


def _resampled(table: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> dict:
  (h, w), (new_h, new_w) = old, new
  grid = torch.from_numpy(table[0, 1:].reshape(h, w, -1))
  factors = ((new_h + 0.1) / h, (new_w + 0.1) / w)
  grids = {
    'bicubic': _torch(grid, size=new, mode='bicubic'),
    'bicubic_offset': _torch(grid, scale_factor=factors, mode='bicubic'),
    'bilinear_antialias': _torch(grid, size=new, mode='bilinear', antialias=True),
    'zoom_linear': scipy.ndimage.zoom(grid.numpy(), (new_h / h, new_w / w, 1), order=1),
  }
  out = {
    name: np.concatenate([table[:, :1], np.asarray(g).reshape(1, new_h * new_w, -1)], axis=1)
    for name, g in grids.items()
  }
  whole = resample_abs_pos_embed(torch.from_numpy(table), new, old_size=old, num_prefix_tokens=1)
  return out | {'bicubic_antialias': whole.numpy()}


def _name(grid: tuple[int, int]) -> str:
  return f'{grid[0]}x{grid[1]}'


def main() -> None:
  """Writes the file next to this script."""
  rng, arrays = np.random.default_rng(0), {}
  for old, new in SHAPES:
    fresh = rng.standard_normal((1, 1 + old[0] * old[1], 2)).astype(np.float32)
    table = arrays.setdefault(f'table/{_name(old)}', fresh)
    for method, resampled in _resampled(table, old, new).items():
      arrays[f'{method}/{_name(old)}/{_name(new)}'] = resampled
  for old, new in BIAS_SHAPES:
    rows, new_rows = ((2 * h - 1) * (2 * w - 1) + 3 for h, w in (old, new))
    fresh = rng.standard_normal((rows, 2)).astype(np.float32)
    table = arrays.setdefault(f'bias/{_name(old)}', fresh)
    resampled = resize_rel_pos_bias_table(
      torch.from_numpy(table), new, (new_rows, 2), old_window_size=old
    )
    arrays[f'bias/{_name(old)}/{_name(new)}'] = resampled.numpy()
  path = pathlib.Path(__file__).parent / 'resize.npz'
  np.savez_compressed(path, **arrays)
  print(f'{path}: {len(arrays)} arrays, {path.stat().st_size} bytes')


if __name__ == '__main__':
  main()
