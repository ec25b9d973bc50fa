"""Augmentation: what is drawn, what it does to images and labels, and that a seed decides all."""

import dataclasses
import math

import numpy as np
import pytest
from reference.random_batches import SIDE, images, rngs

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import augment, mixing
from losa_scenic.dataset_lib.augment import Augment

# What each field does alone. The fields that only say how another one works are below.
ALONE = {
  'flip': True,
  'color_jitter': 0.3,
  'randaugment_ops': 2,
  'erasing_probability': 1.0,
}


def test_by_default_nothing_happens():
  off = Augment()
  assert not (off.active or off.crops or off.mixes)
  image = images(1)[0]
  assert augment.apply(off, rngs(1)[0], image) is image
  mixed = mixing.mix(off, rngs(3), images(3), np.arange(3))
  np.testing.assert_array_equal(mixed.images, images(3))
  np.testing.assert_array_equal(mixed.share, 1)


def test_every_field_that_is_on_changes_images():
  tested = {*ALONE, 'min_crop_area', 'randaugment_magnitude', 'mixup_alpha', 'cutmix_alpha'}
  tested |= {'square_crops', 'min_scale', 'max_scale'}
  assert {field.name for field in dataclasses.fields(Augment)} == tested | {'interpolation'}
  before = images(20)
  for field, value in ALONE.items():
    on = Augment(**{field: value})
    assert on.active and not on.crops and not on.mixes
    after = [augment.apply(on, rng, image) for rng, image in zip(rngs(20), before, strict=True)]
    changed = [np.any(a != b) for a, b in zip(after, before, strict=True)]
    assert sum(changed) >= (4 if field == 'flip' else 16), field
    for image in after:
      assert image.dtype == np.uint8 and image.shape == (SIDE, SIDE, 3)
  weak, strong = (Augment(randaugment_ops=2, randaugment_magnitude=m) for m in (1.0, 9.0))
  assert any(
    np.any(augment.apply(weak, one, image) != augment.apply(strong, other, image))
    for one, other, image in zip(rngs(20), rngs(20), before, strict=True)
  )
  for field in ('mixup_alpha', 'cutmix_alpha'):
    on = Augment(**{field: 1.0})
    assert on.active and on.mixes and not on.crops
    mixed = mixing.mix(on, rngs(20), before, np.zeros(20, np.int32))
    assert np.mean(np.any(mixed.images != before, axis=(1, 2, 3))) > 0.7
  for on in (Augment(min_crop_area=0.5), Augment(square_crops=True)):
    assert on.crops and on.active and not on.alone and not on.mixes


@pytest.mark.parametrize('field, values', [
  ('min_crop_area', (0.0, -0.1, 1.01, math.nan)),
  ('color_jitter', (-0.1, 1.1, math.nan)),
  ('randaugment_ops', (-1, 1.5, True)),
  ('randaugment_magnitude', (-0.1, 10.5, math.nan)),
  ('erasing_probability', (-0.1, 1.1, math.nan)),
  ('mixup_alpha', (-1.0, math.inf, math.nan)),
  ('cutmix_alpha', (-1.0, math.inf, math.nan)),
])  # fmt: skip
def test_values_out_of_range_are_refused(field, values):
  for value in values:
    with pytest.raises(errors.UserError, match=rf'^augment\.{field} .*{value}'):
      Augment(**{field: value})


def test_bounds_of_the_ranges_are_allowed():
  lowest = Augment(
    min_crop_area=1e-9,
    flip=False,
    color_jitter=0,
    randaugment_ops=0,
    randaugment_magnitude=0,
    erasing_probability=0,
    mixup_alpha=0,
    cutmix_alpha=0,
  )
  highest = Augment(
    min_crop_area=1,
    flip=True,
    color_jitter=1,
    randaugment_ops=20,
    randaugment_magnitude=10,
    erasing_probability=1,
    mixup_alpha=100,
    cutmix_alpha=100,
  )
  for on in (lowest, highest):
    mixed = mixing.mix(on, rngs(2), images(2), np.arange(2))
    for rng, image in zip(rngs(2, epoch=1), mixed.images, strict=True):
      assert augment.apply(on, rng, image).shape == image.shape


