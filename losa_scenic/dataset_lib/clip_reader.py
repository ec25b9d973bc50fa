"""What a model is shown of the clip at a position: frames of a window, all cut to the same square.

In training a window anywhere in the clip, in validation the one in its middle, in testing all views
(windows x squares), which are averaged after the model (`train_lib.steps.eval_step`).
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import augment as augment_lib
from losa_scenic.dataset_lib import decode, frame_images, frame_sampling, resize, video_file
from losa_scenic.dataset_lib.cache import Cache
from losa_scenic.dataset_lib.clip_files import Clip
from losa_scenic.dataset_lib.sources import BadImage, Record, Source

_CROPS = (1, 3)
_MOST_INFOS = 100_000  # some 30 MB of what is known of files
_SHUFFLE = 2  # stream of random numbers; 0 and 1 are of augmentation and mixing


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Which frames of a clip make an input.

  Attributes:
    num_frames: frames of a window: the backbone's.
    frame_stride: distance between two of them, in frames of the clip.
    frames_per_second: in the stride's stead, frames of the window in a second, whatever the clip's
      own rate is; only for video files. None for the stride.
    short_clips: clips shorter than the window are shown again from the start ('loop') or stand
      still at their last frame ('pad').
    num_test_clips: windows in testing, at equal distances.
    num_test_crops: squares of each frame in testing: 1, or 3 along its longer side.
  """

  num_frames: int
  frame_stride: int = 1
  frames_per_second: float | None = None
  short_clips: str = 'loop'
  num_test_clips: int = 1
  num_test_crops: int = 1

  def __post_init__(self) -> None:
    """Raises `UserError` for values out of range."""
    for field in ('num_frames', 'frame_stride', 'num_test_clips'):
      errors.check_at_least(field, getattr(self, field), 1)
    errors.one_of('short_clips', self.short_clips, frame_sampling.SHORT)
    if self.num_test_crops not in _CROPS:
      raise errors.UserError(f'num_test_crops must be 1 or 3, not {self.num_test_crops}.')
    rate = self.frames_per_second
    if rate is not None and not 0 < rate < math.inf:
      raise errors.UserError(f'frames_per_second must be above 0, not {rate}.')
    if rate is not None and self.frame_stride != 1:
      raise errors.UserError('Give frame_stride or frames_per_second, not both.')

  def views(self, split: str) -> int:
    """Number of views of each clip of 'train', 'valid' or 'test'."""
    return self.num_test_clips * self.num_test_crops if split == 'test' else 1


