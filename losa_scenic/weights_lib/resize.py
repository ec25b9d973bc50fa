"""Position embeddings and relative position biases resampled to another token grid.

Each family of checkpoints has its own method, and the values of a resized model depend on it. All
are separable: one matrix [new, old] per axis, computed and applied in float64.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from losa_scenic.common_lib import errors

Grid = tuple[int, int]
Matrix = Float[np.ndarray, 'new old']


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
  """Cubic convolution kernel with slope `a` at distance 1 (Keys 1981)."""
  x = np.abs(x)
  near = 1 - (a + 3) * x**2 + (a + 2) * x**3
  far = a * (x**3 - 5 * x**2 + 8 * x - 4)
  return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _hat(x: np.ndarray) -> np.ndarray:
  """Triangle kernel of linear interpolation."""
  return np.maximum(1 - np.abs(x), 0.0)


def _antialiased(old: int, new: int, kernel: Callable[[np.ndarray], np.ndarray]) -> Matrix:
  """Pixel areas with a kernel that widens when the grid shrinks, cut off at the edges."""
  step = old / new
  centers = (np.arange(new) + 0.5) * step
  weights = kernel((np.arange(old) + 0.5 - centers[:, None]) / max(step, 1.0))
  return weights / weights.sum(axis=1, keepdims=True)


def _bicubic_antialias(old: int, new: int) -> Matrix:
  # PyTorch's antialiased cubic has the slope of Pillow's, the one without has OpenCV's.
  return _antialiased(old, new, lambda x: _cubic(x, a=-0.5))


def _bicubic(old: int, new: int, offset: float = 0.0) -> Matrix:
  """Four taps around each new centre; taps beyond the edge read the edge."""
  at = (np.arange(new) + 0.5) * old / (new + offset) - 0.5
  weights = np.zeros((new, old))
  for tap in range(-1, 3):
    source = np.floor(at).astype(int) + tap
    np.add.at(weights, (np.arange(new), np.clip(source, 0, old - 1)), _cubic(at - source, a=-0.75))
  return weights


def _bicubic_offset(old: int, new: int) -> Matrix:
  return _bicubic(old, new, offset=0.1)


def _bilinear_antialias(old: int, new: int) -> Matrix:
  return _antialiased(old, new, _hat)


def _zoom_linear(old: int, new: int) -> Matrix:
  # The quotient of integers never passes the last row. In scipy the rounded step can, and it then
  # writes zeros there (8 -> 26, 16 -> 30, 24 -> 42 ...); here the last row is the last row.
  at = np.arange(new) * (old - 1) / max(new - 1, 1)
  return _hat(np.arange(old) - at[:, None])


# Name -> the matrix [new, old] of one axis. The name says how the family's published code resizes:
#   'bicubic_antialias': torch's F.interpolate(mode='bicubic', antialias=True): timm, for all its
#     ViTs, BEiT, EVA; DINOv2 with registers, its own code and Hugging Face's.
#   'bicubic': the same without antialias: Hugging Face's ViT, DeiT, CLIP, SigLIP, DINOv2, BEiT.
#   'bicubic_offset': 'bicubic' as if the new grid were 0.1 larger (scale_factor = (new + 0.1) / old
#     in place of a size): the authors' code of DINO, and of DINOv2 without registers. Hugging Face
#     did the same in earlier releases.
#   'bilinear_antialias': mode='bilinear', antialias=True: SigLIP 2 NaFlex.
#   'zoom_linear': scipy.ndimage.zoom(order=1), corner to corner: vision_transformer, big_vision
#     (SigLIP's authors), Scenic.
METHODS: dict[str, Callable[[int, int], Matrix]] = {
  'bicubic_antialias': _bicubic_antialias,
  'bicubic': _bicubic,
  'bicubic_offset': _bicubic_offset,
  'bilinear_antialias': _bilinear_antialias,
  'zoom_linear': _zoom_linear,
}


def position_embedding(
  table: Float[np.ndarray, '*one old d'], old_grid: Grid, new_grid: Grid, prefix: int, method: str
) -> Float[np.ndarray, '*one new d']:
  """Resamples a position embedding to another grid.

  Args:
    table: [1, prefix + h w, d] or [prefix + h w, d], any float dtype; patches row by row.
    old_grid: (h, w) of the table.
    new_grid: (h, w) of the result.
    prefix: leading rows that are not on the grid (class token, registers); they stay as they are.
    method: a key of `METHODS`.

  Returns:
    The table of the new grid, with the rank and dtype of `table`; `table` itself if the grids are
    equal.

  Raises:
    errors.UserError: for an unknown method, a grid without patches, or a table of another shape.
  """
  axis = METHODS[errors.one_of('position embedding resize', method, METHODS)]
  (h, w), new_grid = _checked(old_grid), _checked(new_grid)
  rows = prefix + h * w
  if table.ndim not in (2, 3) or table.shape[-2] != rows or table.shape[:-2] not in ((), (1,)):
    raise errors.UserError(
      f'A position embedding of {prefix} + {h} x {w} tokens is [{rows}, d] or [1, {rows}, d], got '
      f'{list(table.shape)}.'
    )
  if new_grid == (h, w):
    return table
  matrices = axis(h, new_grid[0]), axis(w, new_grid[1])
  patches = _resample(table[..., prefix:, :].reshape(h, w, -1), matrices)
  patches = patches.reshape(*table.shape[:-2], -1, table.shape[-1])
  return np.concatenate([table[..., :prefix, :], patches], axis=-2)


def relative_bias(
  table: Float[np.ndarray, 'old heads'], old_grid: Grid, new_grid: Grid
) -> Float[np.ndarray, 'new heads']:
  """Resamples BEiT's table of relative position biases to another grid, as timm does.

  Old offsets are put at -.. -(1 + q) -1 0 1 (1 + q) (1 + q + q^2) .., with q such that the last one
  is the last new offset: near offsets keep their bias, far ones stretch. Interpolation between them
  is linear, in the published code of BEiT cubic (timm reads the same table linearly to do without
  scipy). Where q would be below 1.01, as in a smaller grid, offsets keep nearly their distance and
  the far ones fall away; where it would be above 1.5, what lies beyond the last one repeats it.

  Args:
    table: [(2h - 1)(2w - 1) + extra, heads], any float dtype; the last `extra` rows (3 with a class
      token, else 0) are of no offset and stay as they are.
    old_grid: (h, w) of the table.
    new_grid: (h, w) of the result.

  Returns:
    [(2h - 1)(2w - 1) + extra, heads] of the new grid in the dtype of `table`; `table` itself if the
    grids are equal.

  Raises:
    errors.UserError: for a grid without patches or a table of another shape.
  """
  grids = _checked(old_grid), _checked(new_grid)
  (h, w), (new_h, new_w) = (tuple(2 * side - 1 for side in grid) for grid in grids)
  if table.ndim != 2 or len(table) - h * w not in (0, 3):
    raise errors.UserError(
      f'A table of relative positions of {old_grid[0]} x {old_grid[1]} patches is '
      f'[{h * w}, heads], or [{h * w + 3}, heads] with a class token, got {list(table.shape)}.'
    )
  if grids[0] == grids[1]:
    return table
  matrices = _stretched(h, new_h), _stretched(w, new_w)
  offsets = _resample(table[: h * w].reshape(h, w, -1), matrices)
  return np.concatenate([offsets.reshape(new_h * new_w, -1), table[h * w :]])


def _stretched(old: int, new: int) -> Matrix:
  """Linear interpolation of offsets, the old ones at the sums of a geometric series."""
  far, low, high = old // 2, 1.01, 1.5
  ratio = low
  while high - low > 1e-6:  # timm's bisection: another tolerance would be another table.
    ratio = (low + high) / 2
    if (ratio**far - 1) / (ratio - 1) > new // 2:
      high = ratio
    else:
      low = ratio
  positive = np.cumsum(ratio ** np.arange(far))
  at = np.concatenate([-positive[::-1], [0.0], positive])
  return np.stack([np.interp(np.arange(new) - new // 2, at, one) for one in np.eye(old)], axis=1)


def _resample(grid: Float[np.ndarray, 'h w d'], matrices: tuple[Matrix, Matrix]) -> np.ndarray:
  """[h w d] -> [new_h new_w d], one matrix per axis; the dtype stays."""
  rows, columns = matrices
  values = np.tensordot(rows, grid.astype(np.float64), axes=1)
  return (columns @ values).astype(grid.dtype)


def _checked(grid: Grid) -> Grid:
  if len(grid) != 2 or min(grid) < 1:
    raise errors.UserError(f'A token grid is (h, w) with sides of at least 1, got {tuple(grid)}.')
  return grid[0], grid[1]
