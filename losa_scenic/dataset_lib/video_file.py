"""Frames of one video file: mp4, mov, mkv, webm, avi, mpg, ts, gif, wmv, flv or ogv.

Frame i of a clip is the one on screen at its time: the last whose presentation time, counted from
the clip's start and multiplied by the frame rate, rounds to at most i. At a constant frame rate it
is the i-th frame. A clip of varying rate is read by time, so that motion keeps its speed: a frame
that stays longer has several indices.

Only what is wanted is decoded (see `video_cursor`), in one thread, and no more than two frames are
held beside the wanted ones and the decoder's own. Pixels are as stored, up to the rotation and
mirroring that the file asks for: pixels that are not square are not stretched, transparent ones are
laid over white. Colours follow the matrix and range that the file states, else BT.601.
"""

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import video_cursor, video_truncation
from losa_scenic.dataset_lib.decode import MAX_PIXELS
from losa_scenic.dataset_lib.sources import BadImage

if TYPE_CHECKING:
  from av.container import InputContainer
  from av.video.frame import VideoFrame
  from av.video.stream import VideoStream

EXTENSIONS = ('.mp4', '.m4v', '.mov', '.mkv', '.webm', '.avi', '.mpg', '.mpeg', '.ts')
EXTENSIONS += ('.gif', '.wmv', '.flv', '.ogv')
# FFmpeg's names. It knows formats that open other files, or draw any text: those stay shut.
_FORMATS = ('mov', 'matroska', 'avi', 'mpeg', 'mpegvideo', 'mpegts', 'gif', 'asf', 'flv', 'ogg')
_UPRIGHT = (1, 0, 0, 1)
_RESIZED = 'its frames change their size'


class VideoInfo(NamedTuple):
  """What a video file holds.

  Attributes:
    width: in pixels, as displayed.
    height: in pixels, as displayed.
    frames: the indices in [0, frames) show the clip, at a varying rate up to its very last frame.
      Exact for mp4, mov, avi and gif; else the duration times the rate, rounded.
    frame_rate: frames per second; the mean where it varies.
    duration_seconds: from the first frame to the end of the last.
    rotation: 0, 90, 180 or 270 degrees, clockwise, that stored pictures are turned for display.
  """

  width: int
  height: int
  frames: int
  frame_rate: float
  duration_seconds: float
  rotation: int


class Scan(NamedTuple):
  """What decoding every frame of a clip has shown.

  Attributes:
    codec: FFmpeg's name of how the pictures are coded: 'h264'.
    frames: number of different frames.
    varying: whether some of them stay on screen for at least half as long again as others.
  """

  codec: str
  frames: int
  varying: bool


def probe(path: str | os.PathLike[str]) -> VideoInfo:
  """Looks at a video file: decodes its first frame, and reads through those without a duration.

  Args:
    path: of the file.

  Returns:
    Its sizes and times.

  Raises:
    BadImage: if it is missing, empty, truncated, without pictures, damaged or no video.
    errors.UserError: if PyAV is not installed.
  """
  with _opened(path) as (container, stream):
    clock = video_cursor.Clock(container, stream)
    frame = video_cursor.Cursor(container, stream, clock).at(clock.start)
    a, b, c, _ = _orientation(frame)
    sides = (frame.width, frame.height) if abs(a) > abs(c) else (frame.height, frame.width)
    degrees = round(math.atan2(b, a) / (math.pi / 2)) * 90 % 360
    shown = stream.frames and stream.frames - video_cursor.hidden_frames(container, stream)
    seconds = video_cursor.stated_seconds(container, stream)
  if not seconds:  # Demuxing moved on, so it starts anew.
    with _opened(path) as (container, stream):
      seconds = video_cursor.seconds_by_reading(container, stream, clock)
  frames = shown or max(1, round(seconds * clock.rate))
  return VideoInfo(*sides, frames, float(clock.rate), float(seconds), degrees)


def read_frames(
  path: str | os.PathLike[str],
  indices: Sequence[int] | np.ndarray | None = None,
  *,
  times: Sequence[float] | np.ndarray | None = None,
) -> np.ndarray:
  """Decodes some frames of a clip. Calls in several threads do not disturb each other.

  Args:
    path: of the file.
    indices: integers [t] >= 0, t >= 1, in any order, also repeated; after the end, the last frame.
    times: in their stead, seconds [t] >= 0 from the start of the clip: the frame on screen then.

  Returns:
    uint8 [t, height, width, 3], red first, upright.

  Raises:
    BadImage: if the file is missing, empty, truncated, without pictures or no video, or if a wanted
      frame is damaged.
    ValueError: unless exactly one of `indices` and `times` is given, in its range.
    errors.UserError: if PyAV is not installed.
  """
  wanted = np.asarray(indices if times is None else times)
  if (indices is None) == (times is None) or wanted.ndim != 1 or not wanted.size:
    raise ValueError('One of `indices` and `times`, with at least one entry.')
  if not np.isfinite(wanted).all() or wanted.min() < 0:
    raise ValueError(f'Frames count from 0, not {wanted.min()}.')
  if times is None and wanted.dtype.kind not in 'iu':
    raise ValueError(f'`indices` are integers, not {wanted.dtype}.')
  with _opened(path) as (container, stream):
    clock = video_cursor.Clock(container, stream)
    ticks = [clock.of_index(w) if times is None else clock.of_time(w) for w in wanted.tolist()]
    cursor = video_cursor.Cursor(container, stream, clock)
    result, previous, source = np.empty((0,), np.uint8), None, 0
    for place in np.argsort(ticks, kind='stable').tolist():
      frame = cursor.at(ticks[place])
      if frame is previous:
        result[place] = result[source]
        continue
      pixels = _pixels(frame, str(path))
      if previous is None:
        result = np.empty((len(ticks), *pixels.shape), np.uint8)
      if pixels.shape != result.shape[1:]:
        raise BadImage(str(path), _RESIZED)
      result[place], previous, source = pixels, frame, place
  return result


