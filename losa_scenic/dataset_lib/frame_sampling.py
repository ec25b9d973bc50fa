"""Which frames of a clip, and which squares of its frames, a model is shown.

A window is `num_frames` frames at equal distances: every `stride`-th, or, with `frames_per_second`,
those on screen at that rate, whatever the clip's own is. In training it starts anywhere (Arnab et
al.: ViViT, ICCV 2021, section 4.1); in testing several windows cover the clip, and three squares
the frame, whose predictions are averaged (ViViT's 'views': 4 x 3 on Kinetics).

A clip, or an annotated segment of one, that is shorter than the window is 'loop'ed, which begins
again after its last frame as often as needed, or 'pad'ded, which repeats its last frame.
"""

import math
from typing import NamedTuple

import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib.resize import Box
from losa_scenic.dataset_lib.video_file import VideoInfo

SHORT = ('loop', 'pad')
# Times in annotations are rounded: a frame that begins so much later still counts, in frames.
_SLACK = 1e-3


class Segment(NamedTuple):
  """An annotated part of a clip, in seconds from the clip's start.

  Attributes:
    start: its first moment.
    end: the moment after its last; None for the end of the clip.
  """

  start: float = 0.0
  end: float | None = None


WHOLE = Segment()


def frame_range(info: VideoInfo, segment: Segment = WHOLE) -> range:
  """Indices of the frames on screen in a segment.

  Args:
    info: of the clip.
    segment: a part of it. An end after the clip's is taken for the clip's.

  Returns:
    At least one index, consecutive, in [0, info.frames).

  Raises:
    errors.UserError: for a segment that is empty or does not begin inside the clip.
  """
  start, end = segment
  seconds = info.frames / info.frame_rate
  if not 0 <= start < seconds or (end is not None and not end > start):
    raise errors.UserError(
      f'A segment must begin inside the clip, which lasts {seconds:.2f} s, and end after its '
      f'beginning, not last from {start} to {end} s.'
    )
  first = min(int(start * info.frame_rate + _SLACK), info.frames - 1)
  stop = info.frames
  if end is not None and end < seconds:
    stop = math.ceil(end * info.frame_rate - _SLACK)
  return range(first, max(first + 1, min(stop, info.frames)))


def span(
  info: VideoInfo,
  num_frames: int,
  stride: int = 1,
  *,
  frames_per_second: float | None = None,
) -> int:
  """How many frames of a clip a window reaches over; the arguments are `random_window`'s."""
  return int(_steps(info, num_frames, stride, frames_per_second)[-1]) + 1


def random_window(
  info: VideoInfo,
  num_frames: int,
  rng: np.random.Generator,
  stride: int = 1,
  *,
  frames_per_second: float | None = None,
  segment: Segment = WHOLE,
  short: str = 'loop',
) -> np.ndarray:
  """A window at a random place of a clip, all places being equally likely; for training.

  Args:
    info: of the clip.
    num_frames: frames of the window.
    rng: draws one number, also for clips that leave no choice.
    stride: distance between two frames of the window, in frames of the clip.
    frames_per_second: in the stride's stead, frames of the window in a second. Above the clip's own
      rate, frames are repeated.
    segment: the part of the clip that is meant.
    short: what becomes of clips shorter than the window: 'loop' or 'pad'; they are shown from their
      first frame.

  Returns:
    int64 [num_frames], indices in `frame_range(info, segment)`.

  Raises:
    errors.UserError: for values out of range.
  """
  frames = frame_range(info, segment)
  steps = _steps(info, num_frames, stride, frames_per_second)
  spare = max(0, len(frames) - 1 - int(steps[-1]))
  return _window(frames, steps, int(rng.integers(spare + 1)), short)


def views(
  info: VideoInfo,
  num_frames: int,
  stride: int = 1,
  num_clips: int = 1,
  *,
  frames_per_second: float | None = None,
  segment: Segment = WHOLE,
  short: str = 'loop',
) -> np.ndarray:
  """Windows at equal distances, the first from the first frame and the last to the last.

  Args:
    info: of the clip.
    num_frames: frames of each window.
    stride: as of `random_window`.
    num_clips: windows; one is taken from the middle.
    frames_per_second: as of `random_window`.
    segment: as of `random_window`.
    short: as of `random_window`; all windows of such a clip are the same.

  Returns:
    int64 [num_clips, num_frames], indices in `frame_range(info, segment)`.

  Raises:
    errors.UserError: for values out of range.
  """
  errors.check_at_least('num_clips', num_clips, 1)
  frames = frame_range(info, segment)
  steps = _steps(info, num_frames, stride, frames_per_second)
  spare = max(0, len(frames) - 1 - int(steps[-1]))
  gaps = num_clips - 1
  starts = [spare // 2]
  if gaps:  # In integers, rounded to the nearest: the same on every machine.
    starts = [(2 * spare * i + gaps) // (2 * gaps) for i in range(num_clips)]
  return np.stack([_window(frames, steps, start, short) for start in starts])


def three_crops(height: int, width: int, side: int) -> tuple[Box, Box, Box]:
  """Three squares along the longer side of a frame: its two ends and its middle.

  Args:
    height: of the frame in pixels.
    width: of the frame in pixels.
    side: of the squares in pixels, at most the frame's shorter one.

  Returns:
    Left, centre, right, or of a frame higher than wide top, centre, bottom; in the other direction
    central.

  Raises:
    errors.UserError: if the squares do not fit.
  """
  errors.check_at_least('side', side, 1)
  if side > min(height, width):
    raise errors.UserError(
      f'Squares of {side} pixels do not fit into a frame of {width} x {height}.'
    )
  down, across = height - side, width - side
  if height > width:
    first, middle, last = ((top, across // 2) for top in (0, down // 2, down))
  else:
    first, middle, last = ((down // 2, left) for left in (0, across // 2, across))
  return Box(*first, side, side), Box(*middle, side, side), Box(*last, side, side)


def _steps(
  info: VideoInfo, num_frames: int, stride: int, frames_per_second: float | None
) -> np.ndarray:
  """Distances of a window's frames from its first, in frames of the clip: int64 [num_frames]."""
  errors.check_at_least('num_frames', num_frames, 1)
  errors.check_at_least('stride', stride, 1)
  if frames_per_second is None:
    return np.arange(num_frames) * stride
  if stride != 1:
    raise errors.UserError('Give a stride or frames_per_second, not both.')
  if not 0 < frames_per_second < math.inf:
    raise errors.UserError(f'frames_per_second must be above 0, not {frames_per_second}.')
  step = info.frame_rate / frames_per_second
  return np.floor(np.arange(num_frames) * step + _SLACK).astype(np.int64)


def _window(frames: range, steps: np.ndarray, start: int, short: str) -> np.ndarray:
  """The indices of a window that starts at the start-th of `frames`."""
  errors.one_of('way with short clips', short, SHORT)
  places = start + steps
  places = places % len(frames) if short == 'loop' else np.minimum(places, len(frames) - 1)
  return frames.start + places
