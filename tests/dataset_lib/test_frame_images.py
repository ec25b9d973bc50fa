"""Frames of a clip that are stored as images."""

import io

import numpy as np
import pytest
from PIL import Image

from losa_scenic.dataset_lib import frame_images
from losa_scenic.dataset_lib.sources import BadImage


def png(value, height=3, width=5):
  stream = io.BytesIO()
  Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(stream, 'png')
  return stream.getvalue()


CLIP = [png(10 * i) for i in range(5)]


@pytest.mark.parametrize('indices', [[0], [4, 0, 2], [1, 1, 3, 1], [3, 4, 5, 99], range(5)])
def test_the_wanted_frames_in_the_wanted_order(indices):
  frames = frame_images.decode_frames(CLIP, indices, 'a clip')
  assert frames.shape == (len(indices), 3, 5, 3) and frames.dtype == np.uint8
  expected = [10 * min(i, 4) for i in indices]
  np.testing.assert_array_equal(frames, np.broadcast_to(expected, (3, 5, 3, len(indices))).T)


def test_a_repeated_frame_is_decoded_once(monkeypatch):
  seen, plain = [], frame_images.decode.decode

  def counting(encoded, name):
    seen.append(encoded)
    return plain(encoded, name)

  monkeypatch.setattr(frame_images.decode, 'decode', counting)
  frame_images.decode_frames(CLIP, np.array([2, 0, 2, 2]), 'a clip')
  assert seen == [CLIP[0], CLIP[2]]


def test_frames_that_are_not_wanted_may_be_broken():
  clip = [CLIP[0], b'nothing', CLIP[2][:40], CLIP[3], png(1, 4)]
  assert len(frame_images.decode_frames(clip, [0, 3], 'a clip')) == 2
  for indices, reason in (([1, 0], 'frame 1: not a'), ([2], 'frame 2: '), ([0, 4], 'their size')):
    with pytest.raises(BadImage, match=reason) as raised:
      frame_images.decode_frames(clip, indices, 'a clip')
    assert raised.value.id == 'a clip'
  with pytest.raises(BadImage, match='no frames'):
    frame_images.decode_frames([], [0], 'a clip')


@pytest.mark.parametrize('indices', [[], [-1], [0.5], [[0]]])
def test_what_are_no_indices(indices):
  with pytest.raises(ValueError, match='integers from 0'):
    frame_images.decode_frames(CLIP, indices, 'a clip')
