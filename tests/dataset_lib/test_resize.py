"""Resizing: the filters are those they are named after, and boxes are what was asked for."""

import pathlib

import cv2
import numpy as np
import pytest
from PIL import Image
from reference import images
from sklearn import datasets as sklearn_datasets

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import resize
from losa_scenic.dataset_lib.resize import Box, View

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'tf_resize.npz'
SHAPES = [(5, 7), (64, 48), (30, 200), (16, 16), (1, 1), (40, 9)]


def pillow(image: np.ndarray, size: int, name: str) -> np.ndarray:
  return np.array(Image.fromarray(image).resize((size, size), getattr(Image.Resampling, name)))


@pytest.mark.parametrize('name', resize.PILLOW)
def test_pillows_filters(name):
  for height, width in SHAPES:
    for size in (1, 8, 16, 33):
      image = images.noise(height, width)
      resized = resize.resize(image, size, name)
      assert resized.dtype == np.uint8 and resized.shape == (size, size, 3)
      np.testing.assert_array_equal(resized, pillow(image, size, name.upper()))


def test_names():
  assert set(resize.PILLOW) >= {'bilinear', 'bicubic'}
  assert set(resize.INTERPOLATIONS) == {*resize.PILLOW, 'area', 'fast', 'bilinear_tf'}
  np.testing.assert_array_equal(
    resize.resize(images.noise(9, 9), 4), pillow(images.noise(9, 9), 4, 'BICUBIC')
  )


def test_area_is_the_exact_mean_for_whole_factors():
  image = images.noise(24, 40)
  for size in (8, 4, 2, 1):
    down, across = 24 // size, 40 // size
    mean = image.reshape(size, down, size, across, 3).mean((1, 3))
    np.testing.assert_allclose(resize.resize(image, size, 'area'), mean, atol=0.5001)


def test_area_weighs_pixels_that_are_cut():
  # Three columns to two: each new one is a whole and half a column.
  image = np.repeat(np.array([[0, 60, 240]], np.uint8)[..., None], 3, -1).repeat(2, 0)
  resized = resize.resize(image, 2, 'area')
  np.testing.assert_array_equal(resized[..., 0], [[20, 180], [20, 180]])


@pytest.mark.parametrize('shape', [(7, 64), (64, 7), (5, 5), (15, 16)])
def test_area_is_bicubic_where_a_side_grows(shape):
  image = images.noise(*shape)
  np.testing.assert_array_equal(resize.resize(image, 16, 'area'), pillow(image, 16, 'BICUBIC'))


def test_bilinear_tf():
  with np.load(GOLDEN) as golden:
    cases = [key.split('/') for key in golden if '/' in key]
    assert len(cases) >= 9
    for shape, size in cases:
      resized = resize.resize(golden[shape], int(size), 'bilinear_tf')
      assert resized.dtype == np.uint8
      np.testing.assert_allclose(resized, golden[f'{shape}/{size}'], atol=0.501, err_msg=shape)


def test_bilinear_tf_is_not_antialiased():
  stripes = np.zeros((64, 64, 3), np.uint8)
  stripes[:, ::4] = 255
  assert set(resize.resize(stripes, 16, 'bilinear_tf').ravel()) == {0}
  for name in ('bilinear', 'bicubic', 'area'):
    inside = resize.resize(stripes, 16, name)[:, 2:-2]
    np.testing.assert_allclose(inside, 255 / 4, atol=2)


@pytest.mark.parametrize('name', resize.INTERPOLATIONS)
def test_boxes_are_cut_out_first(name):
  image = images.noise(20, 30)
  box = Box(3, 11, 12, 7)
  for size in (4, 7, 12, 20):
    expected = resize.resize(np.ascontiguousarray(image[3:15, 11:18]), size, name)
    np.testing.assert_array_equal(resize.resize(image, size, name, box), expected)
  np.testing.assert_array_equal(
    resize.resize(image, 9, name, Box(0, 0, 20, 30)), resize.resize(image, 9, name)
  )


