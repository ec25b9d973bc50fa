"""What `check` counts, on sources made here."""

import dataclasses

import numpy as np

from losa_scenic.dataset_lib import (
  check,
  check_report,
  check_text,
  datasets,
  repeats,
  resize,
  sources,
)
from losa_scenic.dataset_lib.check_report import SHORT_SIDES


def array_source(labels, images):
  return sources.ArraySource(images, labels, 'made', num_classes=3)


def test_pixels_classes_and_sizes():
  rng = np.random.default_rng(0)
  train = array_source([0, 0, 2], rng.integers(0, 256, (3, 6, 9, 3), np.uint8))
  test = array_source([1, 1], np.repeat(rng.integers(0, 256, (1, 200, 100, 3), np.uint8), 2, 0))
  found = check.check(sources.Splits(train, None, test, ('a', 'b', 'c')), 'arrays', resize.View(16))
  assert found.empty_classes == ('b',)
  assert found.troubles == ('1 class without a training image',)
  assert not found.notes
  assert found.parts['test'].duplicates == 1
  assert found.repeats[0].again.id == 'made[1]'
  assert found.kinds == {'pixels RGB': 5}
  assert found.sizes == ((9, 6), (9, 6), (100, 200))  # Width, height.
  assert found.enlarged == 3
  buckets = dict(zip(('below', *SHORT_SIDES), found.short_sides, strict=True))
  assert {k: v for k, v in buckets.items() if v} == {'below': 3, 64: 2}
  assert sum(found.aspects) == 5


def test_what_is_expected_of_a_set_is_a_note():
  images = np.random.default_rng(0).integers(0, 256, (4, 6, 9, 3), np.uint8)
  train, test = array_source([0, 0, 2, 0], images), array_source([1, 1], images[:2])
  splits, view = sources.Splits(train, None, test, ('a', 'b', 'c')), resize.View(16)
  found = check.check(splits, 'vtab', view, expected=check_report.EXPECTED['vtab'])
  leaks = ('2 images of test also in train', '2 images repeated with another label')
  assert found.troubles == leaks  # In this set that is still trouble.
  (note,) = found.notes
  assert note.startswith('1 class without a training image (')
  text = check_text.text(found).splitlines()
  assert text[-2:] == [f'note: {note}', f'trouble: {"; ".join(leaks)}']
  assert found.to_json()['notes'] == found.notes
  fields = {field.name for field in dataclasses.fields(found)} | {'empty_classes'}
  assert all(fields >= set(kinds) for kinds in check_report.EXPECTED.values())
  assert set(check_report.EXPECTED) <= set(datasets.DATASETS)


class Unreadable:
  """Two images that cannot be had."""

  def __len__(self):
    return 2

  def __getitem__(self, index):
    raise sources.BadImage(f'image {index}', 'gone')


def test_nothing_can_be_read():
  splits = sources.Splits(Unreadable(), None, Unreadable(), ('a',))
  found = check.check(splits, 'gone', resize.View(16), jobs=3)
  assert [(bad.split, bad.index, bad.reason) for bad in found.broken] == [
    (split, index, 'gone') for split in ('train', 'test') for index in (0, 1)
  ]
  assert found.reading is None
  assert not found.repeats
  assert found.troubles == ('4 images cannot be read', '1 class without a training image')


def test_repeats_of_random_content_match_a_plain_count():
  rng = np.random.default_rng(0)
  content, split = rng.integers(0, 60, 200), np.sort(rng.integers(0, 3, 200))
  readable = rng.random(200) < 0.9
  digests = np.stack([content % 7, content], 1).astype(np.uint64)
  found = repeats.find(digests, split, readable, 3)
  pairs, across = [], np.zeros((3, 3), int)
  within = np.zeros(3, int)
  for i in np.flatnonzero(readable):
    before = [j for j in range(i) if readable[j] and content[j] == content[i]]
    if before:
      pairs.append((i, before[0]))
    within[split[i]] += any(split[j] == split[i] for j in before)
    for a in range(split[i]):
      across[a, split[i]] += any(split[j] == a for j in before)
  assert list(zip(found.again.tolist(), found.first.tolist(), strict=True)) == pairs
  np.testing.assert_array_equal(found.within, within)
  np.testing.assert_array_equal(found.across, across)


def test_a_view_of_pixels_has_the_digest_of_its_copy():
  image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
  turned = image.transpose(1, 0, 2)
  np.testing.assert_array_equal(repeats.digest(turned), repeats.digest(turned.copy()))
  flat = image.reshape(6, 4, 3)
  assert (repeats.digest(flat) != repeats.digest(image)).any()