class ClipReader:
  """Reads, cuts and augments clips; a pure function of (seed, epoch, position).

  Attributes:
    shape: of what is shown, (t, s, s, 3); of several views (v, t, s, s, 3).
    lasting: whether what could not be read once need not be tried again: another window of a
      damaged clip may be fine.
  """

  lasting = False

  def __init__(
    self,
    source: Source,
    view: resize.View,
    sampling: Sampling,
    augment: augment_lib.Augment,
    *,
    split: str,
    seed: int = 0,
    cache_bytes: int = 0,
  ) -> None:
    """Reads nothing yet.

    Args:
      source: the clips.
      view: what of a frame is shown where nothing is augmented.
      sampling: which frames.
      augment: what is drawn at random, the same for all frames of a clip.
      split: 'train', 'valid' or 'test'.
      seed: of the windows and the augmentation.
      cache_bytes: keep whole decoded clips in memory as long as they fit into this many bytes.
    """
    self._source, self._view, self._augment, self._seed = source, view, augment, seed
    self._sampling, self._split = sampling, split
    count, size = sampling.views(split), view.image_size
    self.shape = (*((count,) if count > 1 else ()), sampling.num_frames, size, size, 3)
    self._cache = Cache(len(source), None, cache_bytes)
    self._infos: dict[int, video_file.VideoInfo] = {}
    self._damaged: set[int] = set()  # clips that cannot be kept whole

  def gather(self, indices: np.ndarray) -> None:
    """Nothing is kept as it is shown; see `ImageReader.gather`."""
    del indices

  def show(self, index: int, epoch: int) -> tuple[np.ndarray, int]:
    """The clip at a position in an epoch, uint8 of `shape`, and its label.

    Raises:
      BadImage: if it cannot be read.
      errors.UserError: if frames per second are wanted of frames without a rate.
    """
    record = self._source[index]
    if self._split != 'train':
      # One after another: full frames of all windows may be a lot of memory.
      views = [self._cut(frames) for frames in self._frames(record, index)]
      return np.concatenate(views).reshape(self.shape), record.label
    rng = augment_lib.generator(self._seed, epoch, index)
    pixels = next(self._frames(record, index, epoch, rng))
    size, name = self._view.image_size, self._view.interpolation
    box = self._view.box(*pixels.shape[1:3])
    if self._augment.crops:
      box = augment_lib.crop_box(self._augment, self._view, rng, *pixels.shape[1:3])
      name = self._augment.interpolation
    shown = np.stack([resize.resize(frame, size, name, box) for frame in pixels])
    return augment_lib.apply_to_clip(self._augment, rng, shown), record.label

  def _windows(
    self,
    info: video_file.VideoInfo,
    segment: frame_sampling.Segment,
    rng: np.random.Generator | None,
  ) -> np.ndarray:
    """Positions in the clip int64 [windows, t]: one at random, or those of the split."""
    s = self._sampling
    more = {
      'frames_per_second': s.frames_per_second,
      'segment': segment,
      'short': s.short_clips,
    }
    if rng is not None:
      window = frame_sampling.random_window(info, s.num_frames, rng, s.frame_stride, **more)
      return window[None]
    count = s.num_test_clips if self._split == 'test' else 1
    return frame_sampling.views(info, s.num_frames, s.frame_stride, count, **more)

  def _frames(
    self, record: Record, index: int, epoch: int = 0, rng: np.random.Generator | None = None
  ) -> Iterator[np.ndarray]:
    """Pixels uint8 [t, h, w, 3] of each of the windows that `_windows` chooses."""
    if index not in self._infos:
      if len(self._infos) >= _MOST_INFOS:
        self._infos.clear()
      self._infos[index] = _info(record)
    info, segment = self._infos[index], frame_sampling.WHOLE
    if isinstance(record.image, Clip):
      segment = record.image.segment
    check_rate(record, self._sampling)
    try:
      frames = frame_sampling.frame_range(info, segment)
    except errors.UserError as error:
      raise BadImage(record.id, str(error).rstrip('.')) from error
    windows = self._windows(info, segment, rng)
    if isinstance(record.image, Clip):
      # A stream of its own: the augmentation is the same in any order. Evaluation is the same for
      # every seed.
      seed = self._seed if self._split == 'train' else 0
      shuffle = augment_lib.generator(seed, epoch, index, _SHUFFLE)
      windows = _in_order(windows, record.image.order, shuffle)
    whole = (
      None if isinstance(record.image, np.ndarray) else self._kept(record, index, info, frames)
    )
    for window in windows:
      if isinstance(record.image, np.ndarray):
        yield record.image[window]
      else:
        yield _read(record, window) if whole is None else whole[window - frames.start]

  def _kept(
    self, record: Record, index: int, info: video_file.VideoInfo, frames: range
  ) -> np.ndarray | None:
    """All frames of a clip, decoded now or before; None where they are not to be kept."""
    kept, _ = self._cache.get(index)
    size = len(frames) * info.height * info.width * 3
    if kept is not None or index in self._damaged or not self._cache.reserve(size):
      return kept
    try:
      kept = _read(record, np.arange(frames.start, frames.stop))
    except BadImage:
      # A frame is damaged that may not be wanted: what is shown never rests on the cache.
      self._damaged.add(index)
      self._cache.release(size)
      return None
    self._cache.put(index, kept, record.label, reserved=size)
    return kept

  def _cut(self, pixels: np.ndarray) -> np.ndarray:
    """All squares of a window: [t, h, w, 3] -> [squares, t, s, s, 3]."""
    height, width = pixels.shape[1:3]
    boxes = (self._view.box(height, width),)
    if self._split == 'test' and self._sampling.num_test_crops == 3:
      side = max(1, round((self._view.central_crop or 1.0) * min(height, width)))
      boxes = frame_sampling.three_crops(height, width, side)
    size, name = self._view.image_size, self._view.interpolation
    return np.stack([[resize.resize(frame, size, name, box) for frame in pixels] for box in boxes])


def check_rate(record: Record, sampling: Sampling) -> None:
  """Raises `UserError` if frames per second are wanted of frames that have no rate."""
  if sampling.frames_per_second is not None and not isinstance(record.image, Clip):
    raise errors.UserError(
      f'{record.id}: frames_per_second is for video files; these frames have no rate. Use '
      'frame_stride (--config.dataset_configs.frames_per_second=None takes a rate away).'
    )


def _in_order(windows: np.ndarray, order: str, rng: np.random.Generator) -> np.ndarray:
  """Positions [windows, t], each row in one of `clip_files.ORDERS`."""
  if order == 'backward':
    return windows[:, ::-1]
  if order != 'shuffled':
    return windows
  length = windows.shape[1]
  turns = [rng.permutation(length) for _ in windows]
  # Neither of the other orders; of three frames or fewer they would be all there is.
  while length > 3 and any(len({*np.diff(turn).tolist()}) == 1 for turn in turns):
    turns = [rng.permutation(length) for _ in windows]
  return np.take_along_axis(windows, np.stack(turns), axis=1)


def _info(record: Record) -> video_file.VideoInfo:
  if isinstance(record.image, Clip):
    return video_file.probe(record.image.path)
  if isinstance(record.image, np.ndarray) and record.image.ndim == 4:
    count, height, width = record.image.shape[:3]
  elif isinstance(record.image, (bytes, np.ndarray)):
    raise TypeError(f'{record.id}: a clip is wanted, not an image.')
  else:
    if not record.image:
      raise BadImage(record.id, 'the clip has no frames')
    header = decode.read_header(record.image[0], record.id)
    count, height, width = len(record.image), header.height, header.width
  # The rate has no use: only strides are allowed.
  return video_file.VideoInfo(width, height, count, 1.0, float(count), 0)


def _read(record: Record, indices: np.ndarray) -> np.ndarray:
  """Frames uint8 [n, h, w, 3] of a file or of encoded images."""
  if isinstance(record.image, Clip):
    return video_file.read_frames(record.image.path, indices)
  assert not isinstance(record.image, (bytes, np.ndarray))
  return frame_images.decode_frames(record.image, indices, record.id)
