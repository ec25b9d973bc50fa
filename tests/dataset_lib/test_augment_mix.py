"""Mixup and cutmix: which images of a batch, by how much, and the same from parts of it."""

import numpy as np
import pytest
from reference.random_batches import SIDE, images, rngs

from losa_scenic.dataset_lib import mixing
from losa_scenic.dataset_lib.augment import Augment


def test_mixup_mixes_neighbours_by_their_shares():
  before, labels = images(7), np.arange(10, 17)
  mixed = mixing.mix(Augment(mixup_alpha=0.8), rngs(7), before, labels)
  assert mixed.images.dtype == np.uint8 and mixed.images.shape == before.shape
  assert mixed.partner_labels.dtype == np.int32 and mixed.share.dtype == np.float32
  np.testing.assert_array_equal(mixed.partner_labels, [11, 10, 13, 12, 15, 14, 16])
  assert mixed.share[-1] == 1
  np.testing.assert_array_equal(mixed.images[-1], before[-1])
  assert len(np.unique(mixed.share)) == 7
  for i in range(6):
    share = mixed.share[i]
    want = share * before[i].astype(np.float32) + (1 - share) * before[i ^ 1]
    np.testing.assert_allclose(mixed.images[i], want, atol=0.501)


def test_empty_slots_are_mixed_with_nothing():
  before, labels = images(8), np.arange(8)
  mixed = mixing.mix(Augment(mixup_alpha=0.8), rngs(5), before, labels)
  np.testing.assert_array_equal(mixed.partner_labels, [1, 0, 3, 2, 4, 5, 6, 7])
  np.testing.assert_array_equal(mixed.images[4:], before[4:])
  np.testing.assert_array_equal(mixed.share[4:], 1)
  assert (mixed.share[:4] < 1).all()
  with pytest.raises(ValueError, match='9 generators for 8 images'):
    mixing.mix(Augment(mixup_alpha=0.8), rngs(9), before, labels)


@pytest.mark.parametrize('field', ['mixup_alpha', 'cutmix_alpha'])
@pytest.mark.parametrize('alpha, spread', [(0.2, 0.42), (1.0, 0.289), (8.0, 0.121)])
def test_shares_are_beta_distributed(field, alpha, spread):
  before = images(1000, side=4 if field == 'mixup_alpha' else 16)
  mixed = mixing.mix(Augment(**{field: alpha}), rngs(1000), before, np.zeros(1000, np.int32))
  share = mixed.share.astype(float)
  # The larger of the two shares. Rows of boxes are rounded; those that reach over the edge are cut.
  assert share.min() >= (0.5 if field == 'mixup_alpha' else 0.4) and share.max() <= 1
  around_half = np.sqrt(np.mean((share - 0.5) ** 2))
  if field == 'mixup_alpha':
    assert abs(around_half - spread) < 0.03
  else:
    assert around_half > spread - 0.03


def test_cutmix_pastes_one_box_and_counts_its_pixels():
  before = np.zeros((200, SIDE, SIDE, 3), np.uint8)
  before[1::2] = 255
  before.flags.writeable = False
  mixed = mixing.mix(Augment(cutmix_alpha=1.0), rngs(200), before, np.arange(200) % 2)
  for i in range(200):
    pasted = np.all(mixed.images[i] == before[i ^ 1], axis=2)
    assert (pasted | np.all(mixed.images[i] == before[i], axis=2)).all()
    rows, columns = pasted.any(1), pasted.any(0)
    assert (pasted == rows[:, None] & columns[None]).all()
    assert np.sum(np.diff(rows.astype(int)) == 1) <= 1  # One run.
    assert mixed.share[i] == pytest.approx(1 - pasted.mean(), abs=1e-6)
  np.testing.assert_array_equal(mixed.partner_labels, (np.arange(200) + 1) % 2)


def test_both_mixes_are_drawn_half_of_the_time():
  before = np.zeros((300, SIDE, SIDE, 3), np.uint8)
  before[1::2] = 255
  on = Augment(mixup_alpha=4.0, cutmix_alpha=4.0)
  mixed = mixing.mix(on, rngs(300), before, np.zeros(300, np.int32))
  blended = np.any((mixed.images > 0) & (mixed.images < 255), axis=(1, 2, 3))
  assert 110 < blended.sum() < 190


def test_parts_of_a_batch_give_the_images_of_the_whole():
  on = Augment(mixup_alpha=0.4, cutmix_alpha=1.0)
  before, labels = images(12), np.arange(12)
  whole = mixing.mix(on, rngs(12), before, labels)
  parts = (np.s_[:6], np.s_[6:])
  halves = [mixing.mix(on, rngs(12)[part], before[part], labels[part]) for part in parts]
  for name in whole._fields:
    joined = np.concatenate([getattr(half, name) for half in halves])
    np.testing.assert_array_equal(joined, getattr(whole, name))
