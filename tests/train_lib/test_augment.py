"""Augmentation: what each step does to images and labels, and that a key decides all of it."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from losa_scenic.model_lib import presets, vit
from losa_scenic.train_lib import augment

SIDE, CLASSES = 16, 5
SPEC = presets.preset('test/8', image_size=SIDE)
OFF = {
  'min_crop_area': 1.0,
  'flip': False,
  'color_jitter': 0.0,
  'mixup_alpha': 0.0,
  'cutmix_alpha': 0.0,
}


def block(**changes) -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(OFF | changes)


def images(count: int = 8, seed: int = 0) -> jax.Array:
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.standard_normal((count, SIDE, SIDE, 3)), jnp.float32)


def batch(count: int = 8) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(1)
  return {
    'inputs': rng.integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8),
    'label': np.arange(count, dtype=np.int32) % CLASSES,
    'batch_mask': np.ones(count, np.float32),
  }


def test_all_off_is_none():
  assert augment.make_augment(block(), SPEC, CLASSES) is None


def test_no_crop_no_flip_is_the_identity():
  same = augment.crop_and_flip(jax.random.key(0), images(), min_area=1.0, flip=False)
  np.testing.assert_allclose(same, images(), atol=1e-6)


def test_flips_mirror_exactly_and_half_the_time():
  many = images(64)
  out = np.asarray(augment.crop_and_flip(jax.random.key(0), many, min_area=1.0, flip=True))
  flipped = 0
  for before, after in zip(np.asarray(many), out, strict=True):
    mirrored = np.abs(after - before[:, ::-1]).max() < 1e-5
    assert mirrored or np.abs(after - before).max() < 1e-5
    flipped += mirrored
  assert 20 <= flipped <= 44


def test_crops_of_a_ramp_are_boxes_of_it():
  """On an image whose pixels are their own coordinates, the output shows which box was taken."""
  y, x = np.meshgrid(np.arange(SIDE) + 0.5, np.arange(SIDE) + 0.5, indexing='ij')
  ramp = np.broadcast_to(np.stack([y, x, 0 * x], -1), (200, SIDE, SIDE, 3)).astype(np.float32)
  out = np.asarray(augment.crop_and_flip(jax.random.key(0), ramp, min_area=0.3, flip=False))
  assert out.min() >= 0
  assert out[..., :2].max() <= SIDE - 0.5 + 1e-4
  inner = slice(2, -2)  # At the border, pixels half outside are repeated.
  rows, columns = out[:, inner, inner, 0], out[:, inner, inner, 1]
  step_y, step_x = np.diff(rows, axis=1), np.diff(columns, axis=2)
  for steps in (step_y, step_x):
    assert steps.max() <= 1 + 1e-4  # Only ever enlarged.
    np.testing.assert_allclose(steps, steps[:, :1, :1] * np.ones_like(steps), atol=1e-3)
  np.testing.assert_allclose(rows, rows[:, :, :1] * np.ones_like(rows), atol=1e-3)
  height, width = step_y[:, 0, 0], step_x[:, 0, 0]  # Shares of the image's sides.
  top = (rows[:, 0, 0] - 2.5 * height) / SIDE
  left = (columns[:, 0, 0] - 2.5 * width) / SIDE
  for start, share in ((top, height), (left, width)):
    assert start.min() >= -1e-3
    assert (start + share).max() <= 1 + 1e-3
  area, aspect = height * width, width / height
  assert 0.25 <= area.min() < 0.4  # A side cut to the image's takes a little of the area away.
  assert 0.8 < area.max() <= 1 + 1e-4
  assert aspect.min() >= 3 / 4 - 1e-3
  assert aspect.max() <= 4 / 3 + 1e-3
  assert len(np.unique(np.round(area, 4))) > 150  # Each image has its own.


def test_color_jitter_of_strength_zero_is_the_identity():
  same = augment.color_jitter(jax.random.key(0), images(), 0.0)
  np.testing.assert_allclose(same, images(), atol=1e-5)
  other = augment.color_jitter(jax.random.key(0), images(), 0.4)
  assert float(jnp.abs(other - images()).max()) > 0.05


@pytest.mark.parametrize('seed', range(6))
def test_mixup_mixes_images_and_labels_alike(seed):
  before, labels = images(), jnp.eye(8)
  after, mixed = augment.mixup(jax.random.key(seed), before, labels, 0.8)
  np.testing.assert_allclose(mixed.sum(1), 1.0, atol=1e-6)
  share = float(mixed[0, 0])
  np.testing.assert_allclose(after, share * before + (1 - share) * before[::-1], atol=1e-5)


@pytest.mark.parametrize('seed', range(6))
def test_cutmix_labels_are_the_shares_of_the_pixels(seed):
  before, labels = images(), jnp.eye(8)
  after, mixed = augment.cutmix(jax.random.key(seed), before, labels, 1.0)
  np.testing.assert_allclose(mixed.sum(1), 1.0, atol=1e-6)
  own = np.asarray((after == before).all(-1))
  other = np.asarray((after == before[::-1]).all(-1))
  assert (own ^ other).all()
  for i in range(8):
    assert float(mixed[i, i]) == pytest.approx(own[i].mean(), abs=1e-6)
    assert float(mixed[i, 7 - i]) == pytest.approx(other[i].mean(), abs=1e-6)
  rows, columns = other[0].any(1), other[0].any(0)
  assert (other[0] == rows[:, None] & columns[None]).all()  # One box.


@pytest.mark.parametrize(
  'changes',
  [
    {'min_crop_area': 0.5},
    {'flip': True},
    {'color_jitter': 0.3},
    {'mixup_alpha': 0.4},
    {'cutmix_alpha': 1.0},
    {'min_crop_area': 0.5, 'flip': True, 'mixup_alpha': 0.4, 'cutmix_alpha': 1.0},
  ],
)
def test_a_key_decides_everything(changes):
  fn = jax.jit(augment.make_augment(block(**changes), SPEC, CLASSES))
  one, again, other = (fn(jax.random.key(seed), batch()) for seed in (3, 3, 4))
  for name in one:
    np.testing.assert_array_equal(one[name], again[name])
  assert not np.array_equal(one['inputs'], other['inputs'])
  np.testing.assert_array_equal(one['batch_mask'], 1.0)
  mixes = 'mixup_alpha' in changes or 'cutmix_alpha' in changes
  assert one['label'].shape == ((8, CLASSES) if mixes else (8,))
  if mixes:
    np.testing.assert_allclose(one['label'].sum(1), 1.0, atol=1e-6)
  else:
    np.testing.assert_array_equal(one['label'], batch()['label'])


def test_images_come_out_normalised():
  fn = augment.make_augment(block(flip=True), SPEC, CLASSES)
  out = np.asarray(fn(jax.random.key(0), batch())['inputs'])
  want = np.asarray(vit.normalize(jnp.asarray(batch()['inputs']), SPEC))
  assert out.dtype == np.float32
  np.testing.assert_allclose(np.sort(out, axis=2), np.sort(want, axis=2), atol=1e-5)


def test_both_mixes_are_drawn():
  fn = jax.jit(augment.make_augment(block(mixup_alpha=1.0, cutmix_alpha=1.0), SPEC, CLASSES))
  before = np.asarray(vit.normalize(jnp.asarray(batch()['inputs']), SPEC))
  kinds = set()
  for seed in range(12):
    after = np.asarray(fn(jax.random.key(seed), batch())['inputs'])
    unmixed = [np.isclose(after, images, atol=1e-5) for images in (before, before[::-1])]
    kinds.add(bool((unmixed[0] | unmixed[1]).all()))
  assert kinds == {True, False}
