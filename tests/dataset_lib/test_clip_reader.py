"""What is shown of a clip: the frames, the squares, the same with and without a cache."""

import pathlib
import pickle

import numpy as np
import pytest
from PIL import Image
from reference import video_clips
from reference.clip_loaders import FRAMES, SIZE, Records, batch, files, make, numbers, png

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import augment, resize, video_file
from losa_scenic.dataset_lib.clip_reader import Sampling
from losa_scenic.dataset_lib.frame_sampling import WHOLE, Segment

pytest.importorskip('av', reason="PyAV is not installed: pip install 'losa_scenic[video]'")

SQUARE = resize.View(SIZE, 'bilinear', central_crop=0.9)
DRAWN = augment.Augment(square_crops=True, max_scale=1.3, flip=True, color_jitter=0.3)
LONG = 40  # frames, at 25 a second
ONE_FRAME = 48 * 64 * 3  # bytes


@pytest.fixture(scope='module')
def root(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('clips')
  for name, count, size in (
    ('long', LONG, (48, 64)),
    ('tall', 20, (64, 48)),
    ('short', 3, (48, 64)),
  ):
    video_clips.write(folder / f'{name}.mp4', count, size=size)
  return folder


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'num_frames': 0}, 'num_frames must be an integer of at least 1, not 0'),
    ({'frame_stride': 0}, 'frame_stride must be an integer of at least 1, not 0'),
    ({'frame_stride': 1.5}, r'frame_stride must be an integer of at least 1, not 1\.5'),
    ({'num_test_clips': 0}, 'num_test_clips must be an integer of at least 1, not 0'),
    ({'num_test_crops': 2}, 'num_test_crops must be 1 or 3, not 2'),
    ({'short_clips': 'lop'}, "Unknown short_clips 'lop'. Did you mean 'loop'"),
    ({'frames_per_second': 0.0}, r'frames_per_second must be above 0, not 0\.0'),
    ({'frames_per_second': float('nan')}, 'frames_per_second must be above 0, not nan'),
    ({'frames_per_second': float('inf')}, 'frames_per_second must be above 0, not inf'),
    ({'frames_per_second': 4.0, 'frame_stride': 2}, 'frame_stride or frames_per_second, not both'),
  ],
)
def test_sampling_out_of_range(options, message):
  with pytest.raises(errors.UserError, match=message):
    Sampling(**({'num_frames': FRAMES} | options))


def test_training_windows_lie_anywhere_in_the_clip(root):
  made = make(files(root, 'long.mp4'), frame_stride=11, num_test_clips=5, num_test_crops=3)
  shown = [numbers(made, epoch=epoch) for epoch in range(60)]
  assert all(window == [window[0] + 11 * k for k in range(FRAMES)] for window in shown)
  assert {window[0] for window in shown} == set(range(LONG - 33))
  assert batch(made, [0])['inputs'].shape == (1, FRAMES, SIZE, SIZE, 3)


@pytest.mark.parametrize('drawn', [None, DRAWN])
def test_training_depends_on_seed_epoch_and_position_alone(root, drawn, monkeypatch):
  source = files(root, 'long.mp4', 'tall.mp4', 'short.mp4', 'long.mp4')
  reads, original = [], video_file.read_frames
  monkeypatch.setattr(
    video_file, 'read_frames', lambda path, wanted: reads.append(path) or original(path, wanted)
  )
  options = {'drawn': drawn, 'view': SQUARE, 'frame_stride': 2}
  first = make(source, **options)
  shown = [batch(first, range(4), epoch) for epoch in range(3)]
  # None is kept, the two shorter ones (no clip may take more than a sixteenth), all.
  for cache_bytes in (0, 16 * 20 * ONE_FRAME, 10**8):
    reads.clear()
    made = make(source, cache_bytes=cache_bytes, **options)
    for epoch in (2, 0, 1):
      backwards = batch(made, [3, 1, 2, 0], epoch)
      for slot, index in enumerate((3, 1, 2, 0)):
        np.testing.assert_array_equal(
          backwards['inputs'][slot], shown[epoch]['inputs'][index], err_msg=f'{epoch} {index}'
        )
        assert backwards['label'][slot] == index
    assert len(reads) == {0: 12, 10**8: 4}.get(cache_bytes, 8)
  # The same file at another place, in another epoch or of another seed is another clip.
  first_epoch = shown[0]['inputs']
  assert np.any(first_epoch[0] != first_epoch[3])
  assert np.any(first_epoch[0] != shown[1]['inputs'][0])
  assert np.any(first_epoch[0] != batch(make(source, seed=1, **options), [0])['inputs'][0])