RAW = [16464749820348923419, 8017314475498094676, 3289571395893433142]
RANDOM = 0.892555876233
INTEGERS = [705, 434, 451, 178]
CROP = (118, 157, 284, 223)


def test_a_generator_is_the_same_everywhere():
  """Recorded values: of the raw stream, which NumPy promises, and of draws as used here."""
  rng = augment.generator(seed=3, epoch=2, index=12345678901)
  assert [int(x) for x in rng.bit_generator.random_raw(3)] == RAW
  rng = augment.generator(seed=3, epoch=2, index=12345678901)
  assert round(rng.random(), 12) == RANDOM
  assert rng.integers(0, 1000, 4).tolist() == INTEGERS
  assert augment.random_crop(rng, 480, 640, 0.2) == CROP


def test_generators_are_independent_of_each_other():
  places = [
    (seed, epoch, index)
    for seed in (0, 1, -1, 2**64 - 2)
    for epoch in (0, 1, 9)
    for index in range(30)
  ]
  draws = np.stack([augment.generator(*place).random(50) for place in places])
  assert len(np.unique(draws)) == draws.size
  assert abs(draws.mean() - 0.5) < 0.01
  correlation = np.corrcoef(draws)
  np.fill_diagonal(correlation, 0)
  assert np.abs(correlation).max() < 0.7
  assert np.abs(np.corrcoef(draws.T) - np.eye(50)).max() < 0.25
  streams = [augment.generator(0, 0, 0, stream).random(50) for stream in range(4)]
  assert (
    np.array_equal(streams[0], draws[0])
    and len(np.unique([*draws, *streams[1:]])) == draws.size + 150
  )
  numpy_seed = augment.generator(np.int64(5), np.int32(1), np.int64(7))
  assert numpy_seed.random() == augment.generator(5, 1, 7).random()


def test_crops_have_the_area_and_aspect_asked_for():
  height, width = 450, 450
  rng = augment.generator(0, 0, 0)
  boxes = np.array([augment.random_crop(rng, height, width, 0.2) for _ in range(1500)])
  top, left, h, w = boxes.T
  assert (top >= 0).all() and (left >= 0).all()
  assert (top + h <= height).all() and (left + w <= width).all()
  area, aspect = h * w / (height * width), w / h
  assert 0.195 < area.min() < 0.22 and 0.9 < area.max() <= 1
  assert 0.745 < aspect.min() < 0.77 and 1.3 < aspect.max() < 1.34
  assert abs(np.log(aspect).mean()) < 0.02
  # Uniform, but that the largest often do not fit.
  assert 0.23 < np.mean(area < 0.4) < 0.36
  free_y, free_x = height - h, width - w
  assert abs(np.mean(top[free_y > 50] / free_y[free_y > 50]) - 0.5) < 0.03
  assert abs(np.mean(left[free_x > 50] / free_x[free_x > 50]) - 0.5) < 0.03


@pytest.mark.parametrize(
  'size', [(1, 1), (1, 2), (1, 1000), (1000, 1), (3, 7), (5000, 2), (32, 32)]
)
def test_crops_lie_inside_images_of_any_shape(size):
  for min_area in (1e-6, 0.08, 0.999, 1.0):
    rng = augment.generator(1, 0, 0)
    for _ in range(50):
      box = augment.random_crop(rng, *size, min_area)
      assert all(type(number) is int for number in box)
      assert 0 <= box.top <= box.top + box.height - 1 < size[0]
      assert 0 <= box.left <= box.left + box.width - 1 < size[1]


