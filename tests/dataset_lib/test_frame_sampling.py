"""Windows and squares: always inside the clip, of the right number, and covering it."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import frame_sampling
from losa_scenic.dataset_lib.frame_sampling import Segment
from losa_scenic.dataset_lib.video_file import VideoInfo

quick = settings(max_examples=150, deadline=None)


def clip(frames: int, rate: float = 25.0) -> VideoInfo:
  return VideoInfo(64, 48, frames, rate, frames / rate, 0)


CLIPS = st.builds(clip, st.integers(1, 400), st.sampled_from([10.0, 25.0, 30000 / 1001, 60.0]))
WINDOW = {'num_frames': st.integers(1, 70), 'stride': st.integers(1, 9)}
SHORT = st.sampled_from(frame_sampling.SHORT)


@quick
@given(info=CLIPS, short=SHORT, seed=st.integers(0, 99), **WINDOW)
def test_a_random_window_is_inside_the_clip_and_repeats_itself(
  info, num_frames, stride, short, seed
):
  def draw():
    rng = np.random.default_rng(seed)
    return frame_sampling.random_window(info, num_frames, rng, stride, short=short)

  window = draw()
  assert window.shape == (num_frames,) and window.dtype == np.int64
  assert window.min() >= 0 and window.max() < info.frames
  np.testing.assert_array_equal(window, draw())
  length = (num_frames - 1) * stride + 1
  if length <= info.frames:
    np.testing.assert_array_equal(np.diff(window), stride)
  elif short == 'pad':
    np.testing.assert_array_equal(
      window, np.minimum(np.arange(num_frames) * stride, info.frames - 1)
    )
  else:
    np.testing.assert_array_equal(window, np.arange(num_frames) * stride % info.frames)


def test_all_places_of_a_random_window_are_equally_likely():
  rng = np.random.default_rng(0)
  starts = [frame_sampling.random_window(clip(20), 4, rng, 5)[0] for _ in range(4000)]
  counts = np.bincount(starts)
  assert len(counts) == 20 - 15
  assert counts.min() > 650 and counts.max() < 950


@quick
@given(info=CLIPS, short=SHORT, num_clips=st.integers(1, 12), **WINDOW)
def test_views_reach_from_the_first_frame_to_the_last(info, num_frames, stride, short, num_clips):
  windows = frame_sampling.views(info, num_frames, stride, num_clips, short=short)
  assert windows.shape == (num_clips, num_frames)
  assert windows.min() >= 0 and windows.max() < info.frames
  length = (num_frames - 1) * stride + 1
  if length > info.frames:
    assert (windows == windows[0]).all() and windows[0, 0] == 0
    return
  np.testing.assert_array_equal(np.diff(windows, axis=1), stride)
  if num_clips == 1:
    before, after = windows[0, 0], info.frames - 1 - windows[0, -1]
    assert after - before in (0, 1)
    return
  assert windows[0, 0] == 0 and windows[-1, -1] == info.frames - 1
  gaps = np.diff(windows[:, 0])
  assert gaps.max() - gaps.min() <= 1


@quick
@given(num_frames=st.integers(1, 40), num_clips=st.integers(2, 10), data=st.data())
def test_enough_windows_miss_no_frame(num_frames, num_clips, data):
  info = clip(data.draw(st.integers(num_frames, num_frames * num_clips)))
  windows = frame_sampling.views(info, num_frames, 1, num_clips)
  assert set(windows.ravel()) == set(range(info.frames))


@quick
@given(info=CLIPS, num_frames=st.integers(1, 40), rate=st.floats(0.5, 120), seed=st.integers(0, 9))
def test_frames_per_second(info, num_frames, rate, seed):
  rng = np.random.default_rng(seed)
  window = frame_sampling.random_window(info, num_frames, rng, frames_per_second=rate, short='pad')
  assert window.min() >= 0 and window.max() < info.frames
  times = np.arange(num_frames) * info.frame_rate / rate
  expected = np.minimum(np.floor(times + 1e-3), info.frames - 1 - window[0])
  np.testing.assert_array_equal(window - window[0], expected)


def test_frames_per_second_does_not_depend_on_the_clips_own_rate():
  for rate, expected in [(60, [0, 6, 12, 18]), (30, [0, 3, 6, 9]), (10, [0, 1, 2, 3])]:
    window = frame_sampling.views(clip(rate, rate), 4, frames_per_second=10)[0]
    assert (window - window[0]).tolist() == expected
  slow = frame_sampling.views(clip(10, 5.0), 6, frames_per_second=10)[0]
  assert (slow - slow[0]).tolist() == [0, 0, 1, 1, 2, 2]


@quick
@given(info=CLIPS, start=st.floats(0, 0.99), share=st.floats(0.001, 2), seed=st.integers(0, 9))
def test_windows_stay_in_their_segment(info, start, share, seed):
  seconds = info.frames / info.frame_rate
  segment = Segment(start * seconds, (start + share) * seconds)
  frames = frame_sampling.frame_range(info, segment)
  assert 0 <= frames.start < frames.stop <= info.frames
  # All that is on screen in it, and nothing else; rounded times may move an end by a frame.
  assert abs(frames.start - math.floor(segment.start * info.frame_rate)) <= 1
  stop = min(math.ceil(segment.end * info.frame_rate), info.frames)
  assert abs(frames.stop - stop) <= 1
  rng = np.random.default_rng(seed)
  for window in (
    frame_sampling.random_window(info, 8, rng, 2, segment=segment),
    frame_sampling.views(info, 8, 2, 3, segment=segment),
  ):
    assert window.min() >= frames.start and window.max() < frames.stop


@pytest.mark.parametrize(
  ('segment', 'expected'),
  [
    (Segment(), range(50)),
    (Segment(0.4), range(10, 50)),
    (Segment(0.4, 0.8), range(10, 20)),
    (Segment(0.39, 0.81), range(9, 21)),
    (Segment(0.5, 0.501), range(12, 13)),
    (Segment(1.0, 99), range(25, 50)),
    (Segment(1.99, 2.0), range(49, 50)),
  ],
)
def test_segments(segment, expected):
  assert frame_sampling.frame_range(clip(50), segment) == expected


@pytest.mark.parametrize(
  'segment', [(-1, 1), (2.0, 3), (1, 1), (1, 0.5), (float('nan'), 1), (0, float('nan'))]
)
def test_impossible_segments(segment):
  with pytest.raises(errors.UserError, match=r'lasts 2\.00 s'):
    frame_sampling.frame_range(clip(50), Segment(*segment))


@quick
@given(height=st.integers(1, 500), width=st.integers(1, 500), data=st.data())
def test_three_crops_are_inside_and_touch_both_ends(height, width, data):
  side = data.draw(st.integers(1, min(height, width)))
  boxes = frame_sampling.three_crops(height, width, side)
  for box in boxes:
    assert (box.height, box.width) == (side, side)
    assert 0 <= box.top <= height - side and 0 <= box.left <= width - side
  first, middle, last = boxes
  if height > width:
    assert (first.top, middle.top, last.top) == (0, (height - side) // 2, height - side)
    assert first.left == middle.left == last.left == (width - side) // 2
  else:
    assert (first.left, middle.left, last.left) == (0, (width - side) // 2, width - side)
    assert first.top == middle.top == last.top == (height - side) // 2


def test_wrong_values():
  rng = np.random.default_rng(0)
  for change, match in [
    ({'num_frames': 0}, 'num_frames'),
    ({'stride': 0}, 'stride'),
    ({'short': 'lop'}, "Did you mean 'loop'"),
    ({'stride': 2, 'frames_per_second': 5}, 'not both'),
    ({'frames_per_second': 0}, 'above 0'),
  ]:
    arguments = {'num_frames': 4, **change}
    with pytest.raises(errors.UserError, match=match):
      frame_sampling.random_window(clip(50), rng=rng, **arguments)
    with pytest.raises(errors.UserError, match=match):
      frame_sampling.views(clip(50), **arguments)
  with pytest.raises(errors.UserError, match='num_clips'):
    frame_sampling.views(clip(50), 4, num_clips=0)
  with pytest.raises(errors.UserError, match='do not fit'):
    frame_sampling.three_crops(48, 64, 49)


@quick
@given(info=CLIPS, rate=st.none() | st.floats(1, 90), seed=st.integers(0, 99), **WINDOW)
def test_a_clip_of_the_span_is_just_long_enough(info, num_frames, stride, rate, seed):
  more = {'stride': 1 if rate else stride, 'frames_per_second': rate}
  span = frame_sampling.span(info, num_frames, **more)
  long = info._replace(frames=span + 5)
  window = frame_sampling.random_window(long, num_frames, np.random.default_rng(seed), **more)
  assert window[-1] - window[0] + 1 == span
  fitting = frame_sampling.views(info._replace(frames=span), num_frames, **more)[0]
  assert (fitting[0], fitting[-1]) == (0, span - 1)
  if span > 1:  # One frame less, and it begins again.
    short = frame_sampling.views(info._replace(frames=span - 1), num_frames, **more)[0]
    assert short[-1] == 0
