"""Augmentation as clips need it: square crops, and the same for every frame."""

import math

import numpy as np
import pytest
from reference.random_batches import images, rngs

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import augment
from losa_scenic.dataset_lib.augment import Augment
from losa_scenic.dataset_lib.resize import View

# What is done to a frame, each alone.
ALONE = {'flip': True, 'color_jitter': 0.3, 'randaugment_ops': 2, 'erasing_probability': 1.0}


@pytest.mark.parametrize('options, message', [
  ({'min_scale': 0.0}, r'min_scale must be above 0 and at most augment.max_scale: 0\.0, 1\.0'),
  ({'min_scale': 1.2}, r'min_scale must be .* at most augment.max_scale: 1\.2, 1\.0'),
  ({'max_scale': 0.8}, r'min_scale must be .* at most augment.max_scale: 1\.0, 0\.8'),
  ({'min_scale': math.nan}, 'min_scale must be .*: nan, 1'),
  ({'max_scale': math.nan}, 'min_scale must be .*: 1.0, nan'),
  ({'max_scale': math.inf}, 'min_scale must be .*: 1.0, inf'),
  ({'max_scale': 1.3, 'square_crops': False}, 'max_scale need augment.square_crops'),
  ({'min_scale': 0.9, 'square_crops': False}, 'max_scale need augment.square_crops'),
  ({'min_crop_area': 0.5}, 'Choose one: augment.square_crops or augment.min_crop_area'),
])  # fmt: skip
def test_square_crops_that_cannot_be(options, message):
  with pytest.raises(errors.UserError, match=message):
    Augment(**{'square_crops': True} | options)


@pytest.mark.parametrize('size', [(90, 160), (160, 90), (120, 120)])
@pytest.mark.parametrize('share', [None, 0.8])
def test_square_crops_have_the_sides_asked_for_and_lie_anywhere(size, share):
  on = Augment(square_crops=True, min_scale=0.9, max_scale=1.33)
  view, shorter = View(8, central_crop=share), min(size)
  rng = augment.generator(0, 0, 0)
  boxes = np.array([augment.crop_box(on, view, rng, *size) for _ in range(2000)])
  top, left, h, w = boxes.T
  assert (h == w).all() and (top >= 0).all() and (left >= 0).all()
  assert (top + h <= size[0]).all() and (left + w <= size[1]).all()
  side = (share or 1.0) * shorter
  assert h.min() == round(side / 1.33) and h.max() == min(shorter, round(side / 0.9))
  # The factor is uniform; where a larger square would not fit it is the largest.
  expected = np.minimum(shorter, np.rint(side / np.linspace(0.9, 1.33, 10_000)))
  np.testing.assert_allclose(
    np.quantile(h, (0.25, 0.5, 0.75)), np.quantile(expected, (0.25, 0.5, 0.75)), atol=1.5
  )
  for place, length in ((top, size[0]), (left, size[1])):
    free = length - h
    share_of_free = (place / np.maximum(free, 1))[free >= 20]
    if len(share_of_free) > 200:
      assert share_of_free.min() < 0.03 and share_of_free.max() > 0.97
      assert abs(share_of_free.mean() - 0.5) < 0.05 and abs(share_of_free.std() - 0.3) < 0.05


@pytest.mark.parametrize('size', [(1, 1), (1, 9), (700, 1), (3, 2)])
def test_square_crops_lie_inside_tiny_images(size):
  on, rng = Augment(square_crops=True, min_scale=0.5, max_scale=30.0), augment.generator(0, 0, 0)
  for _ in range(50):
    box = augment.crop_box(on, View(8, central_crop=0.5), rng, *size)
    assert all(type(number) is int for number in box) and box.height == box.width >= 1
    assert 0 <= box.top <= size[0] - box.height and 0 <= box.left <= size[1] - box.width


CLIP_FIELDS = [*ALONE.items(), ('everything', ALONE)]


@pytest.mark.parametrize('field, value', CLIP_FIELDS, ids=[name for name, _ in CLIP_FIELDS])
def test_every_frame_of_a_clip_gets_the_same(field, value):
  on = Augment(**(ALONE if field == 'everything' else {field: value}))
  frames, still = images(5), np.repeat(images(1, seed=1), 5, axis=0)
  changed = 0
  for index in range(12):
    for clip in (frames, still):
      rng = alone = augment.generator(0, 0, index)
      rng.integers(7)  # As of a crop: the generator is in the middle of its stream.
      shown = augment.apply_to_clip(on, rng, clip)
      for frame, seen in zip(clip, shown, strict=True):
        alone = augment.generator(0, 0, index)
        alone.integers(7)
        np.testing.assert_array_equal(seen, augment.apply(on, alone, frame))
      assert rng.random() == alone.random()
      changed += np.any(shown != clip)
    assert (shown == shown[:1]).all()  # A still clip stands still.
  assert changed >= (4 if field == 'flip' else 20)


def test_a_clip_without_augmentation_is_itself():
  frames = images(3)
  for off in (Augment(), Augment(square_crops=True), Augment(mixup_alpha=1.0)):
    assert augment.apply_to_clip(off, rngs(1)[0], frames) is frames
