"""Sources answer any position, in any order and thread, pickle, and name the item that is wrong."""

import errno
import os
import pickle
from concurrent import futures

import numpy as np
import pytest

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import clip_files, playback, sources


def array_source(start: int, count: int) -> sources.ArraySource:
  """Images whose every pixel is the image's number."""
  numbers = np.arange(start, start + count)
  images = np.broadcast_to(numbers.astype(np.uint8)[:, None, None, None], (count, 4, 4, 3))
  return sources.ArraySource(images, numbers % 3, 'set', num_classes=3, numbers=numbers)


def assert_same(ours: sources.Source, theirs: sources.Source) -> None:
  """Both hold the same records in the same order."""
  assert len(ours) == len(theirs)
  for i in range(len(theirs)):
    assert (ours[i].label, ours[i].id) == (theirs[i].label, theirs[i].id)
    np.testing.assert_array_equal(ours[i].image, theirs[i].image)


def test_array_source():
  source = array_source(3, 10)
  assert len(source) == 10 and source.labels.dtype == np.int32
  for i in (7, 2, 7):
    image, label, name = source[i]
    assert image.shape == (4, 4, 3) and image.dtype == np.uint8 and (image == i + 3).all()
    assert label == i % 3 and type(label) is int and name == f'set[{i + 3}]'
  assert type(source[0]) is sources.Record


def test_array_source_takes_images_of_different_sizes_and_copies_none():
  images = [np.full((2 + i, 5, 3), i, np.uint8) for i in range(3)]
  source = sources.ArraySource(images, [2, 0, 1], 'set', num_classes=3)
  for i, (image, label, name) in enumerate(source):
    assert image is images[i]
    assert (label, name) == ((2, 0, 1)[i], f'set[{i}]')


def test_concat_equals_one_source():
  joined = sources.Concat([array_source(0, 5), array_source(5, 1), array_source(6, 6)])
  assert_same(joined, array_source(0, 12))
  assert_same(sources.Concat([array_source(0, 0), array_source(0, 2)]), array_source(0, 2))
  for wrong in (-1, 12):
    with pytest.raises(IndexError, match=r'\[0, 12\)'):
      joined[wrong]
  with pytest.raises(ValueError, match='at least one'):
    sources.Concat([])


def test_subset_is_some_images_in_the_given_order():
  whole = array_source(0, 6)
  part = sources.Subset(whole, [5, 0, 3, 3])
  assert [record.id for record in part] == ['set[5]', 'set[0]', 'set[3]', 'set[3]']
  assert_same(
    sources.Subset(sources.Subset(whole, [4, 3, 2]), [2, 0]), sources.Subset(whole, [2, 4])
  )
  assert len(sources.Subset(whole, [])) == 0
  for wrong in ([6], [0, -1]):
    with pytest.raises(IndexError, match=r'\[0, 6\)'):
      sources.Subset(whole, wrong)
  for beyond in (4, 99):
    with pytest.raises(IndexError):
      part[beyond]


def test_labels_out_of_range_name_the_item():
  images = np.zeros((3, 2, 2, 3), np.uint8)
  for labels, which, message in (([0, 3, 0], 1, r'label 3 .* 0\.\.2'), ([0, 0, -1], 2, 'label -1')):
    numbers = [7, 8, 9]
    with pytest.raises(errors.UserError, match=rf'^set\[{numbers[which]}\]: {message}'):
      sources.ArraySource(images, np.array(labels), 'set', num_classes=3, numbers=numbers)
    with pytest.raises(errors.UserError, match=f'^{"abc"[which]}: {message}'):
      sources.FileSource('/root', ['a', 'b', 'c'], labels, num_classes=3)


def test_arrays_that_do_not_fit():
  images = np.zeros((3, 2, 2, 3), np.uint8)
  for labels in ([0, 0], [[0], [0], [0]], [0.0, 1.0, 2.0], [True, False, True]):
    with pytest.raises(ValueError, match='as many'):
      sources.ArraySource(images, np.array(labels), 'set', num_classes=3)
  for wrong in (
    images.astype(np.float32),
    images[..., :1],
    [images[0], images[0, ..., 0]],
    images[0],
    images[:, :0],
    images[:, :, :0],
    images[None],
    [images],
    [images[0, :0]],
  ):
    with pytest.raises(ValueError, match='uint8'):
      sources.ArraySource(wrong, np.zeros(len(wrong), int), 'set', num_classes=3)
  assert len(sources.ArraySource([], [], 'set', num_classes=3)) == 0


@pytest.fixture
def files(tmp_path) -> sources.FileSource:
  names = [f'part{i % 2}/{i}.png' for i in range(6)]
  for i, name in enumerate(names):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b'image %d' % i)
  return sources.FileSource(tmp_path, names, np.arange(6) % 2, num_classes=2)


