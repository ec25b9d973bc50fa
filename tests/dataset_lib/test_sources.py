"""Sources answer any positions, in any order, and name the item that is wrong."""

import numpy as np
import pytest
from PIL import Image

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import sources


def array_source(start: int, count: int) -> sources.ArraySource:
  """Images whose every pixel is the image's number."""
  numbers = np.arange(start, start + count)
  images = np.broadcast_to(numbers.astype(np.uint8)[:, None, None, None], (count, 4, 4, 3))
  ids = [f'item{i}' for i in numbers]
  return sources.ArraySource(np.ascontiguousarray(images), numbers % 3, ids, num_classes=3)


def test_array_source_gathers_copies():
  source = array_source(0, 10)
  images, labels = source.fetch(np.array([7, 2, 7]))
  assert images.shape == (3, 4, 4, 3) and images.dtype == np.uint8 and labels.dtype == np.int32
  assert images[:, 0, 0, 0].tolist() == [7, 2, 7] and labels.tolist() == [1, 2, 1]
  images[:] = 0
  assert source.fetch(np.array([7]))[0].max() == 7


def test_concat_equals_one_source():
  whole = array_source(0, 12)
  joined = sources.concat([array_source(0, 5), array_source(5, 1), array_source(6, 6)])
  assert len(joined) == 12 and list(joined.ids) == list(whole.ids)
  for indices in ([], [0], [11, 0, 5, 5, 4, 6], np.random.default_rng(0).permutation(12)):
    indices = np.asarray(indices, np.int64)
    for ours, theirs in zip(joined.fetch(indices), whole.fetch(indices), strict=True):
      np.testing.assert_array_equal(ours, theirs)
      assert ours.dtype == theirs.dtype
  for wrong in (-1, 12):
    with pytest.raises(IndexError):
      joined.fetch(np.array([wrong]))
  with pytest.raises(ValueError, match='at least one'):
    sources.concat([])


def test_labels_out_of_range_name_the_item():
  images = np.zeros((3, 2, 2, 3), np.uint8)
  for labels, message in (([0, 3, 0], r'^b: label 3 .* 0\.\.2'), ([0, 0, -1], '^c: label -1')):
    with pytest.raises(errors.UserError, match=message):
      sources.ArraySource(images, np.array(labels), ['a', 'b', 'c'], num_classes=3)
    with pytest.raises(errors.UserError, match=message):
      sources.FileSource(['a', 'b', 'c'], labels, 8, num_classes=3)
  with pytest.raises(ValueError, match='as many'):
    sources.ArraySource(images, np.array([0, 0]), ['a', 'b', 'c'], num_classes=3)
  with pytest.raises(ValueError, match='uint8'):
    sources.ArraySource(images.astype(np.float32), np.zeros(3, int), ['a'] * 3, num_classes=3)


def test_file_source_decodes_in_order_and_names_the_broken_file(tmp_path):
  paths = [tmp_path / f'{i}.png' for i in range(12)]
  for i, path in enumerate(paths):
    Image.new('RGB', (5, 7), (i, 2 * i, 3 * i)).save(path)
  source = sources.FileSource(paths, np.arange(12) % 2, 8, num_classes=2)
  order = np.random.default_rng(0).permutation(12)
  images, labels = source.fetch(order)
  assert images.shape == (12, 8, 8, 3)
  np.testing.assert_array_equal(images[:, 3, 3], order[:, None] * np.array([1, 2, 3]))
  np.testing.assert_array_equal(labels, order % 2)
  paths[4].write_bytes(paths[4].read_bytes()[:40])
  with pytest.raises(errors.UserError, match=r'4\.png'):
    source.fetch(order)
  paths[5].unlink()
  with pytest.raises(errors.UserError, match=r'5\.png: cannot be read'):
    source.fetch(np.array([5]))
  assert source.fetch(np.array([3]))[0].shape == (1, 8, 8, 3)


def test_parallel_raises_the_first_failure():
  def work(position):
    if position >= 3:
      raise RuntimeError(str(position))

  for _ in range(5):
    with pytest.raises(RuntimeError, match=r'^3$'):
      sources.parallel(work, 50)
