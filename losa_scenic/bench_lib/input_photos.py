"""JPEG files to measure input with: photos that come with scikit-learn, cut, mirrored and joined.

Joined rather than enlarged, so that a large file has as much detail per pixel, and so as many bytes
to decode, as a photo of that size has.
"""

import itertools
import pathlib

import cv2
import numpy as np
from sklearn import datasets

QUALITY = 92  # of the encoder: 44 to 71 kB for 500 x 375 pixels


def write(folder: pathlib.Path, width: int, height: int, count: int) -> list[str]:
  """Writes files that differ from each other; the same ones each time.

  Args:
    folder: where; it must exist.
    width: of each image, in pixels.
    height: the same.
    count: number of files.

  Returns:
    The names of the files, relative to the folder.
  """
  photos = datasets.load_sample_images().images
  rng = np.random.default_rng(0)
  tallest, widest = photos[0].shape[:2]
  # As few pieces as the size of the photos allows.
  rows = np.linspace(0, height, -(-height // tallest) + 1).astype(int)
  columns = np.linspace(0, width, -(-width // widest) + 1).astype(int)
  files = [f'{i:04}.jpg' for i in range(count)]
  image = np.empty((height, width, 3), np.uint8)
  for file in files:
    for top, bottom in itertools.pairwise(rows):
      for left, right in itertools.pairwise(columns):
        photo = photos[rng.integers(len(photos))]
        image[top:bottom, left:right] = _piece(rng, photo, bottom - top, right - left)
    encoded = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    cv2.imwrite(str(folder / file), encoded, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
  return files


def _piece(rng: np.random.Generator, photo: np.ndarray, height: int, width: int) -> np.ndarray:
  """A part of a photo, mirrored half of the time."""
  top = rng.integers(photo.shape[0] - height + 1)
  left = rng.integers(photo.shape[1] - width + 1)
  piece = photo[top : top + height, left : left + width]
  return piece[:, ::-1] if rng.random() < 0.5 else piece
