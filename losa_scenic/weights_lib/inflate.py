"""Parameters of an image backbone as those of a clip backbone of the same width and depth.

The patch kernel is inflated to tubelets, the position embedding is repeated in time, and everything
else stays: Arnab et al. 2021 (ViViT), section 3.4, https://arxiv.org/abs/2103.15691.

Of a clip that shows one image all the time, the tokens of every frame are then the image's. Where
all tokens are patches they stay so through every block, because attention over tokens that each
occur n_t times is attention over them once; and so do features pooled by 'gap' or 'map'. A class
token or a register still occurs once, so patches weigh n_t times as much beside it as in the image:
features of such a backbone are near the image's, not equal. In a factorised backbone every time has
its own, and its positions are the image's: there features of a still clip always are the image's.

A frozen kernel stays what it was inflated to: with 'central_frame' a tubelet's other frames are
never seen, with 'average' only the mean of all of them is.
"""

from collections.abc import Collection

import numpy as np
from jaxtyping import Float

from losa_scenic.common_lib import errors
from losa_scenic.model_lib.spec import BackboneSpec
from losa_scenic.weights_lib import resize

# Fields of a `BackboneSpec` that make a clip's of an image's.
FIELDS = ('frames', 'tubelet', 'factorised', 'inflation')
METHODS = ('central_frame', 'average')


def check(old: BackboneSpec, new: BackboneSpec, given: Collection[str]) -> None:
  """Raises `UserError` if the weights of `old` cannot become those of `new` in time.

  Args:
    old: what the weights are for.
    new: what they shall be for.
    given: the fields that a user has stated.
  """
  errors.one_of('backbone_configs.inflation', new.inflation, METHODS)
  in_time = [(spec.frames, spec.tubelet, spec.factorised) for spec in (old, new)]
  if old.frames and in_time[0] != in_time[1]:
    known = (
      f'{spec.frames} frames in tubelets of {spec.tubelet}{", factorised" * spec.factorised}'
      for spec in (old, new)
    )
    raise errors.UserError(
      f"Backbone '{old.name}' is for clips of {', not '.join(known)}: only weights of images can "
      'become those of other clips.'
    )
  if 'inflation' in given and (old.frames or not new.frames):
    why = (
      f"'{old.name}' is for clips already." if old.frames else 'Give backbone_configs.frames, too.'
    )
    raise errors.UserError(
      f'backbone_configs.inflation makes weights of clips from weights of images. {why}'
    )


def patch_kernel(
  kernel: Float[np.ndarray, 'rows d'], tubelet: int, method: str
) -> Float[np.ndarray, 'tubelet_rows d']:
  """The patch kernel of an image as that of tubelets.

  Args:
    kernel: [p p 3, d], any float dtype.
    tubelet: t, frames of a tubelet, at least 1.
    method: 'central_frame' (the kernel at frame t // 2, counted from 0, and zeros elsewhere) or
      'average' (the kernel divided by t at every frame: "filter inflation", Carreira and Zisserman
      2017).

  Returns:
    [t p p 3, d] in the dtype of `kernel`, time slowest, as `layers.PatchEmbed` reads it.

  Raises:
    errors.UserError: for an unknown method.
  """
  if errors.one_of('inflation', method, METHODS) == 'average':
    each = (kernel.astype(np.float64) / tubelet).astype(kernel.dtype)
    return np.concatenate([each] * tubelet)
  rows = len(kernel)
  inflated = np.zeros((tubelet * rows, kernel.shape[1]), kernel.dtype)
  start = tubelet // 2 * rows
  inflated[start : start + rows] = kernel
  return inflated


def positions(
  table: Float[np.ndarray, '1 old d'], old: BackboneSpec, new: BackboneSpec
) -> Float[np.ndarray, '1 new d']:
  """A position embedding for another grid: each frame's resampled, an image's repeated in time.

  Args:
    table: [1, prefix + t h w, d], any float dtype, time slowest; the rows of class token and
      registers come first and stay as they are.
    old: what the table is for; its `position_resize` says how to resample.
    new: what it shall be for; as many frames as `old`, unless that is for images.

  Returns:
    [1, prefix + t h w, d] of the new grid, in the dtype of `table`.
  """
  own, grid = np.split(table, [old.prefix], axis=1)
  spaces = old.grid[1:], new.grid[1:]
  frames = [
    resize.position_embedding(frame, *spaces, 0, old.position_resize)
    for frame in np.split(grid, old.grid[0] // old.sequences, axis=1)
  ]
  repeats = 1 if old.frames or new.factorised else new.grid[0]
  return np.concatenate([own, *frames * repeats], axis=1)
