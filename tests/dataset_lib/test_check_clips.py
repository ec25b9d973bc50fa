"""What `check` counts on clips: files and parts of them, encoded frames, pixels."""

import io
import json
import pathlib

import numpy as np
import pytest
from PIL import Image
from reference import video_clips

from losa_scenic import data
from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import (
  check,
  check_text,
  contact_sheet,
  datasets,
  repeats,
  resize,
  sources,
)
from losa_scenic.dataset_lib.clip_files import Clip, ClipFiles
from losa_scenic.dataset_lib.clip_reader import Sampling
from losa_scenic.dataset_lib.frame_sampling import WHOLE, Segment

VIEW = resize.View(16)


class Made:
  """Records made here."""

  def __init__(self, *images, labels=None) -> None:
    self.images, self.labels = images, labels or [0] * len(images)

  def __len__(self):
    return len(self.images)

  def __getitem__(self, index):
    return sources.Record(self.images[index], self.labels[index], f'made[{index}]')


def clips(train, test, names=('a', 'b')):
  return sources.Splits(train, None, test, names, clips=True)


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> pathlib.Path:
  """Clips of 25 frames a second, 64 x 48 pixels, of different lengths."""
  pytest.importorskip('av', reason="PyAV is not installed: pip install 'losa_scenic[video]'")
  root = tmp_path_factory.mktemp('clips')
  for count in (10, 20, 30, 50):
    video_clips.write(root / f'{count}.mp4', count)
  video_clips.write(root / 'turned.mp4', 20, rotation=90)
  ticks = np.cumsum([0, *[20, 60, 40] * 7]).tolist()
  video_clips.write(root / 'varying.mp4', len(ticks), ticks=ticks)
  video_clips.write(root / 'vp9.webm', 20, kind='vp9.webm', size=(32, 32))
  return root


def files(root, *names, segments=None, labels=None):
  labels = labels or [i % 2 for i in range(len(names))]
  return ClipFiles(root, names, labels, num_classes=2, segments=segments)


def test_lengths_rates_and_sizes_of_files(folder):
  train = files(folder, '10.mp4', '20.mp4', '50.mp4', 'turned.mp4')
  test = files(folder, 'varying.mp4', 'vp9.webm', '30.mp4')
  found = check.check(clips(train, test), 'made', VIEW, sampling=Sampling(8, frame_stride=3))
  assert not found.troubles and found.images == 7 and found.noun == 'clip'
  assert found.kinds == {'mp4 h264': 6, 'webm vp9': 1}
  assert found.sizes[0] == (32, 32) and found.sizes[-1] in ((48, 64), (64, 48))
  assert found.rotated == 1 and found.distinct_sizes == 3
  length = found.clips
  assert length is not None
  assert length.frames == (10, 20, 50)
  assert length.seconds == pytest.approx((0.4, 0.8, 2.0), rel=0.05)
  assert length.frame_rates['25'] >= 6 and sum(length.frame_rates.values()) == 7
  assert length.varying == 1
  # A window reaches over 22 frames; the one of varying rate lasts 0.86 s, as 22 of 25 a second.
  assert length.short == 4
  assert length.sampling is not None
  assert (length.sampling['num_frames'], length.sampling['frame_stride']) == (8, 3)
  assert found.parts['train'].bytes == sum((folder / name).stat().st_size for name in train.files)
  assert found.reading is not None and found.reading.images_per_second > 0
  assert found.reading.decoded_bytes == (10 + 20 + 50 + 20) * 64 * 48 * 3
  text = check_text.text(found)
  for line in (
    'length: 10 to 50 frames, median 20',
    '4 clips shorter than the window of 8 frames: they begin again',
    '1 clip of varying rate, read by time',
    '1 clip turned upright',
    'clips/s at 8 x 16 x 16 on',
    'every clip can be read',
    'fine: 7 clips, nothing to mend',
  ):
    assert line in text
  assert 'image' not in text
  json.dumps(found.to_json())