def test_crops_that_cannot_fit_are_central():
  rng = augment.generator(0, 0, 0)
  assert augment.random_crop(rng, 300, 1000, 0.99) == (0, 300, 300, 400)
  assert augment.random_crop(rng, 1000, 300, 0.99) == (300, 0, 400, 300)


def test_flips_mirror_half_of_the_time():
  before = images(400, side=8)
  flipped = 0
  for rng, image in zip(rngs(400), before, strict=True):
    after = augment.apply(Augment(flip=True), rng, image)
    mirrored = np.array_equal(after, image[:, ::-1])
    assert mirrored or np.array_equal(after, image)
    flipped += mirrored
  assert 160 < flipped < 240


def test_jitter_has_random_factors_and_orders(monkeypatch):
  calls = []

  def spy(name):
    return lambda image, factor: calls.append((name, factor)) or image

  monkeypatch.setattr(augment, '_JITTERS', tuple(spy(name) for name in 'bcs'))
  for rng in rngs(600):
    augment.color_jitter(rng, images(1)[0], 0.4)
  names = [name for name, _ in calls]
  orders = {tuple(names[i : i + 3]) for i in range(0, 1800, 3)}
  assert len(orders) == 6 and all(len(set(order)) == 3 for order in orders)
  for name in 'bcs':
    factors = [factor for other, factor in calls if other == name]
    assert 0.6 <= min(factors) < 0.62 and 1.38 < max(factors) <= 1.4
    assert abs(np.mean(factors) - 1) < 0.04


def test_erased_boxes_are_noise_of_the_published_sizes():
  side = 64
  black = np.zeros((side, side, 3), np.uint8)
  black.flags.writeable = False
  areas, aspects = [], []
  for rng in rngs(500):
    erased = augment.erase(rng, black).any(axis=2)
    rows, columns = np.flatnonzero(erased.any(1)), np.flatnonzero(erased.any(0))
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert erased[box].mean() > 0.95 and erased.sum() == erased[box].sum()
    areas.append(erased[box].size / side**2)
    aspects.append(erased[box].shape[1] / erased[box].shape[0])
  values = augment.erase(rngs(1)[0], black)
  assert 0.018 < min(areas) < 0.03 and 0.31 < max(areas) < 0.34
  assert 0.28 < min(aspects) < 0.34 and 2.9 < max(aspects) < 3.7
  values = values[values > 0]
  assert len(np.unique(values)) > 50 and values.min() < 10 and values.max() > 245


def test_erasing_has_its_probability_and_skips_what_is_too_small():
  before = images(300, side=16)
  on = Augment(erasing_probability=0.25)
  changed = sum(
    augment.apply(on, rng, image) is not image for rng, image in zip(rngs(300), before, strict=True)
  )
  assert 50 < changed < 100
  line = images(1, side=1000)[0, :1]
  assert augment.erase(rngs(1)[0], line) is line


def test_seed_epoch_and_index_decide_everything():
  on = Augment(
    min_crop_area=0.3,
    flip=True,
    color_jitter=0.4,
    randaugment_ops=2,
    randaugment_magnitude=9.0,
    erasing_probability=0.5,
    mixup_alpha=0.4,
    cutmix_alpha=1.0,
  )
  before = images(8)

  def run(seed, epoch):
    draws = rngs(8, seed, epoch)
    crops = [augment.random_crop(rng, 100, 120, on.min_crop_area) for rng in draws]
    done = [augment.apply(on, rng, image) for rng, image in zip(draws, before, strict=True)]
    return crops, mixing.mix(on, draws, np.stack(done), np.arange(8))

  (crops, mixed), (same_crops, same) = run(3, 1), run(3, 1)
  assert crops == same_crops and len(set(crops)) == 8
  for name in mixed._fields:
    np.testing.assert_array_equal(getattr(mixed, name), getattr(same, name))
  for other in (run(4, 1), run(3, 2)):
    assert np.any(other[1].images != mixed.images) and other[0] != crops
