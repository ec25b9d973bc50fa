"""The table of VTAB-1K: slices, label rules, image rules, and published means."""

import functools
import io
import re

import numpy as np
import pytest
from PIL import Image
from reference.vtab_splits import SPLIT_SIZES

from losa_scenic.common_lib import config, errors
from losa_scenic.dataset_lib import sources, vtab_tasks

# task -> the share of the training images before the validation images, and that before the test
# images, where these are taken from the training images.
SHARES = {
  'cifar100': (0.9, None),
  'caltech101': (0.9, None),
  'oxford_iiit_pet': (0.8, None),
  'svhn': (0.9, None),
  'eurosat': (0.6, 0.8),
  'resisc45': (0.6, 0.8),
  'clevr_count': (0.9, None),
  'clevr_dist': (0.9, None),
  'dsprites_loc': (0.8, 0.9),
  'dsprites_ori': (0.8, 0.9),
}
TASKS = tuple(vtab_tasks.TASKS)
CONFIG = config.load_file(__file__, '../../configs/vtab.py')


def test_the_tasks_are_those_of_the_benchmark():
  tasks = vtab_tasks.TASKS.values()
  assert [task.group for task in tasks] == (
    ['natural'] * 7 + ['specialized'] * 4 + ['structured'] * 8
  )
  assert sum(task.num_classes for task in tasks) == 940
  assert sum(task.num_test for task in tasks) == 387_904
  names = [name for task in tasks for name in (task.name, *task.aliases)]
  assert len(set(names)) == len(names)
  assert {task.builder for task in tasks} == set(SPLIT_SIZES)