def test_validation_shows_the_middle(root):
  source = files(root, 'long.mp4', 'tall.mp4')
  made = make(source, 'valid', view=SQUARE, frame_stride=3, num_test_clips=4, num_test_crops=3)
  given = batch(made, [0, 1])['inputs']
  assert given.shape == (2, FRAMES, SIZE, SIZE, 3)
  windows = (('long.mp4', [15, 18, 21, 24], (48, 64)), ('tall.mp4', [5, 8, 11, 14], (64, 48)))
  for clip, (name, window, size) in zip(given, windows, strict=True):
    frames = video_file.read_frames(root / name, window)
    expected = [resize.resize(frame, SIZE, 'bilinear', SQUARE.box(*size)) for frame in frames]
    np.testing.assert_array_equal(clip, expected)
  np.testing.assert_array_equal(given, batch(made, [0, 1], epoch=7)['inputs'])


@pytest.mark.parametrize('cache_bytes', [0, 10**8])
def test_testing_shows_all_views(root, cache_bytes):
  source = files(root, 'long.mp4', 'tall.mp4')
  options = {'view': SQUARE, 'frame_stride': 3, 'cache_bytes': cache_bytes}
  made = make(source, 'test', num_test_clips=3, num_test_crops=3, **options)
  given = batch(made, [0, 1])['inputs']
  assert given.shape == (2, 9, FRAMES, SIZE, SIZE, 3)
  # 0.9 of the shorter side is 43 pixels: 5 are left of one side, 21 of the other.
  cases = (
    ('long.mp4', (0, 15, 30), [(2, 0), (2, 10), (2, 21)]),
    ('tall.mp4', (0, 5, 10), [(0, 2), (10, 2), (21, 2)]),
  )
  for views, (name, starts, corners) in zip(given, cases, strict=True):
    expected = [
      [
        np.array(Image.fromarray(frame[top : top + 43, left : left + 43]).resize((SIZE, SIZE), 2))
        for frame in video_file.read_frames(root / name, [start + 3 * k for k in range(FRAMES)])
      ]
      for start in starts
      for top, left in corners
    ]
    np.testing.assert_array_equal(views, expected)
  crops = batch(make(source, 'test', num_test_crops=3, **options), [0, 1])['inputs']
  np.testing.assert_array_equal(crops, given[:, 3:6])
  clips = batch(make(source, 'test', num_test_clips=3, **options), [0, 1])['inputs']
  np.testing.assert_array_equal(clips, given[:, 1::3])
  one = batch(make(source, 'test', **options), [0, 1])['inputs']
  np.testing.assert_array_equal(one, given[:, 4])


def test_views_without_a_central_crop(root):
  source, frames = files(root, 'long.mp4'), video_file.read_frames(root / 'long.mp4', range(18, 22))
  given = batch(make(source, 'test', num_test_crops=3), [0])['inputs'][0]
  for view, left in zip(given, (0, 8, 16), strict=True):
    box = resize.Box(0, left, 48, 48)
    expected = [resize.resize(frame, SIZE, 'bilinear', box) for frame in frames]
    np.testing.assert_array_equal(view, expected)
  whole = batch(make(source, 'test'), [0])['inputs'][0]
  np.testing.assert_array_equal(whole, [resize.resize(f, SIZE, 'bilinear') for f in frames])


