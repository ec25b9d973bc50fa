"""The comparison of readers of clips: the same frames for all, what is decoded, what it prints."""

import numpy as np
import pytest
from reference import video_clips

from losa_scenic import bench
from losa_scenic.bench_lib import clip_loaders, clip_speed, clip_videos
from losa_scenic.common_lib import errors

av = pytest.importorskip('av', reason="PyAV is not installed: pip install 'losa_scenic[video]'")


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Two videos of 60 frames with a key frame every 12."""
  folder = tmp_path_factory.mktemp('videos')
  (folder / 'deep').mkdir()
  for name in ('b.mp4', 'deep/a.mp4'):
    video_clips.write(folder / name, options={'x264-params': 'scenecut=0'})
  (folder / 'notes.txt').write_text('no video')
  return folder


@pytest.mark.parametrize('name', clip_loaders.LOADERS)
@pytest.mark.parametrize('indices', [[30, 32, 34], [58, 59, 0, 1], [7, 7]])
def test_every_reader_shows_the_frames_asked_for(folder, name, indices):
  pixels = clip_loaders.LOADERS[name](str(folder / 'b.mp4'), np.array(indices))
  assert pixels.dtype == np.uint8
  assert video_clips.numbers(pixels) == indices


def test_red_comes_first(tmp_path):
  clip_videos.write(tmp_path, 12, 1, frames=5)
  pixels = [
    read(str(tmp_path / '0000.mp4'), np.array([3])) for read in clip_loaders.LOADERS.values()
  ]
  assert pixels[0][..., 0].mean() > pixels[0][..., 2].mean() + 5
  for other in pixels[1:]:
    assert clip_speed.psnr(pixels[0], other) > 35


def test_only_frames_from_the_last_key_frame_on_are_counted(folder):
  path = str(folder / 'b.mp4')
  with clip_loaders.counted() as number:
    clip_loaders.own(path, np.array([38, 40]))
  # The first one, by which the reader finds its place, or two, and frames 36 to 41.
  assert 5 <= number[0] <= 8
  clip_loaders.own(path, np.array([38, 40]))
  assert number[0] <= 8


def test_the_sample_videos_move_and_have_the_key_frames_asked_for(tmp_path):
  files = clip_videos.write(tmp_path, 10, 2, frames=21)
  for file in files:
    with av.open(str(tmp_path / file)) as container:
      frames = list(container.decode(video=0))
    assert [i for i, frame in enumerate(frames) if frame.key_frame] == [0, 10, 20]
    pixels = [frame.to_ndarray(format='rgb24') for frame in frames]
    assert {x.shape for x in pixels} == {(256, 340, 3)}
    assert clip_speed.psnr(pixels[0], pixels[20]) < 30
  assert (tmp_path / files[0]).read_bytes() != (tmp_path / files[1]).read_bytes()


def test_windows_are_drawn_within_the_files(folder):
  paths = clip_speed.files_in(folder)
  assert [path.removeprefix(str(folder)) for path in paths] == ['/b.mp4', '/deep/a.mp4']
  work = clip_speed.work('mine', paths, 8, 3)
  assert work.frames == [60, 60] and len(work.windows) == 2 * clip_speed.WINDOWS
  assert work.described.startswith('mine: 2 files of 2.4 s') and '64 x 48' in work.described
  for _, indices in work.windows:
    assert indices.max() < 60 and set(np.diff(indices)) == {3}
  assert len({indices[0] for _, indices in work.windows}) > 1


def test_the_command_prints_a_table_of_a_folder(folder, capsys):
  argv = ['clips', f'--root={folder}', '--rounds=2', '--frames=4', '--stride=2']
  assert bench.main(argv) == 0
  lines = capsys.readouterr().out.splitlines()
  assert any(line == '**4 frames, stride 2; 3 windows a file; rounds: 2**' for line in lines)
  rows = {line.split('|')[1].strip(): line.split('|')[2:5] for line in lines if line[:3] == '| l'}
  assert f'| --- |{" ---: |" * 3}' in lines
  speed, decoded, same = rows['losa_scenic']
  assert float(speed.split()[0]) > 0 and 4 <= int(decoded.split()[0]) < 60
  assert same.strip() == 'same'


def test_kinds_of_files_stand_side_by_side():
  rows = {name: clip_speed.Row([2.0, 8.0, 4.0], None, 41.6) for name in clip_loaders.LOADERS}
  own = rows | {'losa_scenic': clip_speed.Row([10.0], 0.255, np.inf)}
  text = clip_speed.table('title', ['few', 'many'], [rows, own])
  slow = '4.0 (2.0 to 8.0) |  | 42'
  assert f'| losa_scenic | {slow} | 10.0 (10.0 to 10.0) | 26 % | same |' in text
  assert f'| OpenCV, seek | {slow} | {slow} |' in text


@pytest.mark.parametrize(
  ('argument', 'message'),
  [
    ('--rounds=0', '--rounds must be an integer of at least 1'),
    ('--frames=0', '--frames must be'),
    ('--stride=0', '--stride must be'),
    ('--root=EMPTY', 'there are no video files in it'),
  ],
)
def test_a_mistake_is_one_line(argument, message, tmp_path, capsys):
  assert bench.main(['clips', argument.replace('EMPTY', str(tmp_path))]) == 1
  error = capsys.readouterr().err
  assert message in error and error.count('\n') == 1


def test_a_damaged_file_is_named(tmp_path, capsys):
  (tmp_path / 'bad.mp4').write_bytes(b'no video at all')
  assert bench.main(['clips', f'--root={tmp_path}']) == 1
  assert 'bad.mp4' in capsys.readouterr().err


def test_a_frame_that_opencv_cannot_read_is_an_error(folder):
  with pytest.raises(errors.UserError, match='cannot read frame 70'):
    clip_loaders.opencv_every_frame(str(folder / 'b.mp4'), np.array([70]))
