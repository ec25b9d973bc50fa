"""Ways from a video file to the frames of a window, in one thread each: what to compare.

All get the indices of the frames, and give them red first.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import video_cursor, video_file

OWN, EVERY = 'losa_scenic', 'PyAV, every frame'

# (file, indices [t]) -> uint8 [t, height, width, 3].
Read = Callable[[str, np.ndarray], np.ndarray]


def own(path: str, indices: np.ndarray) -> np.ndarray:
  """This package's: from the last key frame before a wanted frame."""
  return video_file.read_frames(path, indices)


def every_frame(path: str, indices: np.ndarray) -> np.ndarray:
  """PyAV, which decodes from the start to the last wanted frame; only the wanted become pixels."""
  import av

  found = {}
  with av.open(path) as container:
    stream = container.streams.video[0]
    stream.thread_type, stream.codec_context.thread_count = 'NONE', 1
    wanted, last = set(indices.tolist()), int(indices.max())
    for i, frame in enumerate(container.decode(stream)):
      if i in wanted:
        found[i] = frame.reformat(format='rgb24', threads=1).to_ndarray()
      if i == last:
        break
  return np.stack([found[i] for i in indices.tolist()])


def opencv_seek(path: str, indices: np.ndarray) -> np.ndarray:
  """OpenCV, told to go to the first wanted frame."""
  return _opencv(path, indices, seek=True)


def opencv_every_frame(path: str, indices: np.ndarray) -> np.ndarray:
  """OpenCV from the start to the last wanted frame; only the wanted become pixels."""
  return _opencv(path, indices, seek=False)


def _opencv(path: str, indices: np.ndarray, seek: bool) -> np.ndarray:
  wanted = np.unique(indices).tolist()
  capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
  try:
    place, found = 0, {}
    if seek:
      capture.set(cv2.CAP_PROP_POS_FRAMES, wanted[0])
      place = wanted[0]
    for i in wanted:
      while place < i:
        capture.grab()
        place += 1
      good, pixels = capture.read()
      if not good:
        raise errors.UserError(f'{path}: OpenCV cannot read frame {i}.')
      found[i], place = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), i + 1
  finally:
    capture.release()
  return np.stack([found[i] for i in indices.tolist()])


LOADERS: dict[str, Read] = {
  OWN: own,
  EVERY: every_frame,
  'OpenCV, seek': opencv_seek,
  'OpenCV, every frame': opencv_every_frame,
}


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
  """Counts the frames that this package's reader decodes inside the context: [number]."""
  number, original = [0], video_cursor.Cursor._decoded

  def counting(self: video_cursor.Cursor) -> Iterator[Any]:
    for shown in original(self):
      number[0] += 1
      yield shown

  video_cursor.Cursor._decoded = counting
  try:
    yield number
  finally:
    video_cursor.Cursor._decoded = original