@pytest.mark.parametrize('name', resize.INTERPOLATIONS)
def test_never_a_view_and_never_a_change(name):
  for shape, box in (((16, 16), None), ((30, 40), Box(5, 9, 16, 16)), ((20, 18), None)):
    image = images.smooth(*shape)
    before = image.copy()
    resized = resize.resize(image, 16, name, box)
    assert not np.shares_memory(resized, image) and resized.flags.writeable
    resized[:] = 0
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize('name', resize.INTERPOLATIONS)
def test_the_right_size_stays_as_it_is(name):
  image = images.noise(16, 16)
  np.testing.assert_array_equal(resize.resize(image, 16, name), image)
  image.flags.writeable = False
  np.testing.assert_array_equal(resize.resize(image, 16, name, Box(0, 0, 16, 16)), image)


@pytest.mark.parametrize('name', resize.INTERPOLATIONS)
def test_the_whole_image_is_squashed_and_keeps_its_colours(name):
  halves = np.zeros((12, 60, 3), np.uint8)
  halves[:, 30:] = (200, 100, 50)
  for size in (6, 32):
    resized = resize.resize(halves, size, name)
    for column, colour in ((0, (0, 0, 0)), (-1, (200, 100, 50))):
      np.testing.assert_allclose(resized[:, column], np.tile(colour, (size, 1)), atol=1)
  assert cv2.mean(resize.resize(halves, 8, name))[:3] == pytest.approx((100, 50, 25), abs=2)


def test_views_of_the_whole_image():
  view = View(224)
  assert (view.interpolation, view.central_crop) == ('bicubic', None)
  assert view.box(3, 500) == (0, 0, 3, 500)


@pytest.mark.parametrize(
  ('share', 'shape', 'box'),
  [
    (1.0, (10, 16), (0, 3, 10, 10)),
    (1.0, (16, 10), (3, 0, 10, 10)),
    (0.875, (256, 256), (16, 16, 224, 224)),
    (0.875, (375, 500), (23, 86, 328, 328)),
    (0.5, (9, 4), (3, 1, 2, 2)),
    (0.01, (9, 4), (4, 1, 1, 1)),
  ],
)
def test_the_central_square(share, shape, box):
  assert View(8, central_crop=share).box(*shape) == box
  top, left, height, width = box
  # In the middle: what is left over on both sides differs by a pixel at most.
  assert 0 <= shape[0] - height - 2 * top <= 1 and 0 <= shape[1] - width - 2 * left <= 1


def test_values_out_of_range():
  for share in (0.0, -0.1, 1.01, float('nan'), 32):
    with pytest.raises(errors.UserError, match=r'central_crop must be in \(0, 1\], not'):
      View(8, central_crop=share)
  with pytest.raises(errors.UserError, match=r"interpolation 'bicubik'\. Did you mean 'bicubic'"):
    View(8, 'bicubik')
  with pytest.raises(errors.UserError, match=r"interpolation 'areas'\. Did you mean 'area'"):
    resize.resize(images.noise(4, 4), 8, 'areas')


@pytest.mark.parametrize(
  ('height', 'width'),
  [(427, 640), (300, 400), (250, 240), (640, 224), (230, 300), (600, 230), (200, 260), (120, 150)],
)
def test_fast_is_nearly_exact(height, width):
  """Against the mean over each new pixel or, where a side grows, against bicubic."""
  photo = Image.fromarray(sklearn_datasets.load_sample_image('china.jpg'))
  image = np.array(photo.resize((width, height), Image.Resampling.BICUBIC))
  shown = resize.resize(image, 224, 'fast').astype(float)
  error = np.mean((shown - resize.resize(image, 224, 'area')) ** 2)
  assert 10 * np.log10(255**2 / max(error, 1e-9)) > 43
  aliased = cv2.resize(image, (224, 224), interpolation=cv2.INTER_NEAREST).astype(float)
  assert error < 0.1 * np.mean((aliased - resize.resize(image, 224, 'area')) ** 2)
