"""Parts that are split off: fair to every class, and nothing but the names decides."""

import hashlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import sources, splitting

CLASSES = ('ant', 'bee', 'cat')


def source(count: int) -> sources.FileSource:
  return sources.FileSource('/', [str(i) for i in range(count)], [0] * count, num_classes=1)


@hypothesis.given(
  counts=st.lists(st.integers(4, 30), min_size=1, max_size=3),
  share=st.floats(0.01, 0.6),
  salt=st.text(max_size=5),
  seed=st.integers(0, 2**32 - 1),
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_split_off_is_a_stratified_partition_that_order_does_not_change(counts, share, salt, seed):
  labels = np.repeat(np.arange(len(counts)), counts)
  names = [f'{i}.jpg' for i in range(len(labels))]
  kept, taken = splitting.split_off(names, labels, CLASSES, share, salt)
  assert sorted([*kept, *taken]) == list(range(len(labels)))
  assert np.all(np.diff(kept) > 0) and np.all(np.diff(taken) > 0)
  wanted = [max(1, round(share * count)) for count in counts]
  assert np.bincount(labels[taken]).tolist() == wanted
  order = np.random.default_rng(seed).permutation(len(labels))
  _, again = splitting.split_off([names[i] for i in order], labels[order], CLASSES, share, salt)
  assert {names[i] for i in order[again]} == {names[i] for i in taken}


def test_the_smallest_hashes_of_seed_part_class_and_name_are_taken():
  names = [f'{i}.png' for i in range(20)]
  _, taken = splitting.split_off(names, np.ones(20, int), CLASSES, 0.25, '7/val')
  ranked = sorted(names, key=lambda n: hashlib.sha256(f'7/val/bee/{n}'.encode()).digest())
  assert [names[i] for i in taken] == sorted(ranked[:5], key=names.index)


def test_shares_are_of_all_images_of_a_class_and_parts_are_disjoint():
  labels = np.repeat([0, 1], [20, 10])
  names = [str(i) for i in range(30)]
  options = {'val_fraction': None, 'test_fraction': None, 'split_seed': 0, 'where': 'x'}
  parts, about = splitting.complete({'train': source(30)}, names, labels, CLASSES, **options)
  indices = [parts[part].indices for part in ('train', 'val', 'test')]
  assert [np.bincount(labels[i]).tolist() for i in indices] == [[14, 7], [2, 1], [4, 2]]
  assert sorted(np.concatenate(indices)) == list(range(30))
  assert len(about) == 2 and '6 images split off train' in about[0]
  other, _ = splitting.complete(
    {'train': source(30)}, names, labels, CLASSES, **{**options, 'split_seed': 1}
  )
  assert other['test'].indices.tolist() != parts['test'].indices.tolist()


def test_a_set_with_test_images_loses_none_unless_asked():
  labels, names = np.zeros(10, int), [str(i) for i in range(10)]
  parts = {'train': source(10), 'test': source(3)}
  options = {'test_fraction': None, 'split_seed': 0, 'where': 'x'}
  result, about = splitting.complete(parts, names, labels, 'a', val_fraction=None, **options)
  assert result == parts and about == ()
  result, _ = splitting.complete(parts, names, labels, 'a', val_fraction=0.3, **options)
  assert len(result['train']) == 7 and len(result['val']) == 3 and result['test'] is parts['test']


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'val_fraction': 1.0}, r'val_fraction must be a number in \[0, 1\), not 1.0'),
    ({'val_fraction': True}, 'val_fraction must be a number'),
    ({'test_fraction': -0.1}, 'test_fraction must be'),
    ({'test_fraction': 0}, 'x: there are no test images'),
    ({'test_fraction': 0.5, 'val_fraction': 0.5}, "Class 'ant': 4 images are too few"),
  ],
)
def test_shares_that_cannot_be(options, message):
  options = {'val_fraction': None, 'test_fraction': None, **options}
  with pytest.raises(errors.UserError, match=message):
    splitting.complete(
      {'train': source(4)},
      list('abcd'),
      np.zeros(4, int),
      CLASSES,
      split_seed=0,
      where='x',
      **options,
    )


def test_a_share_of_a_part_that_exists_and_a_name_twice():
  with pytest.raises(errors.UserError, match='val_fraction is given, but the set has its own val'):
    splitting.fraction('val', 0.1, 0.0, exists=True, where='x')
  with pytest.raises(errors.UserError, match=r'^b: listed twice'):
    splitting.split_off(list('abbc'), np.zeros(4, int), CLASSES, 0.25, 's')
  # The same name in another class is another image.
  kept, taken = splitting.split_off(list('abcabc'), np.repeat([0, 1], 3), CLASSES, 0.3, 's')
  assert len(kept) == 4 and len(taken) == 2
