"""RandAugment's operations against torchvision's (golden/make_augment.py), and their drawing."""

import collections
import pathlib

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from losa_scenic.dataset_lib import randaugment

GOLDEN = dict(np.load(pathlib.Path(__file__).parent.parent / 'golden' / 'augment.npz'))
ROUNDED = {
  'color',
  'sharpness',
  'saturation',
}  # May differ by 1 in few values; all others are equal.
NO_STRENGTH = {'identity', 'autocontrast', 'equalize'}


def colourful(seed=0, shape=(48, 48, 3)):
  return np.random.default_rng(seed).integers(20, 250, shape, dtype=np.uint8)


def check(name, have, want, key):
  assert have.dtype == np.uint8 and have.shape == want.shape, key
  difference = np.abs(have.astype(int) - want)
  if name in ROUNDED:
    assert difference.max() <= 1 and (difference > 0).mean() < 0.005, key
  else:
    assert difference.max() == 0, key


@pytest.mark.parametrize('name', randaugment.OPERATIONS)
def test_operations_equal_torchvision(name):
  keys = [key for key in GOLDEN if f'/{name}/' in key]
  signed = randaugment.OPERATIONS[name].signed
  assert len(keys) == (8 if signed else 2 if name in NO_STRENGTH else 4)
  for key in keys:
    image, _, level = key.split('/')
    have = randaugment.OPERATIONS[name].run(GOLDEN[image], float(level))
    check(name, have, GOLDEN[key], key)


@pytest.mark.parametrize('name', ['brightness', 'contrast', 'saturation'])
def test_jitters_equal_torchvision(name):
  keys = [key for key in GOLDEN if f'/jitter_{name}/' in key]
  assert len(keys) == 6
  for key in keys:
    image, _, factor = key.split('/')
    check(name, getattr(randaugment, name)(GOLDEN[image], float(factor)), GOLDEN[key], key)


@pytest.mark.parametrize('name', ['brightness', 'contrast', 'saturation', 'sharpness'])
def test_blends_equal_pillow_at_any_factor(name):
  """And of images of 1 and 2 pixels, and of greys, which must not darken."""
  enhance = {'saturation': 'Color'}.get(name, name.capitalize())
  rng = np.random.default_rng(1)
  grey = np.repeat(colourful(9, (48, 48, 1)), 3, axis=2)
  for image in (colourful(), grey, colourful(1, (1, 1, 3)), colourful(2, (2, 9, 3))):
    for factor in [1.0, *rng.uniform(0, 2, 10)]:
      have = getattr(randaugment, name)(image, float(factor))
      want = np.asarray(getattr(ImageEnhance, enhance)(Image.fromarray(image)).enhance(factor))
      check(name, have, want, f'{image.shape} {factor}')
  if name == 'saturation':
    for factor in rng.uniform(0, 2, 50):
      np.testing.assert_array_equal(randaugment.saturation(grey, float(factor)), grey)


@pytest.mark.parametrize('name', randaugment.OPERATIONS)
@pytest.mark.parametrize('shape', [(1, 1, 3), (2, 9, 3), (32, 32, 3)])
def test_operations_of_any_size_leave_their_input_alone(name, shape):
  image = colourful(shape=shape)
  before = image.copy()
  image.flags.writeable = False
  operation = randaugment.OPERATIONS[name]
  for level in (0.9, 1.0, -0.9, -1.0) if operation.signed else (0.9, 1.0):
    after = operation.run(image, level)
    assert after.shape == shape and after.dtype == np.uint8
    if shape[0] == 32 and name != 'identity':
      assert np.any(after != before)
  np.testing.assert_array_equal(image, before)


def test_all_operations_and_both_signs_are_drawn_alike(monkeypatch):
  drawn = collections.Counter()

  def spy(name, operation):
    def run(image, level):
      drawn[name, level] += 1
      return image

    return operation._replace(run=run)

  spies = [spy(name, operation) for name, operation in randaugment.OPERATIONS.items()]
  monkeypatch.setattr(randaugment, '_DRAWN', tuple(spies))
  rng = np.random.default_rng(0)
  for _ in range(1400):
    randaugment.randaugment(rng, colourful(), 2, 4.0)
  assert sum(drawn.values()) == 2800
  assert len(drawn) == 14 + sum(operation.signed for operation in spies) == 23
  for (name, level), times in drawn.items():
    signed = randaugment.OPERATIONS[name].signed
    assert level in ((0.4, -0.4) if signed else (0.4,))
    expected = 100 if signed else 200
    assert 0.6 * expected < times < 1.4 * expected, (name, level, times)


def test_more_operations_and_more_magnitude_change_more():
  image = GOLDEN['smooth']

  def change(count, magnitude):
    results = [
      randaugment.randaugment(np.random.default_rng(seed), image, count, magnitude)
      for seed in range(60)
    ]
    return np.mean([np.abs(result.astype(float) - image).mean() for result in results])

  assert randaugment.randaugment(np.random.default_rng(0), image, 0, 9.0) is image
  assert change(2, 2.0) < 0.75 * change(2, 9.0)
  assert change(1, 9.0) < 0.75 * change(3, 9.0)