def test_file_source_reads_when_it_is_asked(files):
  for i in (3, 0, 3, 5):
    assert files[i] == (b'image %d' % i, i % 2, str(files.root / files.files[i]))
  (files.root / 'part0' / '4.png').write_bytes(b'another')
  assert files[4].image == b'another'


def test_a_file_that_cannot_be_read_is_a_bad_image(files):
  path = files.root / files.files[5]
  path.unlink()
  with pytest.raises(sources.BadImage) as caught:
    files[5]
  assert (caught.value.id, caught.value.reason) == (
    str(path),
    'cannot be read (No such file or directory)',
  )
  path.mkdir()
  with pytest.raises(sources.BadImage, match=r'5\.png: cannot be read \(Is a directory\)\.$'):
    files[5]
  assert files[3].image == b'image 3'


@pytest.mark.parametrize(
  'file', ['../x.png', 'a/../../x.png', '..', r'a\..\x.png', '/etc/x.png', 'a\0.png']
)
def test_files_outside_the_root_are_refused(file):
  with pytest.raises(errors.UserError) as caught:
    sources.FileSource('/data/mine', ['good.png', file], [0, 0], num_classes=1)
  assert str(caught.value) == f'{file!r}: a path outside of /data/mine is refused.'


def test_two_dots_in_a_name_are_no_way_out():
  source = sources.FileSource('/data', ['a..b/..c.png', '...png'], [0, 0], num_classes=1)
  assert len(source) == 2


def test_bad_image_pickles_with_both_parts():
  error = sources.BadImage('cats/7.jpg', 'the file is empty')
  assert str(error) == 'cats/7.jpg: the file is empty.'
  assert isinstance(error, errors.UserError)
  copy = pickle.loads(pickle.dumps(error))
  assert type(copy) is sources.BadImage and str(copy) == str(error)
  assert (copy.id, copy.reason) == ('cats/7.jpg', 'the file is empty')


def test_sources_pickle_and_answer_several_threads(files):
  whole = array_source(0, 40)
  for source in (files, whole, sources.Subset(whole, [3, 1]), sources.Concat([files, whole])):
    copy = pickle.loads(pickle.dumps(source))
    assert_same(copy, source)
    with futures.ThreadPoolExecutor(4) as pool:
      answers = list(pool.map(lambda i, source=source: source[i % len(source)].id, range(200)))
    assert answers == [source[i % len(source)].id for i in range(200)]


@pytest.mark.parametrize(
  ('code', 'is_passing'),
  [
    (errno.ESTALE, True),
    (errno.EIO, True),
    (errno.ENOENT, False),
    (errno.EACCES, False),
    (errno.ELOOP, False),
    (errno.ENAMETOOLONG, False),
  ],
)
def test_an_error_that_may_pass_is_met_by_reading_again_once(files, monkeypatch, code, is_passing):
  calls = []

  def failing(path, mode):
    calls.append(path)
    if len(calls) <= failures:
      raise OSError(code, os.strerror(code))
    return open(path, mode)

  monkeypatch.setattr(sources, 'open', failing, raising=False)
  failures = 1
  if is_passing:
    assert files[2].image == b'image 2'
  else:
    with pytest.raises(sources.BadImage):
      files[2]
  assert len(calls) == 1 + is_passing
  calls.clear()
  failures = 9
  with pytest.raises(sources.BadImage) as caught:
    files[2]
  assert caught.value.reason == f'cannot be read ({os.strerror(code)})'
  assert len(calls) == 1 + is_passing


class Unnamed:
  """A source that knows no name before it reads."""

  def __len__(self) -> int:
    return 10

  def __getitem__(self, index: int) -> sources.Record:
    return array_source(0, 10)[index]


def test_names_are_known_before_anything_is_read(files, tmp_path):
  known = [
    array_source(3, 10),
    files,
    sources.Subset(array_source(3, 10), [7, 2]),
    sources.Concat([array_source(0, 4), files]),
    clip_files.ClipFiles(tmp_path, ['a.mp4', 'b/c.mp4'], [0, 1], num_classes=2),
  ]
  known.append(playback.Playback(known[-1]))
  for source in known:
    for i in range(len(source)):
      assert sources.name(source, i) == source[i].id
  gone = sources.FileSource(tmp_path, ['gone.jpg'], [0], num_classes=1)
  assert sources.name(gone, 0) == str(tmp_path / 'gone.jpg')
  for source in (Unnamed(), sources.Subset(Unnamed(), [3]), sources.Concat([Unnamed()])):
    assert sources.name(source, 0) is None
