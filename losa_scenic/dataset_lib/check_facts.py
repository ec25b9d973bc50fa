"""What `check` keeps of each image or clip that it reads."""

import os
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import decode, frame_sampling, repeats, video_file
from losa_scenic.dataset_lib.clip_files import Clip
from losa_scenic.dataset_lib.clip_reader import Sampling
from losa_scenic.dataset_lib.sources import BadImage, Record, Source


class _Seen(NamedTuple):
  """What reading one image or clip has shown; `frames` of an image are 0, rates may be unknown."""

  width: int
  height: int
  bytes: int
  kind: str
  rotated: bool = False
  frames: int = 0
  rate: float = 0.0
  varying: bool = False


class Facts:
  """What is kept of each image or clip of one or more splits, some 40 or 55 bytes.

  Attributes:
    digest: uint64 [n, 2].
    label: int32 [n]; -1 where it cannot be read.
    size: width and height, int32 [n, 2].
    bytes: int64 [n].
    kind: int16 [n], positions in `kinds`.
    rotated: bool [n].
    kinds: name of a format -> its number.
    sampling: which frames of clips are shown; None for images, or if it is not known.
    frames: of clips, int32 [n]; of images empty, as the rest.
    rate: frames per second, float32 [n]; 0 if nothing states it.
    varying: whether the rate varies, bool [n].
    short: whether a clip has fewer frames than a window reaches over, bool [n].
  """

  def __init__(self, count: int, clips: bool = False, sampling: Sampling | None = None) -> None:
    """Makes room for `count` of them."""
    self.digest = np.zeros((count, 2), np.uint64)
    self.label = np.full(count, -1, np.int32)
    self.size = np.zeros((count, 2), np.int32)
    self.bytes = np.zeros(count, np.int64)
    self.kind = np.zeros(count, np.int16)
    self.rotated = np.zeros(count, bool)
    self.kinds: dict[str, int] = {}
    self.sampling = sampling
    self._lock, self._clips = threading.Lock(), clips
    count = count if clips else 0
    self.frames, self.rate = np.zeros(count, np.int32), np.zeros(count, np.float32)
    self.varying, self.short = np.zeros(count, bool), np.zeros(count, bool)

  def read(self, source: Source, index: int, place: int) -> None:
    """Reads and decodes an image, or every frame of a clip, and notes it at a place.

    Raises:
      BadImage: if it cannot be read.
      errors.UserError: if clips shall be shown at a rate, and this one has none.
    """
    record = source[index]
    seen = _seen(record)
    with self._lock:
      self.kind[place] = self.kinds.setdefault(seen.kind, len(self.kinds))
    try:
      self.digest[place] = repeats.digest(record.image)
    except OSError as error:
      raise BadImage(record.id, f'cannot be read ({error.strerror})') from error
    self.size[place], self.bytes[place] = (seen.width, seen.height), seen.bytes
    self.rotated[place] = seen.rotated
    if self._clips:
      self.frames[place], self.rate[place] = seen.frames, seen.rate
      self.varying[place] = seen.varying
      self.short[place] = self._is_short(seen, record.id)
    self.label[place] = record.label  # Last: the image is fine.

  def _is_short(self, seen: _Seen, name: str) -> bool:
    if self.sampling is None:
      return False
    rate = self.sampling.frames_per_second
    if rate is not None and not seen.rate:
      raise errors.UserError(
        f'{name}: frames_per_second is for video files; these frames have no rate. Use '
        'frame_stride.'
      )
    info = video_file.VideoInfo(seen.width, seen.height, seen.frames, seen.rate, 0.0, 0)
    window = (self.sampling.num_frames, self.sampling.frame_stride)
    return seen.frames < frame_sampling.span(info, *window, frames_per_second=rate)


def _seen(record: Record) -> _Seen:
  image = record.image
  if isinstance(image, np.ndarray):
    height, width = image.shape[-3:-1]
    return _Seen(width, height, image.nbytes, 'pixels RGB', frames=_count(image))
  if isinstance(image, Clip):
    return _seen_file(image, record.id)
  return _seen_image(image, record.id) if isinstance(image, bytes) else _seen_frames(image, record)


def _count(pixels: np.ndarray) -> int:
  return len(pixels) if pixels.ndim == 4 else 0


def _seen_image(encoded: bytes, name: str) -> _Seen:
  header = decode.read_header(encoded, name)
  # All of the compressed data is gone through at any reduction, so it fails or not alike.
  reduction = max(decode.REDUCTIONS) if header.reducible else 1
  decode.decode(encoded, name, header, reduction)
  kind, rotated = f'{header.format} {header.mode}', header.orientation != 1
  return _Seen(header.width, header.height, len(encoded), kind, rotated)


def _seen_frames(frames: Sequence[bytes], record: Record) -> _Seen:
  """A clip of encoded images."""
  if not frames:
    raise BadImage(record.id, 'the clip has no frames')
  first, size = None, 0
  for number, encoded in enumerate(frames):
    try:
      seen = _seen_image(encoded, record.id)
    except BadImage as error:
      raise BadImage(record.id, f'frame {number}: {error.reason}') from error
    first, size = first or seen, size + seen.bytes
    if seen[:2] != first[:2]:
      raise BadImage(record.id, 'its frames change their size')
  assert first is not None
  return first._replace(bytes=size, kind=f'frames {first.kind}', frames=len(frames))


def _seen_file(clip: Clip, name: str) -> _Seen:
  info = video_file.probe(clip.path)
  try:
    frames = frame_sampling.frame_range(info, clip.segment)
  except errors.UserError as error:
    raise BadImage(name, str(error).rstrip('.')) from error
  found = video_file.scan(clip.path, frames)
  extension = os.path.splitext(clip.path)[1].lower().removeprefix('.')
  return _Seen(
    info.width,
    info.height,
    os.path.getsize(clip.path),
    f'{extension} {found.codec}'.strip(),
    bool(info.rotation),
    len(frames),
    info.frame_rate,
    found.varying,
  )