@pytest.mark.parametrize('cache_bytes', [0, 10**8])
def test_segments_are_all_that_is_shown(root, cache_bytes):
  parts = [WHOLE, Segment(0.4, 0.8), Segment(1.2), Segment(0.4, 0.52)]
  source = files(root, *['long.mp4'] * 4, segments=parts)
  options = {'frame_stride': 2, 'cache_bytes': cache_bytes}
  made = make(source, **options)
  starts = {numbers(made, 1, epoch)[0] for epoch in range(25)}
  assert starts == {10, 11, 12, 13}
  starts = {numbers(made, 2, epoch)[0] for epoch in range(25)}
  assert starts == {30, 31, 32, 33}
  assert numbers(made, 3) == [10, 12, 11, 10]  # Three frames, again and again.
  valid = make(source, 'valid', **options)
  windows = [numbers(valid, index) for index in range(4)]
  assert windows[:3] == [[16, 18, 20, 22], [11, 13, 15, 17], [31, 33, 35, 37]]


@pytest.mark.parametrize('split', ['train', 'valid', 'test'])
def test_short_clips_begin_again_or_stand_still(root, split):
  source = files(root, 'short.mp4')
  assert numbers(make(source, split)) == [0, 1, 2, 0]
  assert numbers(make(source, split, short_clips='pad')) == [0, 1, 2, 2]
  assert numbers(make(source, split, frame_stride=2, short_clips='pad')) == [0, 2, 2, 2]


def test_frames_per_second(root):
  video_clips.write(root / 'slow.mp4', 12, rate=5)
  source = files(root, 'long.mp4', 'slow.mp4')
  made = make(source, 'valid', frames_per_second=5.0)
  assert numbers(made, 0) == [12, 17, 22, 27] and numbers(made, 1) == [4, 5, 6, 7]
  made = make(source, 'valid', frames_per_second=10)
  assert numbers(made, 1) == [5, 5, 6, 6]


@pytest.mark.parametrize('split', ['train', 'valid', 'test'])
def test_videos_images_and_pixels_of_the_same_frames_are_shown_alike(root, split):
  names = ('long.mp4', 'tall.mp4', 'short.mp4')
  pixels = [np.stack(video_clips.decode_all(str(root / name))) for name in names]
  pixels[0].flags.writeable = False
  images = [[png(frame) for frame in clip] for clip in pixels]
  options = {'view': SQUARE, 'drawn': DRAWN if split == 'train' else None, 'frame_stride': 2}
  options |= {'num_test_clips': 2, 'num_test_crops': 3}
  expected = batch(make(files(root, *names), split, **options), range(3), epoch=1)
  for source in (Records(pixels), Records(images)):
    for cache_bytes in (0, 10**8):
      made = make(source, split, cache_bytes=cache_bytes, **options)
      for _ in range(2):
        given = batch(made, range(3), epoch=1)
        for key in expected:
          np.testing.assert_array_equal(given[key], expected[key], err_msg=key)
        given['inputs'][:] = 0  # What was handed out is not what is kept.


def test_frames_without_a_rate(root):
  pixels = np.stack(video_clips.decode_all(str(root / 'short.mp4')))
  for clip in (pixels, [png(frame) for frame in pixels]):
    made = make(Records([clip]), frames_per_second=4.0)
    with pytest.raises(errors.UserError, match=r'^clip0: frames_per_second .*Use frame_stride'):
      batch(made, [0])


def test_loaders_pickle(root):
  made = make(files(root, 'long.mp4', 'tall.mp4'), drawn=DRAWN, cache_bytes=10**8)
  fresh = pickle.loads(pickle.dumps(made))
  ours = batch(made, [0, 1], epoch=2)
  for copy in (fresh, pickle.loads(pickle.dumps(made))):
    np.testing.assert_array_equal(ours['inputs'], batch(copy, [0, 1], epoch=2)['inputs'])
