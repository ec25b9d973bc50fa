"""Clips that are stored as encoded images, one per frame."""

from collections.abc import Sequence

import numpy as np

from losa_scenic.dataset_lib import decode
from losa_scenic.dataset_lib.sources import BadImage


def decode_frames(
  encoded: Sequence[bytes], indices: Sequence[int] | np.ndarray, name: str
) -> np.ndarray:
  """Decodes some frames by the rule of `decode`.

  Args:
    encoded: the frames of the clip in their order, each an image file of one of `decode.FORMATS`.
    indices: integers [t] >= 0, t >= 1, in any order, also repeated; after the end, the last frame.
    name: what to call the clip in an error.

  Returns:
    uint8 [t, height, width, 3], red first.

  Raises:
    BadImage: for a clip without frames, for a wanted frame that cannot be decoded, and if the
      wanted frames have different sizes.
    ValueError: for other indices.
  """
  wanted = np.asarray(indices)
  if wanted.ndim != 1 or not wanted.size or wanted.dtype.kind not in 'iu' or wanted.min() < 0:
    raise ValueError(f'`indices` are integers from 0, at least one, not {indices}.')
  if not len(encoded):
    raise BadImage(name, 'the clip has no frames')
  different, places = np.unique(np.minimum(wanted, len(encoded) - 1), return_inverse=True)
  frames = np.empty((0,), np.uint8)
  for n, index in enumerate(different.tolist()):
    try:
      pixels = decode.decode(encoded[index], name)
    except BadImage as error:
      raise BadImage(name, f'frame {index}: {error.reason}') from error
    if not n:
      frames = np.empty((len(different), *pixels.shape), np.uint8)
    if pixels.shape != frames.shape[1:]:
      raise BadImage(name, 'its frames change their size')
    frames[n] = pixels
  return frames if np.array_equal(places, np.arange(len(frames))) else frames[places]
