"""Videos to measure reading with: a camera that wanders over photos that come with scikit-learn.

With noise, as sensors have it: a picture that only moves would be little to decode.
"""

import math
import pathlib
from typing import TYPE_CHECKING

import cv2
import numpy as np
from sklearn import datasets

from losa_scenic.common_lib import errors

if TYPE_CHECKING:
  from collections.abc import Iterator

WIDTH, HEIGHT, FRAMES, RATE = 340, 256, 250, 25
_NOISE = 2.0  # standard deviation, of 0..255


def write(folder: pathlib.Path, gop: int, count: int, frames: int = FRAMES) -> list[str]:
  """Writes H.264 videos in MP4 that differ from each other; the same pictures each time.

  Args:
    folder: where; it must exist.
    gop: frames from one key frame to the next.
    count: number of files.
    frames: of each file, at 25 a second.

  Returns:
    The names of the files, relative to the folder.

  Raises:
    errors.UserError: if PyAV is not installed.
  """
  try:
    import av
  except ImportError as error:
    raise errors.UserError("Video needs PyAV: pip install 'losa_scenic[video]'.") from error
  files = [f'{i:04}.mp4' for i in range(count)]
  for i, file in enumerate(files):
    with av.open(str(folder / file), 'w') as container:
      stream = container.add_stream('libx264', rate=RATE)
      stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, 'yuv420p'
      stream.codec_context.gop_size, stream.codec_context.thread_count = gop, 1
      for picture in _pictures(i, frames):
        frame = av.VideoFrame.from_ndarray(picture, format='bgr24')
        container.mux(stream.encode(frame.reformat(format='yuv420p', threads=1)))
      container.mux(stream.encode())
  return files


def _pictures(seed: int, frames: int) -> 'Iterator[np.ndarray]':
  """uint8 [256, 340, 3], blue first: the photo under a camera that turns and comes nearer."""
  rng = np.random.default_rng(seed)
  photos = datasets.load_sample_images().images
  photo = cv2.cvtColor(photos[seed % len(photos)], cv2.COLOR_RGB2BGR)
  centre = np.array([photo.shape[1], photo.shape[0]]) / 2
  pace, phase = rng.uniform(0.5, 1.5, 4), rng.uniform(0, 2 * math.pi, 4)
  noise = rng.normal(0, _NOISE, (2 * HEIGHT, 2 * WIDTH, 3)).astype(np.float32)
  for i in range(frames):
    x, y, angle, scale = np.sin(pace * i / RATE + phase)
    matrix = cv2.getRotationMatrix2D(tuple(centre), 5 * angle, 0.9 + 0.1 * scale)
    matrix[:, 2] += np.array([WIDTH, HEIGHT]) / 2 - centre + (60 * x, 40 * y)
    shown = cv2.warpAffine(photo, matrix, (WIDTH, HEIGHT), borderMode=cv2.BORDER_REFLECT)
    top, left = rng.integers(HEIGHT), rng.integers(WIDTH)
    shown = shown + noise[top : top + HEIGHT, left : left + WIDTH]
    yield np.clip(np.rint(shown), 0, 255).astype(np.uint8)
