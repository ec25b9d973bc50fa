"""Clips that cannot be read: replaced in training, masked in evaluation, listed."""

import pathlib

import numpy as np
import pytest
from reference import video_clips
from reference.clip_loaders import FRAMES, Records, batch, files, make, numbers, png

from losa_scenic.dataset_lib import clip_files
from losa_scenic.dataset_lib.frame_sampling import WHOLE, Segment

pytest.importorskip('av', reason="PyAV is not installed: pip install 'losa_scenic[video]'")


@pytest.fixture(scope='module')
def root(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('clips')
  for name, count in (('long', 40), ('short', 3)):
    video_clips.write(folder / f'{name}.mp4', count)
  whole = (folder / 'long.mp4').read_bytes()
  (folder / 'truncated.mp4').write_bytes(whole[: len(whole) * 2 // 3])
  (folder / 'empty.mp4').touch()
  return folder


def test_bad_clips_are_replaced_in_training_and_masked_in_evaluation(root):
  names = ('long.mp4', 'long.mp4', 'truncated.mp4', 'empty.mp4', 'gone.mp4', 'short.mp4')
  segments = [WHOLE, Segment(1.7, 2.0), *[WHOLE] * 4]  # The clip lasts 1.6 s.
  source = files(root, *names, segments=segments)
  good = batch(make(source), [0, 5], epoch=3)
  for cache_bytes in (0, 10**8):
    given = batch(make(source, cache_bytes=cache_bytes), range(6), epoch=3)
    np.testing.assert_array_equal(given['inputs'][0], good['inputs'][0])
    for stand_in in given['inputs'][1:]:
      np.testing.assert_array_equal(stand_in, good['inputs'][1])
    assert given['label'].tolist() == [0, 5, 5, 5, 5, 5] and given['batch_mask'].all()
    assert given['index'].tolist() == list(range(6))
    assert_listed(given['problems'], root, 'train')
  for split in ('valid', 'test'):
    given = batch(make(source, split, num_test_clips=2), range(6))
    assert given['batch_mask'].tolist() == [1, 0, 0, 0, 0, 1]
    assert not given['inputs'][1:5].any() and given['inputs'][0].any()
    assert given['index'].tolist() == [0, -1, -1, -1, -1, 5]
    assert_listed(given['problems'], root, split)


def assert_listed(problems, root, split) -> None:
  assert [(p.split, p.index) for p in problems] == [(split, i) for i in range(1, 5)]
  names = ('long.mp4', 'truncated.mp4', 'empty.mp4', 'gone.mp4')
  assert [p.id for p in problems] == [str(root / name) for name in names]
  reasons = [p.reason for p in problems]
  assert reasons[0].startswith('A segment must begin inside the clip, which lasts 1.60 s')
  assert reasons[1:3] == ['the file is truncated', 'the file is empty']
  assert reasons[3] == 'cannot be read (No such file or directory)'


@pytest.fixture(scope='module')
def damaged(tmp_path_factory) -> pathlib.Path:
  """A clip of 40 frames, of which frame 35 cannot be decoded."""
  path = tmp_path_factory.mktemp('damaged') / 'damaged.avi'
  video_clips.write(path, 40, kind='mjpeg.avi')
  content = bytearray(path.read_bytes())
  place = -1
  for _ in range(36):  # Frame 35, each a chunk of its own.
    place = content.index(b'00dc', place + 1)
  size = int.from_bytes(content[place + 4 : place + 8], 'little')
  content[place + 8 : place + 8 + size] = bytes(size)
  path.write_bytes(content)
  return path


def test_damage_counts_only_where_it_is_shown(damaged):
  source = files(damaged.parent, 'damaged.avi')
  for cache_bytes in (0, 10**8):
    options = {'frame_stride': 3, 'cache_bytes': cache_bytes}
    assert numbers(make(source, 'valid', **options)) == [15, 18, 21, 24]
    given = batch(make(source, 'test', num_test_clips=2, **options), [0])
    assert not given['batch_mask'].any()
    assert [p.id for p in given['problems']] == [str(damaged)]


@pytest.mark.parametrize('cache_bytes', [0, 10**8])
def test_other_windows_of_a_damaged_clip_are_shown_whatever_came_before(damaged, cache_bytes):
  source = Records([clip_files.Clip(str(damaged)), np.full((4, 48, 64, 3), 255, np.uint8)])
  made, fine = make(source, cache_bytes=cache_bytes, frame_stride=3), []
  for epoch in range(30):
    shown = batch(made, [0], epoch)
    window = video_clips.numbers(shown['inputs'][0])
    fine.append(shown['label'][0] == 0)
    if fine[-1]:
      assert window == [window[0] + 3 * k for k in range(FRAMES)] and 35 not in window
      assert 'problems' not in shown
    else:
      assert window == [1023] * 4 and [p.index for p in shown['problems']] == [0]
    alone = batch(make(source, frame_stride=3), [0], epoch)
    np.testing.assert_array_equal(alone['inputs'], shown['inputs'])
  assert 0 < fine.index(False) < 25 and any(fine[fine.index(False) :])


def test_clips_without_frames_and_images():
  given = batch(make(Records([[], np.zeros((0, 8, 8, 3), np.uint8)]), 'valid'), [0, 1])
  assert not given['batch_mask'].any()
  assert given['problems'][0].reason == 'the clip has no frames' and len(given['problems']) == 2
  for image in (np.zeros((8, 8, 3), np.uint8), png(np.zeros((8, 8, 3), np.uint8))):
    with pytest.raises(TypeError, match='clip0: a clip is wanted, not an image'):
      batch(make(Records([image])), [0])