def test_without_a_run_nothing_is_said_of_windows(folder):
  found = check.check(clips(files(folder, '10.mp4', '20.mp4'), files(folder, '30.mp4')), 'x', VIEW)
  assert found.clips is not None
  assert (found.clips.short, found.clips.sampling, found.reading) == (None, None, None)
  assert 'window' not in check_text.text(found)


def test_files_that_cannot_be_decoded_to_the_end(folder, tmp_path):
  whole = (folder / '50.mp4').read_bytes()
  end = whole.index(b'moov') - 4
  broken = bytearray(whole)
  broken[end - 400 : end] = np.random.default_rng(0).bytes(400)  # The first frames are fine.
  (tmp_path / 'damaged.mp4').write_bytes(broken)
  (tmp_path / 'cut.mp4').write_bytes(whole[: len(whole) // 2])
  (tmp_path / 'good.mp4').write_bytes(whole)
  train = files(tmp_path, 'good.mp4', 'damaged.mp4', 'cut.mp4', 'missing.mp4', labels=[0, 1, 1, 0])
  found = check.check(clips(train, files(folder, '10.mp4')), 'x', VIEW, sampling=Sampling(2))
  assert [(problem.index, problem.split) for problem in found.broken] == [
    (index, 'train') for index in (1, 2, 3)
  ]
  assert found.broken[1].reason == 'the file is truncated'
  assert found.troubles == ('3 clips cannot be read', '1 class without a training clip')
  assert '3 clips cannot be read' in check_text.text(found)


def test_parts_of_files(folder):
  segments = [Segment(0.0, 0.5), Segment(0.5, 1.0), Segment(0.0, 0.5), Segment(5.0), Segment(1.0)]
  train = files(folder, *['50.mp4'] * 5, segments=segments)
  test = files(folder, '50.mp4', segments=[Segment(0.5, 1.0)], labels=[1])
  found = check.check(clips(train, test), 'x', VIEW)
  (bad,) = found.broken
  assert bad.index == 3 and bad.reason.startswith('A segment must begin inside the clip')
  assert found.parts['train'].duplicates == 1  # The third is the first.
  assert found.leaks == {('train', 'test'): 1}
  assert found.clips is not None and found.clips.frames == (13, 13, 25)


def test_copies_are_found_across_names_and_splits(folder, tmp_path):
  for name, source in (('a', '10'), ('b', '10'), ('c', '20'), ('d', '20'), ('e', '10')):
    (tmp_path / f'{name}.mp4').write_bytes((folder / f'{source}.mp4').read_bytes())
  train = files(tmp_path, 'a.mp4', 'b.mp4', 'c.mp4', labels=[0, 0, 1])
  found = check.check(clips(train, files(tmp_path, 'd.mp4', 'e.mp4', labels=[1, 1])), 'x', VIEW)
  assert found.parts['train'].duplicates == 1
  assert found.leaks == {('train', 'test'): 2} and found.conflicts == 1
  assert found.troubles == (
    '2 clips of test also in train',
    '1 clip repeated with another label',
  )
  assert 'the same clip in two splits: 2 of test in train' in check_text.text(found)


def png(value, height=3, width=5):
  stream = io.BytesIO()
  Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(stream, 'png')
  return stream.getvalue()


def test_encoded_frames():
  train = Made(
    [png(1), png(2)],
    [png(1), png(2), png(3)],
    [],
    [png(1), b'nothing'],
    [png(1), png(1, 4)],
    [png(2), png(1)],
    [png(1), png(2)],
  )
  found = check.check(clips(train, Made([png(5)] * 9), 'a'), 'x', VIEW, sampling=Sampling(4))
  assert [(bad.index, bad.reason.partition(': ')[0]) for bad in found.broken] == [
    (2, 'the clip has no frames'),
    (3, 'frame 1'),
    (4, 'its frames change their size'),
  ]
  assert found.kinds == {'frames PNG RGB': 5}
  assert found.clips is not None and found.reading is not None
  assert (found.clips.frames, found.clips.seconds, found.clips.frame_rates) == ((2, 2, 9), (), {})
  assert found.clips.short == 4
  assert found.parts['train'].duplicates == 1
  assert found.reading.decoded_bytes == (2 + 3 + 2 + 2) * 3 * 5 * 3


def test_pixels():
  pixels = np.random.default_rng(0).integers(0, 256, (3, 7, 8, 10, 3), np.uint8)
  splits = clips(Made(*pixels), Made(pixels[0]), 'a')
  found = check.check(splits, 'x', VIEW, sampling=Sampling(7))
  assert found.kinds == {'pixels RGB': 4} and found.sizes[0] == (10, 8)
  assert found.clips is not None and found.clips.frames == (7, 7, 7) and found.clips.short == 0
  assert found.reading is not None and found.reading.decoded_bytes == 0
  assert found.leaks == {('train', 'test'): 1}
  assert 'all clips have 7 frames' in check_text.text(found)
  with pytest.raises(errors.UserError, match=r'made\[0\]: frames_per_second is for video files'):
    check.check(splits, 'x', VIEW, sampling=Sampling(7, frames_per_second=5.0))


def test_digests_tell_clips_apart(folder):
  path = str(folder / '10.mp4')
  images = [
    Clip(path),
    Clip(path, Segment(0.0, 0.2)),
    Clip(path, Segment(0.1)),
    Clip(str(folder / '20.mp4')),
    pathlib.Path(path).read_bytes(),
    [b'ab', b'c'],
    [b'a', b'bc'],
  ]
  found = {tuple(repeats.digest(image).tolist()) for image in images}
  assert len(found) == len(images)
  assert tuple(repeats.digest(Clip(path, WHOLE)).tolist()) in found


@pytest.fixture(scope='module')
def root(folder, tmp_path_factory) -> pathlib.Path:
  """A folder of clips as a user has it: 4 of 2 classes in train, 2 in test."""
  root = tmp_path_factory.mktemp('set')
  places = [('train/a/1', 10), ('train/a/2', 20), ('train/b/1', 30), ('test/a/1', 50)]
  for place, count in places:
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    (root / f'{place}.mp4').write_bytes((folder / f'{count}.mp4').read_bytes())
  (root / 'test' / 'b').mkdir()
  for place, name in (('train/b/2', 'vp9'), ('test/b/1', 'vp9')):
    (root / f'{place}.webm').write_bytes((folder / f'{name}.webm').read_bytes())
  return root


def run(capsys, *arguments):
  code = data.main([str(argument) for argument in arguments])
  return code, *capsys.readouterr()


def test_the_command_checks_a_folder_of_clips(root, capsys):
  arguments = ('check', 'clip_folder', '--set', f'root={root}', '--set', 'val_fraction=0')
  code, out, _ = run(capsys, *arguments, '--frames=24', '--image-size=16', '--json')
  found = json.loads(out)
  assert (code, found['troubles']) == (1, ['1 clip of test also in train'])
  assert found['clips']['sampling']['num_frames'] == 24 and found['clips']['short'] == 4
  code, out, _ = run(capsys, *arguments, '--image-size=16', '--set', 'frames_per_second=50')
  assert 'clips/s at 16 x 16 x 16' in out  # Frames, unless somebody says how many.
  assert '1 clip shorter than the window' not in out  # 8 of 25 a second are enough.


def test_the_command_draws_strips(root, capsys, tmp_path):
  sheet = tmp_path / 'sheet.png'
  set_ = ('clip_folder', '--set', f'root={root}', '--set', 'val_fraction=0', '--image-size=32')
  code, out, _ = run(capsys, 'show', *set_, '--frames=7', '--count=4', f'--output={sheet}')
  assert code == 0, out
  width = 128 * 4 + 3 * 4 + 4  # Frames four times as large, gaps, margins.
  with Image.open(sheet) as image:
    assert image.size == (3 * width, 20 + 2 * (132 + contact_sheet.caption_height()))
  views = ('--set', 'num_test_clips=2', '--set', 'num_test_crops=3', '--set', 'central_crop=0.9')
  run(capsys, 'show', *set_, *views, '--split=test', '--count=1', f'--output={sheet}')
  with Image.open(sheet) as image:
    assert image.size == (3 * width, 20 + 2 * (132 + contact_sheet.caption_height()))
    picture = np.asarray(image)[20:]
  rows = picture.reshape(2, -1, 3, width, 3).swapaxes(1, 2)
  options = {'root': str(root), 'val_fraction': 0.0, 'num_test_clips': 2, 'num_test_crops': 3}
  options['central_crop'] = 0.9
  test = datasets.build_dataset(
    'clip_folder',
    batch_size=2,
    eval_batch_size=2,
    image_size=32,
    frames=16,
    dataset_configs=options,
  ).test_ds
  shown = test[0]['inputs'][1]  # The one in the middle of two.
  assert shown.shape == (6, 16, 32, 32, 3)
  for view in range(6):
    cell = rows[view // 3, view % 3]
    for place, frame in enumerate((0, 5, 10, 15)):
      x = 2 + 132 * place
      np.testing.assert_array_equal(cell[2:130:4, x : x + 128 : 4], shown[view, frame])


def test_a_strip_shows_the_first_and_the_last_frame():
  frames = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 6, 3), np.uint8)
  strip = contact_sheet.strip(frames)
  assert strip.shape == (4, 4 * 6 + 3, 3) and strip.dtype == np.uint8
  assert [int(strip[0, 7 * i, 0]) for i in range(4)] == [0, 3, 6, 9]
  assert (strip[:, 6::7] == 255).all()
  assert contact_sheet.strip(frames[:2]).shape == (4, 13, 3)
  np.testing.assert_array_equal(contact_sheet.strip(frames, 1), frames[0])
  light = contact_sheet.strip(frames / np.float32(10), 2)
  assert light.dtype == np.float32 and light[0, 6, 0] == 1


def test_wide_pictures_make_wide_cells():
  pictures = [np.full((8, 20, 3), 10 * i, np.uint8) for i in range(3)]
  cells = [contact_sheet.Cell(picture, ('a',)) for picture in pictures]
  sheet = contact_sheet.draw([*cells, contact_sheet.Cell(None)], columns=2, cell=20)
  height = 20 + contact_sheet.caption_height()
  assert sheet.shape == (2 * height, 2 * 44, 3)
  for i in range(3):
    x, y = 44 * (i % 2) + 2, height * (i // 2) + 2
    assert (sheet[y : y + 16, x : x + 40] == 10 * i).all()


@pytest.mark.parametrize(
  ('arguments', 'said'),
  [
    ('check digits --frames=8', 'digits holds images: --frames is for clips'),
    ('show digits --frames=8 --output=OUT/a.png', 'digits holds images: --frames is for clips'),
    ('check digits --set frame_stride=2', 'digits holds images: frame_stride is for clips'),
    ('check moving_sprites --frames=0', '--frames must be an integer of at least 1'),
    ('check moving_sprites --set frames=8', "Unknown option of dataset 'moving_sprites' 'frames'"),
    ('check CONFIG --frames=8', 'use --config.backbone_configs.frames=VALUE'),
    ('show moving_sprites --output=OUT/a.png --count=501', 'At most 2,000 frames of clips'),
  ],
)
def test_wrong_usage_ends_with_2(capsys, tmp_path, arguments, said):
  config = pathlib.Path(__file__).parents[2] / 'configs' / 'quickstart.py'
  words = arguments.replace('OUT', str(tmp_path)).replace('CONFIG', str(config)).split()
  code, out, err = run(capsys, *words)
  assert (code, out) == (2, '')
  assert said in err


def test_a_config_of_clips(capsys):
  config = pathlib.Path(__file__).parents[2] / 'configs' / 'quickstart.py'
  chosen = ('dataset_name=moving_sprites', 'backbone_configs.frames=8')
  counts = [f'dataset_configs.{part}={n}' for part, n in (('num_train', 20), ('num_test', 8))]
  code, out, _ = run(capsys, 'check', config, *(f'--config.{c}' for c in (*chosen, *counts)))
  assert code == 0
  assert 'clips/s at 8 x 64 x 64' in out
