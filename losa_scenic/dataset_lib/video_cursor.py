"""Times in a video file, and the frames on screen at them.

Presentation times say which frame is meant. To reach it, decoding starts at the last key frame
before it, where the container's index can be relied on; for MPEG, GIF and AVI with reordered frames
at the first frame.
"""

import collections
import contextlib
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING

from losa_scenic.dataset_lib.sources import BadImage

if TYPE_CHECKING:
  from av.container import InputContainer
  from av.video.frame import VideoFrame
  from av.video.stream import VideoStream

# Those whose index names the key frames, and those whose header says the length of the pictures.
_INDEXED, _TIMED = ('mov', 'matroska', 'avi'), ('mov', 'matroska', 'avi', 'gif')
# A jump pays if it saves the decoding of so many frames: the decoder has to fill up again.
_WORTH_A_JUMP = 8
# Containers round times, Matroska to milliseconds: so much later a frame may seem to come.
_LATE_SECONDS = Fraction(6, 10_000)


class Clock:
  """Indices and seconds as ticks of the stream's clock: the frame shown is the last not after it.

  Attributes:
    start: of the clip, in ticks.
    tick: seconds.
    rate: frames per second.
  """

  def __init__(self, container: 'InputContainer', stream: 'VideoStream') -> None:
    """Reads the header's entries."""
    rate, steady = stream.average_rate, stream.base_rate
    count, seconds = stream.frames, stated_seconds(container, stream)
    # The mean also counts how long the last frame stays: of a steady clip it would be a bit off.
    if steady and count and seconds and abs(count / steady - seconds) * steady < 2:
      rate = steady
    elif count and seconds:  # FFmpeg's mean may be that of the first frames.
      rate = (count - hidden_frames(container, stream)) / seconds
    rate = rate or steady or stream.guessed_rate
    if not rate or not stream.time_base:
      raise BadImage(container.name.removeprefix('file:'), 'it states no frame rate')
    self.start, self.tick, self.rate = stream.start_time or 0, stream.time_base, rate

  def of_index(self, index: int) -> int:
    """The latest time that rounds to this index."""
    return self.start + math.floor((index + Fraction(1, 2)) / (self.rate * self.tick))

  def of_time(self, seconds: float) -> int:
    """The time so long after the start."""
    return self.start + math.floor((Fraction(seconds) + _LATE_SECONDS) / self.tick)


class Cursor:
  """Goes through a clip: the frames on screen at times that never decrease."""

  def __init__(self, container: 'InputContainer', stream: 'VideoStream', clock: Clock) -> None:
    """Decodes nothing yet."""
    self._container, self._stream, self._start = container, stream, clock.start
    self._frame_ticks = max(1, round(1 / (clock.rate * clock.tick)))
    self._kind = kind(container)
    self._jumps = self._kind in _INDEXED
    if self._kind == 'avi' and stream.codec_context.has_b_frames:
      self._jumps = False  # AVI has no times of presentation: frames have to be counted.
    if self._kind == 'matroska':  # Its index is read by the first jump.
      container.seek(clock.start, stream=stream)
    self._frames = self._decoded()
    self._here: tuple[int, VideoFrame] | None = None
    self._next: tuple[int, VideoFrame] | None = None

  def at(self, tick: int) -> 'VideoFrame':
    """The last frame not after `tick`; the first if all are."""
    if self._pays(tick):
      self._jump(tick)
    if self._here is None and self._next is None:
      self._next = next(self._frames, None)
    while self._next is not None and (self._here is None or self._next[0] <= tick):
      self._here, self._next = self._next, next(self._frames, None)
    if self._here is None:
      raise BadImage(self._container.name.removeprefix('file:'), 'no frame can be decoded')
    return self._here[1]

  @property
  def time(self) -> int | None:
    """Time of what `at` found last, in ticks."""
    return None if self._here is None else self._here[0]

  def _pays(self, tick: int) -> bool:
    """Whether a key frame well ahead of what is decoded comes before `tick`."""
    far = _WORTH_A_JUMP * self._frame_ticks
    position = self._next[0] if self._next else self._start
    ended = self._here is not None and self._next is None
    if not self._jumps or ended or tick - position < far:
      return False
    entries = self._stream.index_entries
    entry = entries.search_timestamp(tick)
    return entry >= 0 and entries[entry].timestamp - position >= far

  def _jump(self, tick: int) -> None:
    """Goes on decoding at a key frame that is shown at `tick` or before."""
    aim, back = tick, self._frame_ticks
    while aim > self._start:
      self._container.seek(aim, stream=self._stream)
      self._frames = self._decoded()
      # Frames shown before the first key frame may need others that were not decoded.
      first = next((shown for shown in self._frames if shown[1].key_frame), None)
      if first is not None and first[0] <= tick:
        self._here, self._next = None, first
        return
      # An index by times of decoding leads to a key frame that is decoded before but shown after.
      aim, back = aim - back, 2 * back
    self._jumps = False
    entries = self._stream.index_entries
    self._container.seek(min(self._start, entries[0].timestamp), stream=self._stream)
    self._frames, self._here, self._next = self._decoded(), None, None

  def _decoded(self) -> Iterator[tuple[int, 'VideoFrame']]:
    """Frames with their times, in the order of display, from where the container stands."""
    last, packet_times = None, collections.deque()
    for packet in self._container.demux(self._stream):
      if packet.dts is not None and not packet.size:
        continue  # 'As before', in AVI; to the decoder it would mean the end.
      if self._kind == 'avi' and packet.dts is not None:
        packet_times.append(packet.dts)
      for frame in packet.decode():
        time = frame.pts if frame.pts is not None else frame.dts
        if packet_times:  # One packet a frame: the n-th frame is shown at the n-th packet's time.
          time = packet_times.popleft()
        if last is not None and (time is None or time <= last):
          time = last + (self._frame_ticks if time is None else 1)
        last = self._start if time is None else time
        yield last, frame


def kind(container: 'InputContainer') -> str:
  return container.format.name.split(',')[0]


def stated_seconds(container: 'InputContainer', stream: 'VideoStream') -> Fraction | None:
  """The duration of the pictures that the header states; None if it does not."""
  if kind(container) not in _TIMED:
    return None
  if stream.duration and stream.time_base:
    return stream.duration * stream.time_base
  stated = stream.metadata.get('DURATION', '').split(':')  # As FFmpeg writes it to Matroska.
  with contextlib.suppress(ValueError):
    hours, minutes, seconds = stated
    return 3600 * int(hours) + 60 * int(minutes) + Fraction(seconds)
  return Fraction(container.duration, 1_000_000) if container.duration else None


def seconds_by_reading(
  container: 'InputContainer', stream: 'VideoStream', clock: Clock
) -> Fraction:
  """The duration by the last time in the file; decodes nothing."""
  last = clock.start
  for packet in container.demux(stream):
    last = max([last] + [time for time in (packet.pts, packet.dts) if time is not None])
  return (last - clock.start) * clock.tick + 1 / clock.rate


def hidden_frames(container: 'InputContainer', stream: 'VideoStream') -> int:
  """Number of frames that are stored but not shown, as an edit list of MP4 and MOV says."""
  if kind(container) != 'mov':
    return 0
  return sum(entry.is_discard for entry in stream.index_entries)