def scan(path: str | os.PathLike[str], indices: range) -> Scan:
  """Decodes every frame of a part of a clip, one at a time, and keeps none.

  Args:
    path: of the file.
    indices: as of `read_frames`, consecutive, at least one.

  Returns:
    What was seen.

  Raises:
    BadImage: as `read_frames` of these indices.
    errors.UserError: if PyAV is not installed.
  """
  with _opened(path) as (container, stream):
    clock = video_cursor.Clock(container, stream)
    cursor, size, times = video_cursor.Cursor(container, stream, clock), None, []
    for index in indices:
      frame = cursor.at(clock.of_index(index))
      if times and times[-1] == cursor.time:
        continue
      times.append(cursor.time)
      _check_whole(frame, str(path))
      shape = (frame.width, frame.height)
      if shape != (size or shape):
        raise BadImage(str(path), _RESIZED)
      size = shape
    codec = stream.codec_context.codec.canonical_name
  stays = np.diff(times)
  return Scan(codec, len(times), len(stays) > 0 and bool(stays.max() >= 1.5 * stays.min()))


@contextlib.contextmanager
def _opened(
  path: str | os.PathLike[str],
) -> Iterator[tuple['InputContainer', 'VideoStream']]:
  """The file and its pictures, to be decoded by one thread; FFmpeg's errors become `BadImage`."""
  try:
    import av
    import av.error
  except ImportError as error:
    raise errors.UserError("Video needs PyAV: pip install 'losa_scenic[video]'.") from error
  name, lists = str(path), {'format_whitelist': ','.join(_FORMATS), 'protocol_whitelist': 'file'}
  try:
    with open(path, 'rb') as file:
      if not os.fstat(file.fileno()).st_size:
        raise BadImage(name, 'the file is empty')
      if video_truncation.is_truncated(file):
        raise BadImage(name, 'the file is truncated')
    # The prefix keeps a colon in a name from being taken for a protocol.
    with av.open(f'file:{os.fspath(path)}', container_options=lists) as container:
      streams = [s for s in container.streams.video if not _is_cover(s)]
      if not streams:
        raise BadImage(name, 'it has no pictures, only sound')
      stream = streams[0]
      if stream.codec_context is None:
        raise BadImage(name, 'its pictures are coded in a way that FFmpeg cannot decode')
      if stream.width * stream.height > MAX_PIXELS:
        raise BadImage(name, f'its frames have more than {MAX_PIXELS:,} pixels')
      stream.thread_type, stream.codec_context.thread_count = 'NONE', 1
      yield container, stream
  except av.error.FFmpegError as error:
    if isinstance(error, MemoryError):
      raise  # Not the file's fault.
    raise BadImage(name, f'no video, or a damaged one ({error.strerror})') from error
  except OSError as error:
    raise BadImage(name, f'cannot be read ({error.strerror})') from error


def _is_cover(stream: 'VideoStream') -> bool:
  """Whether it is the picture that music files carry."""
  from av.stream import Disposition

  return bool(stream.disposition & Disposition.attached_pic)


def _orientation(frame: 'VideoFrame') -> tuple[int, int, int, int]:
  """(a, b, c, d): pixel (x, y) is displayed at (a x + c y, b x + d y), up to a shift and scale."""
  matrix = frame.side_data.get('DISPLAYMATRIX')
  if matrix is None:
    return _UPRIGHT
  a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
  return (a, b, c, d) if a * d - b * c else _UPRIGHT


def _check_whole(frame: 'VideoFrame', name: str) -> None:
  if frame.is_corrupt:
    raise BadImage(name, f'the frame at {frame.time or 0:.2f} s is damaged')


def _pixels(frame: 'VideoFrame', name: str) -> np.ndarray:
  """uint8 [height, width, 3], upright; a view of FFmpeg's memory."""
  _check_whole(frame, name)
  transparent = any(component.is_alpha for component in frame.format.components)
  rgb = frame.reformat(format='rgba' if transparent else 'rgb24', threads=1)
  plane: Any = rgb.planes[0]
  channels = 4 if transparent else 3
  shape, strides = (rgb.height, rgb.width, channels), (plane.line_size, channels, 1)
  pixels = np.ndarray(shape, np.uint8, plane, strides=strides)
  if transparent:
    alpha = pixels[:, :, 3:] / np.float32(255)
    pixels = np.rint(pixels[:, :, :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
  a, b, c, d = _orientation(frame)
  if abs(a) <= abs(c):
    pixels, a, d = pixels.transpose(1, 0, 2), c, b
  return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
