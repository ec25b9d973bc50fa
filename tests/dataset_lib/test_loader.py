"""What stands in a batch: the view, the crops, the replacements of what cannot be read."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image
from reference import broken_images
from sklearn import datasets as sklearn_datasets

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import augment, bad_files, decode, loader, resize, sources

COUNT = 20


def encoded(pixels: np.ndarray, kind: str = 'PNG', **options) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, kind, **options)
  return buffer.getvalue()


class Files:
  """Encoded images; None stands for a file that is gone. Counts what is asked for."""

  def __init__(self, files: list[bytes | None]) -> None:
    self.files, self.asked = files, [0] * len(files)

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, index: int) -> sources.Record:
    self.asked[index] += 1
    if self.files[index] is None:
      raise sources.BadImage(f'file{index}', 'gone')
    return sources.Record(self.files[index], index % 7, f'file{index}')


def noise(count: int = COUNT, height: int = 12, width: int = 10) -> list[np.ndarray]:
  rng = np.random.default_rng(0)
  return [rng.integers(0, 256, (height, width, 3), np.uint8) for _ in range(count)]


def make(files, size=8, **options) -> loader.Loader:
  return loader.Loader(Files(files), resize.View(size), **options)


def batch(made: loader.Loader, indices, epoch=0, **options) -> dict:
  indices = np.asarray(indices)
  return made.batch(indices, np.full(len(indices), epoch), **options)


def test_a_plain_batch_is_the_view_of_each_image():
  images = noise()
  view = resize.View(8, 'bicubic', central_crop=0.9)
  made = loader.Loader(Files([encoded(image) for image in images]), view)
  given = batch(made, [3, 19, 3, 0])
  assert set(given) == {'inputs', 'label', 'batch_mask', 'index'}
  for shown, i in zip(given['inputs'], (3, 19, 3, 0), strict=True):
    expected = resize.resize(images[i], 8, 'bicubic', view.box(12, 10))
    np.testing.assert_array_equal(shown, expected)
  assert given['label'].tolist() == [3, 5, 3, 0] and given['label'].dtype == np.int32
  assert given['index'].tolist() == [3, 19, 3, 0] and given['batch_mask'].tolist() == [1.0] * 4


def test_arrays_and_files_of_the_same_pixels_give_the_same_batches():
  images = noise()
  drawn = augment.Augment(min_crop_area=0.3, flip=True, color_jitter=0.4, mixup_alpha=0.4)
  array = sources.ArraySource(images, np.arange(COUNT) % 7, 'noise', num_classes=7)
  for options in ({}, {'augment': drawn, 'seed': 5}):
    for cache_bytes in (0, 10**6):
      one = loader.Loader(array, resize.View(8), cache_bytes=cache_bytes, **options)
      other = make([encoded(image) for image in images], **options)
      for epoch in range(2):
        ours, theirs = (batch(made, np.arange(COUNT), epoch) for made in (one, other))
        assert set(ours) == set(theirs)
        for key in ours:
          np.testing.assert_array_equal(ours[key], theirs[key])


def test_short_batches_are_filled_up_and_masked():
  given = batch(make([encoded(image) for image in noise()]), [4, 5], count=5)
  assert given['batch_mask'].tolist() == [1, 1, 0, 0, 0]
  assert given['index'].tolist() == [4, 5, -1, -1, -1]
  assert given['label'].tolist() == [4, 5, 0, 0, 0] and not given['inputs'][2:].any()


@pytest.mark.parametrize('drawn', [augment.Augment(), augment.Augment(min_crop_area=0.5)])
@pytest.mark.parametrize('kind', ['PNG', 'JPEG'])
def test_the_cache_reads_every_image_once_and_changes_nothing(drawn, kind):
  files = [encoded(image, kind) for image in noise()]
  kept, read = make(files, augment=drawn, cache_bytes=10**6), make(files, augment=drawn)
  for epoch in range(3):
    ours, theirs = (batch(made, np.arange(COUNT), epoch) for made in (kept, read))
    np.testing.assert_array_equal(ours['inputs'], theirs['inputs'])
    np.testing.assert_array_equal(ours['label'], theirs['label'])
    ours['inputs'][:] = 0  # What was handed out is not what is kept.
  assert kept.source.asked == [1] * COUNT and read.source.asked == [3] * COUNT


@pytest.mark.parametrize('cache_bytes', [3 * 70 * 80 * 3, 10**7])
def test_what_is_shown_does_not_depend_on_what_is_kept(cache_bytes):
  """Large JPEGs are decoded at a fraction of their size, small ones are kept."""
  drawn = augment.Augment(min_crop_area=0.2)
  files = [encoded(image, 'JPEG') for image in noise(6, 70, 80) + noise(6, 14, 15)]
  plain, cached = make(files, augment=drawn), make(files, augment=drawn, cache_bytes=cache_bytes)
  late = make(files, augment=drawn, cache_bytes=cache_bytes)
  for epoch in range(3):
    shown = batch(plain, np.arange(12), epoch)['inputs']
    np.testing.assert_array_equal(shown, batch(cached, np.arange(12), epoch)['inputs'])
    if epoch:  # As a run that goes on after a stop.
      backwards = batch(late, np.arange(12)[::-1], epoch)['inputs']
      np.testing.assert_array_equal(shown, backwards[::-1])
  assert cached.source.asked == [3] * 6 + [1] * 6


def test_one_large_image_does_not_close_the_cache():
  drawn = augment.Augment(min_crop_area=0.5)
  files = [encoded(image) for image in noise(1, 100, 100) + noise(9)]
  made = make(files, augment=drawn, cache_bytes=9 * 12 * 10 * 3)
  for epoch in range(3):
    batch(made, np.arange(10), epoch)
  assert made.source.asked == [3] + [1] * 9


def test_the_cache_keeps_to_its_size():
  files = [encoded(image) for image in noise()]
  full = COUNT * 8 * 8 * 3
  too_small, fits = make(files, cache_bytes=full - 1), make(files, cache_bytes=full)
  crops = make(files, augment=augment.Augment(min_crop_area=0.5), cache_bytes=5 * 12 * 10 * 3)
  for _ in range(2):
    for made in (too_small, fits, crops):
      batch(made, np.arange(COUNT))
  assert too_small.source.asked == [2] * COUNT and fits.source.asked == [1] * COUNT
  # Crops come from images of their own size, as many of them as there is room for.
  assert sorted(crops.source.asked) == [1] * 5 + [2] * (COUNT - 5)


def test_what_is_shown_depends_on_seed_epoch_and_position_alone():
  files = [encoded(image) for image in noise()]
  drawn = augment.Augment(min_crop_area=0.3, flip=True, erasing_probability=0.5)
  one, other = make(files, augment=drawn, seed=1), make(files, augment=drawn, seed=1)
  alone = batch(one, [7], epoch=4)['inputs'][0]
  mixed = other.batch(np.array([2, 7, 7]), np.array([4, 4, 5]))['inputs']
  np.testing.assert_array_equal(alone, mixed[1])
  assert not np.array_equal(mixed[1], mixed[2])
  reseeded = batch(make(files, augment=drawn, seed=2), [7], epoch=4)['inputs'][0]
  assert not np.array_equal(alone, reseeded)


def test_reduced_crops_are_those_of_the_whole_image():
  """A JPEG that is larger than needed is decoded smaller; the crop must not move."""
  photo = np.array(
    Image.fromarray(sklearn_datasets.load_sample_image('china.jpg')).resize((800, 600))
  )
  file = encoded(photo, 'JPEG', quality=95)
  drawn = augment.Augment(min_crop_area=0.3)
  for size, best in ((64, 27.0), (32, 27.0)):
    reduced = make([file], size, augment=drawn)
    for epoch in range(4):
      shown = batch(reduced, [0], epoch)['inputs'][0].astype(float)
      rng = augment.generator(0, epoch, 0)
      box = augment.random_crop(rng, 600, 800, 0.3)
      exact = resize.resize(decode.decode(file, 'x'), size, 'fast', box)
      moved = resize.resize(
        decode.decode(file, 'x'), size, 'area', box._replace(left=max(0, box.left - 12))
      )
      error = 10 * np.log10(255**2 / np.mean((shown - exact) ** 2))
      assert error > best and np.mean((shown - moved) ** 2) > 2 * np.mean((shown - exact) ** 2)


def with_broken(every: int = 100) -> tuple[list[bytes], list[bytes | None], list[int]]:
  """Good files; the same with one in `every` broken; which."""
  kinds = list(broken_images.kinds().values())
  good = [encoded(image) for image in noise(every * len(kinds), 9, 9)]
  places = [k * every + 2 * k for k in range(len(kinds))]
  # Two neighbours: what stands in for the first is the one after the second.
  places[1] = places[0] + 1
  broken = list(good)
  for place, kind in zip(places, kinds, strict=True):
    broken[place] = kind
  return good, broken, places


def test_broken_files_are_replaced_by_the_next_and_good_ones_stay():
  good, broken, places = with_broken()
  options = {'augment': augment.Augment(flip=True, color_jitter=0.2), 'max_bad_fraction': 0.01}
  whole, holed = make(good), make(broken, max_bad_fraction=0.01)
  order = np.random.default_rng(0).permutation(len(good))
  found = []
  for some in np.split(order, 16):
    ours, theirs = batch(holed, some), batch(whole, some)
    found += ours.get('problems', [])
    for slot, index in enumerate(some):
      stand_in = index
      while stand_in in places:
        stand_in += 1
      expected = batch(whole, [stand_in])
      np.testing.assert_array_equal(ours['inputs'][slot], expected['inputs'][0])
      assert ours['label'][slot] == expected['label'][0]
    np.testing.assert_array_equal(ours['index'], theirs['index'])
    assert ours['batch_mask'].all()
  # The neighbour of a broken file was met in looking for its replacement as well.
  assert sorted({problem.index for problem in found}) == sorted(places)
  assert {p.id for p in found} == {f'file{i}' for i in places}
  reasons = {p.index: p.reason for p in found}
  assert reasons[places[0]] == 'gone' and reasons[places[1]] == 'the file is empty'
  assert 'not a JPEG' in reasons[places[5]] and 'too large' in reasons[places[7]]
  # Augmented too, the others do not change.
  augmented = [batch(make(f, **options), order[:50])['inputs'] for f in (good, broken)]
  same = [s for s, i in enumerate(order[:50]) if i not in places]
  np.testing.assert_array_equal(augmented[0][same], augmented[1][same])


def test_a_broken_file_is_masked_where_images_are_counted():
  _, broken, places = with_broken()
  made = make(broken, split='test', max_bad_fraction=0.01)
  for start in range(0, len(broken), 100):
    given = batch(made, np.arange(start, start + 100))
    expected = [float(i not in places) for i in range(start, start + 100)]
    assert given['batch_mask'].tolist() == expected
    assert not given['inputs'][given['batch_mask'] == 0].any()
    assert (given['index'] == -1).tolist() == [not e for e in expected]
    assert [p.split for p in given.get('problems', [])] == ['test'] * (100 - int(sum(expected)))


def test_too_many_broken_files_end_the_run():
  _, broken, places = with_broken(every=20)
  made = make(broken, max_bad_fraction=0.04)
  problems = batch(made, np.arange(160))['problems']
  assert [problem.index for problem in problems] == places
  listed = bad_files.BadFiles({'train': 160}, 0.04)
  with pytest.raises(errors.UserError, match=r'unreadable image 8 of the 160 .* at most 6 .*0\.04'):
    listed.add(problems)
  assert len(listed.problems) == 8  # What ended the run is listed too.
  for fraction in (0.0, 0.99):
    given = batch(make([None] * 9, max_bad_fraction=fraction), [0])
    assert given['problems'] and not given['batch_mask'].any()


def test_loaders_pickle():
  files = [encoded(image) for image in noise()]
  drawn = augment.Augment(min_crop_area=0.5, mixup_alpha=0.2)
  made = make(files, augment=drawn, seed=3)
  copy = pickle.loads(pickle.dumps(made))
  ours, theirs = batch(made, [4, 5, 6]), batch(copy, [4, 5, 6])
  np.testing.assert_array_equal(ours['inputs'], theirs['inputs'])
  np.testing.assert_array_equal(ours['label_share'], theirs['label_share'])


def test_parallel_raises_the_first_failure():
  def work(position):
    if position >= 3:
      raise RuntimeError(str(position))

  for _ in range(5):
    with pytest.raises(RuntimeError, match=r'^[34]$'):
      loader.parallel(work, 50)
  done = []
  loader.parallel(done.append, 50)
  assert sorted(done) == list(range(50))