def stretch(task, split):
  """The split and the range of images that 'train[800:900]' means."""
  base, _, inside = split.partition('[')
  size = SPLIT_SIZES[task.builder][base]
  if not inside:
    return base, 0, size
  ends = []
  for end, default in zip(inside[:-1].split(':'), (0, size), strict=True):
    share = end.endswith('%')
    ends.append(int(end[:-1]) * size // 100 if share else int(end) if end else default)
  assert 0 <= ends[0] < ends[1] <= size
  return base, *ends


@pytest.mark.parametrize('name', TASKS)
def test_slices_have_the_sizes_of_the_benchmark_and_do_not_overlap(name):
  task = vtab_tasks.TASKS[name]
  train, valid, test = (stretch(task, split) for split in (task.train, task.valid, task.test))
  assert train == ('train', 0, 800)
  assert valid[2] - valid[1] == 200
  assert test[2] - test[1] == task.num_test
  for one, other in ((train, valid), (train, test), (valid, test)):
    assert one[0] != other[0] or one[2] <= other[1] or other[2] <= one[1]
  before_valid, before_test = SHARES.get(name, (None, None))
  size = SPLIT_SIZES[task.builder]['train']
  assert (valid[0] == 'train') == (before_valid is not None)
  assert before_valid is None or valid[1] == int(before_valid * size)
  assert (test[0] == 'train') == (before_test is not None)
  assert before_test is None or test[1:] == (int(before_test * size), size)


@pytest.mark.parametrize(
  ('given', 'name'),
  [
    ('cifar', 'cifar100'),
    ('CIFAR-100', 'cifar100'),
    ('oxford_pet', 'oxford_iiit_pet'),
    ('Clevr-Dist', 'clevr_dist'),
    ('sNORB-Azim', 'smallnorb_azi'),
    ('dsprites_location', 'dsprites_loc'),
    ('kitti', 'kitti'),
  ],
)
def test_tasks_have_aliases(given, name):
  assert vtab_tasks.find(given).name == name


def test_an_unknown_task_names_the_nearest():
  with pytest.raises(errors.UserError, match="Did you mean 'clevr_count'"):
    vtab_tasks.find('clever_count')


def objects(**columns):
  return {'objects': columns}


@pytest.mark.parametrize(('count', 'label'), [(3, 0), (4, 1), (10, 7)])
def test_clevr_count(count, label):
  assert vtab_tasks.clevr_count(objects(pixel_coords=np.zeros((count, 3)))) == label


@pytest.mark.parametrize(
  ('distance', 'label'),
  [(0.1, 0), (8.0, 0), (8.2, 1), (8.5, 1), (8.6, 2), (9.0, 2), (9.4, 3), (9.5, 3), (9.51, 4)]
  + [(10.0, 4), (10.01, 5), (100.0, 5), (101.0, 6), (0.0, -1)],
)
def test_clevr_distance(distance, label):
  coordinates = [np.float32([1, 2, distance + more]) for more in (3, 0, 1)]
  assert vtab_tasks.clevr_distance(objects(pixel_coords=coordinates)) == label


@pytest.mark.parametrize(
  ('depths', 'types', 'label'),
  [
    ([8.0], [0], 0),
    ([8.1], [1], 1),
    ([20.0], [2], 1),
    ([20.1], [0], 2),
    ([-3.0], [0], 0),
    ([], [], 3),
    ([5.0], [3], 3),
    ([5.0, 30.0, 12.0], [7, 0, 1], 1),
    ([998.0], [0], 2),
  ],
)
def test_kitti_distance(depths, types, label):
  location = [np.float32([0, 0, depth]) for depth in depths]
  assert vtab_tasks.kitti_distance(objects(location=location, type=types)) == label


def test_dsprites_buckets():
  orientation = functools.partial(vtab_tasks.bucket, key='v', count=40)
  assert [orientation({'v': v}) for v in (0, 2, 3, 5, 38, 39)] == [0, 0, 1, 2, 15, 15]
  position = functools.partial(vtab_tasks.bucket, key='v', count=32)
  assert [position({'v': v}) for v in range(32)] == [v // 2 for v in range(32)]
  # In exact arithmetic: v / 2.5 and v / 2 have no rounding error at the borders.
  assert [orientation({'v': v}) for v in range(40)] == [int(v // 2.5) for v in range(40)]


def test_names_of_derived_classes():
  classes = {name: vtab_tasks.TASKS[name].class_names for name in TASKS}
  assert classes['clevr_count'][0] == '3 objects' and classes['clevr_count'][-1] == '10 objects'
  assert classes['kitti'] == ('under 8 m', '8 to 20 m', 'over 20 m', 'no vehicle')
  assert classes['dsprites_loc'][1] == 'x position 2-3'
  assert classes['dsprites_ori'][:2] == ('orientation 0-2', 'orientation 3-4')
  assert classes['smallnorb_azi'][-1] == 'azimuth 340 degrees'
  assert classes['smallnorb_ele'][-1] == 'elevation 70 degrees'
  for name in TASKS:
    assert len(set(classes[name])) == len(classes[name])


def encoded(pixels):
  stream = io.BytesIO()
  Image.fromarray(pixels).save(stream, 'png')
  return stream.getvalue()


def test_dsprites_become_black_and_white():
  shape = np.array([[0, 1, 1], [1, 0, 0]], np.uint8)
  expected = np.repeat(shape[..., None] * 255, 3, axis=-1)
  for stored in (encoded(shape), shape[..., None], np.repeat(shape[..., None], 3, axis=-1)):
    image = vtab_tasks.times_255(stored, 'x')
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, expected)
  for wrong in (encoded(shape * 255), b'no image', encoded(shape)[:40]):
    with pytest.raises(sources.BadImage, match=r'^x: '):
      vtab_tasks.times_255(wrong, 'x')


@pytest.mark.parametrize(
  ('rank', 'published'),
  [(16, (82.8, 86.9, 65.5, 78.4)), (8, (82.6, 87.0, 65.3, 78.3)), (4, (82.5, 86.5, 64.4, 77.8))],
)
def test_the_published_values_have_the_published_means(rank, published):
  values = list(zip(vtab_tasks.TASKS.values(), CONFIG.PAPER[rank], strict=True))
  groups = [
    np.mean([value for task, value in values if task.group == group])
    for group in ('natural', 'specialized', 'structured')
  ]
  np.testing.assert_allclose((*groups, np.mean(groups)), published, atol=0.0501)
  row = next(line for line in CONFIG.__doc__.splitlines() if re.match(rf' +{rank} +0\.', line))
  assert tuple(float(number) for number in row.split()[3:]) == published
