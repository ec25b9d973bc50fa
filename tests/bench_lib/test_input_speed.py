"""The comparison of loaders: the same boxes for all, exact filters, and what it prints."""

import os

import cv2
import numpy as np
import pytest
from PIL import Image

from losa_scenic import bench
from losa_scenic.bench_lib import input_loaders, input_photos, input_speed
from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import resize, sources

OWN = 'losa_scenic'


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  """Files of two sizes: the larger ones are decoded at half their size where the box allows it."""
  input_loaders.limit_threads(1)  # TensorFlow, where it is installed, takes it once only.
  folder = tmp_path_factory.mktemp('photos')
  files = input_photos.write(folder, 200, 150, 5)
  (folder / 'large').mkdir()
  files += [f'large/{file}' for file in input_photos.write(folder / 'large', 480, 360, 4)]
  return sources.FileSource(folder, files, [0] * len(files), num_classes=1)


@pytest.fixture
def cores():
  before = os.sched_getaffinity(0)
  yield before
  os.sched_setaffinity(0, before)


def test_the_photos_are_of_the_size_asked_for_and_all_different(tmp_path):
  files = input_photos.write(tmp_path, 900, 700, 3)
  images = [cv2.imread(str(tmp_path / file)) for file in files]
  assert {image.shape for image in images} == {(700, 900, 3)}
  assert len({(tmp_path / file).read_bytes() for file in files}) == 3
  assert input_photos.write(tmp_path, 900, 700, 3) == files


def test_every_loader_shows_the_same_boxes_in_batches(photos):
  work = input_loaders.work(photos, 3, 32, 1)
  assert len(work.source) == 9 and len(set(work.boxes)) == 9 and 0 < work.flips.sum() < 9
  makers, _ = input_loaders.all_loaders()
  assert {OWN, input_loaders.PILLOW, 'OpenCV, not antialiased'} <= set(makers)
  rows = input_speed.measure(work, makers, rounds=1)
  for name, make in makers.items():
    batches = list(make(work)())
    assert [images.shape for _, images in batches] == [(3, 32, 32, 3)] * 3
    assert {images.dtype for _, images in batches} == {np.dtype(np.uint8)}
    assert sorted(i for positions, _ in batches for i in positions) == list(range(9))
    # Another box, or the mirror image, would be at 20 dB.
    assert rows[name].area > 24, name
    assert len(rows[name].per_cpu_second) == 1 and rows[name].per_cpu_second[0] > 0
  aliased = rows['OpenCV, not antialiased']
  assert aliased.area < min(rows[OWN].area, rows[input_loaders.PILLOW].area) - 3
  assert aliased.lanczos < min(rows[OWN].lanczos, rows[input_loaders.PILLOW].lanczos) - 2
  assert rows['losa_scenic, made ahead in threads'][2:] == pytest.approx(rows[OWN][2:])


def test_images_that_fill_no_batch_are_left_out(photos):
  assert len(input_loaders.work(photos, 4, 32, 1).source) == 8
  assert len(input_loaders.work(photos, 100, 32, 1).source) == 9


@pytest.mark.parametrize(
  ('weights', 'nearly'), [(input_speed.area, 0.6), (input_speed.lanczos, 0.6)]
)
def test_the_exact_filters_are_those_of_opencv_and_pillow(weights, nearly):
  image = np.random.default_rng(0).integers(0, 256, (90, 131, 3), dtype=np.uint8)
  have = np.clip(input_speed.exact_resize(image, 40, weights), 0, 255)
  if weights is input_speed.area:
    want = cv2.resize(image.astype(np.float64), (40, 40), interpolation=cv2.INTER_AREA)
    np.testing.assert_allclose(have, want, atol=1e-3)
  else:
    want = np.asarray(Image.fromarray(image).resize((40, 40), Image.Resampling.LANCZOS))
    assert np.abs(have - want).max() < 2 and np.abs(have - want).mean() < nearly
  np.testing.assert_allclose(weights(131, 40).sum(axis=1), 1)
  np.testing.assert_allclose(weights(40, 131).sum(axis=1), 1)


def test_psnr():
  image = np.full((4, 4, 3), 100, np.uint8)
  assert input_speed.psnr(image, np.full((4, 4, 3), 110.0)) == pytest.approx(28.131, abs=1e-3)
  # What no integer can show does not count against it.
  white = np.full((4, 4, 3), 255, np.uint8)
  assert input_speed.psnr(white, np.full((4, 4, 3), 300.0)) > 140


def test_the_command_prints_a_table_of_a_folder(photos, cores, capsys):
  argv = ['input', f'--root={photos.root}', '--rounds=2', '--batch-size=4', '--image-size=32']
  assert bench.main(argv) == 0
  text = capsys.readouterr().out
  assert '8 files of' in text and 'to 32 px; cores: 1, rounds: 2' in text
  assert f'| {OWN} |' in text and f'| {input_loaders.PILLOW} |' in text
  assert len(os.sched_getaffinity(0)) == 1


@pytest.mark.parametrize(
  ('argument', 'message'),
  [
    ('--rounds=0', '--rounds must be at least 1'),
    ('--cores=4096', '--cores must be in 1..'),
    ('--root=EMPTY', 'there are no upright RGB JPEG files'),
  ],
)
def test_a_mistake_is_one_line(argument, message, tmp_path, cores, capsys):
  assert bench.main(['input', argument.replace('EMPTY', str(tmp_path))]) == 1
  assert message in capsys.readouterr().err


def test_files_that_loaders_read_differently_are_left_out(tmp_path, photos):
  (tmp_path / 'a.jpg').write_bytes(photos[0].image)
  upside_down = Image.Exif()
  upside_down[0x0112] = 3
  Image.open(photos[1].id).save(tmp_path / 'b.jpg', exif=upside_down)
  Image.open(photos[1].id).convert('CMYK').save(tmp_path / 'c.jpg')
  assert input_speed.files_in(tmp_path).files == ['a.jpg']
  (tmp_path / 'a.jpg').unlink()
  with pytest.raises(errors.UserError, match='upright'):
    input_speed.files_in(tmp_path)


def test_a_large_box_counts_by_the_nearest_of_its_roundings():
  box = resize.Box(3, 5, 130, 70)
  assert input_speed.roundings(box, (200, 300, 3), 32) == [box, resize.Box(2, 4, 132, 72)]
  assert input_speed.roundings(box, (133, 75, 3), 32)[1] == resize.Box(2, 4, 131, 71)
