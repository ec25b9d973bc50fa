"""Frames of video files: the right ones, upright, for every container."""

import csv
import os
import pathlib
import subprocess
import sys
import threading
from fractions import Fraction

import numpy as np
import pytest
from reference import video_clips

from losa_scenic.dataset_lib import video_cursor, video_file

av = pytest.importorskip('av', reason="PyAV is not installed: pip install 'losa_scenic[video]'")

SHARED = pathlib.Path(
  os.environ.get('LOSA_SHARED_DATA', pathlib.Path(__file__).parents[3] / 'shared' / 'data')
)
VIDEO = SHARED / 'video'
needs_clips = pytest.mark.skipif(not VIDEO.is_dir(), reason=f'no clips in {VIDEO}')


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> pathlib.Path:
  return tmp_path_factory.mktemp('videos')


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
  """Gets the times of all frames that are decoded."""
  times, original = [], video_cursor.Cursor._decoded

  def spy(self):
    for time, frame in original(self):
      times.append(time)
      yield time, frame

  monkeypatch.setattr(video_cursor.Cursor, '_decoded', spy)
  return times


@pytest.mark.parametrize('kind', video_clips.KINDS)
@pytest.mark.parametrize('gop', [12, 250])
def test_any_frames_in_any_order(folder, kind, gop):
  path = video_clips.write(folder / f'{gop}_{kind}', kind=kind, gop=gop)
  everything = np.stack(video_clips.decode_all(path))
  assert video_clips.numbers(everything) == list(range(60))
  info = video_file.probe(path)
  assert info == (64, 48, 60, 25.0, pytest.approx(2.4), 0)
  rng = np.random.default_rng(gop)
  lists = [rng.integers(0, 60, rng.integers(1, 12)) for _ in range(12)]
  lists += [[i] for i in range(60)] + [np.arange(60), np.arange(59, -1, -1), [0, 0], [59, 59, 0]]
  for indices in lists:
    np.testing.assert_array_equal(video_file.read_frames(path, indices), everything[indices])


@pytest.mark.parametrize('kind', ['h264.mp4', 'h264.mkv', 'vp9.webm', 'mpeg4.avi'])
def test_decoding_starts_at_the_key_frame_before(folder, kind, decoded):
  no_others = {'x264-params': 'scenecut=0'}
  options = no_others if kind.startswith('h264') else {'sc_threshold': '1000000000'}
  path = video_clips.write(folder / f'long_{kind}', 300, kind=kind, gop=25, options=options)
  for indices, most in [([280], 32), ([30, 31, 290], 60), ([3, 5, 9], 14)]:
    decoded.clear()
    assert video_clips.numbers(video_file.read_frames(path, indices)) == indices
    assert len(decoded) <= most


@pytest.mark.parametrize('rate', [Fraction(30000, 1001), 30, 24, Fraction(15), Fraction(120)])
@pytest.mark.parametrize('kind', ['h264.mp4', 'h264.mkv'])
def test_frame_rates_that_a_containers_clock_rounds(folder, kind, rate):
  path = video_clips.write(folder / f'{float(rate):.0f}_{kind}', 90, kind=kind, rate=rate)
  info = video_file.probe(path)
  assert (info.frames, info.frame_rate) == (90, pytest.approx(float(rate), rel=1e-3))
  assert video_clips.numbers(video_file.read_frames(path, range(90))) == list(range(90))
  times = np.arange(90) / float(rate)
  assert video_clips.numbers(video_file.read_frames(path, times=times)) == list(range(90))
  later = times + 0.8 / float(rate)
  assert video_clips.numbers(video_file.read_frames(path, times=later)) == list(range(90))


@pytest.mark.parametrize('kind', ['h264.mp4', 'h264.mov', 'h264.mkv', 'vp8.webm', 'palette.gif'])
def test_a_varying_rate_is_read_by_time(folder, kind):
  """Ten frames a second, one frame that stays for a second, then 33 a second."""
  ticks = [100 * i for i in range(21)] + [3000 + 30 * i for i in range(40)]
  tick = Fraction(1, 1000)
  if kind == 'palette.gif':
    ticks, tick = [t // 10 for t in ticks], Fraction(1, 100)
  path = video_clips.write(
    folder / f'varying_{kind}', 61, kind=kind, ticks=ticks, tick=tick, rate=30
  )
  shown = np.array([float(t * tick) for t in ticks])
  times = np.random.default_rng(0).uniform(0, 4.19, 80)
  expected = np.searchsorted(shown, times + 6e-4, side='right') - 1
  assert video_clips.numbers(video_file.read_frames(path, times=times)) == expected.tolist()
  info = video_file.probe(path)
  # How long the last frames stay, not all containers say: MP4 with reordered frames does not.
  assert 4.2 - 0.07 <= info.duration_seconds < 4.3
  assert abs(info.frames - info.duration_seconds * info.frame_rate) <= 1
  indices = np.arange(info.frames)
  seen = video_clips.numbers(video_file.read_frames(path, indices))
  places = np.ceil(shown * info.frame_rate - 0.5 - 1e-9)
  assert seen == (np.searchsorted(places, indices, side='right') - 1).tolist()
  assert seen[-1] >= 58  # They may stay for less than the mean.


def test_short_clips_and_indices_after_the_end_show_the_last_frame(folder):
  path = video_clips.write(folder / 'ten.mp4', 10)
  assert video_file.probe(path).frames == 10
  frames = video_file.read_frames(path, [9, 10, 0, 300, 9])
  assert video_clips.numbers(frames) == [9, 9, 0, 9, 9]
  assert video_clips.numbers(video_file.read_frames(path, times=[0.39, 7])) == [9, 9]
  path = video_clips.write(folder / 'one.mp4', 1)
  assert video_clips.numbers(video_file.read_frames(path, [0])) == [0]


@pytest.mark.parametrize('kind', ['vp8.webm', 'mjpeg.avi', 'mpeg4.avi', 'palette.gif'])
def test_odd_sizes(folder, kind):
  path = video_clips.write(folder / f'odd_{kind}', 13, kind=kind, size=(51, 85))
  assert video_file.probe(path)[:2] == (85, 51)
  frames = video_file.read_frames(path, [12, 3])
  assert frames.shape == (2, 51, 85, 3) and frames.dtype == np.uint8
  assert video_clips.numbers(frames) == [12, 3]


@pytest.mark.parametrize(('rotation', 'turned'), [(90, 270), (180, 180), (-90, 90), (0, 0)])
def test_rotation_is_undone(folder, rotation, turned):
  path = video_clips.write(folder / f'rotated{rotation}.mp4', 5, rotation=rotation)
  info = video_file.probe(path)
  assert info.rotation == turned
  assert (info.width, info.height) == ((48, 64) if turned % 180 else (64, 48))
  stored = np.stack(video_clips.decode_all(path))
  upright = np.rot90(stored, -turned // 90, axes=(1, 2))
  np.testing.assert_array_equal(video_file.read_frames(path, [0, 4]), upright[[0, 4]])


def test_rotation_agrees_with_opencv(folder):
  cv2 = pytest.importorskip('cv2')
  for rotation in (90, 180, -90):
    path = video_clips.write(folder / f'turned{rotation}.mp4', 2, rotation=rotation)
    _, image = cv2.VideoCapture(path).read()
    assert np.abs(video_file.read_frames(path, [0])[0, :, :, ::-1].astype(int) - image).max() <= 2


def test_mirrored_pictures(folder, monkeypatch):
  path = video_clips.write(folder / 'mirrored.mp4', 2)
  stored = np.stack(video_clips.decode_all(path))
  for matrix, expected in [
    ((-1, 0, 0, 1), stored[:, :, ::-1]),
    ((1, 0, 0, -1), stored[:, ::-1]),
    ((0, 1, 1, 0), stored.transpose(0, 2, 1, 3)),
    ((0, -1, -1, 0), stored.transpose(0, 2, 1, 3)[:, ::-1, ::-1]),
  ]:
    monkeypatch.setattr(video_file, '_orientation', lambda frame, m=matrix: m)
    np.testing.assert_array_equal(video_file.read_frames(path, [0, 1]), expected)


def test_colours_follow_what_the_file_says_of_them(folder):
  tags = {'colorspace': 'bt709', 'color_primaries': 'bt709', 'color_trc': 'bt709'}
  colour = np.full((48, 64, 3), (200, 40, 30), np.uint8)
  for matrix, options in [('ITU601', {}), ('ITU709', tags)]:
    path = folder / f'{matrix}.mp4'
    with av.open(str(path), 'w') as container:
      stream = container.add_stream('libx264', rate=25, options=options)
      stream.height, stream.width, stream.pix_fmt = 48, 64, 'yuv420p'
      frame = av.VideoFrame.from_ndarray(colour).reformat(format='yuv420p', dst_colorspace=matrix)
      frame.pts = 0
      container.mux(stream.encode(frame))
      container.mux(stream.encode())
    assert np.abs(video_file.read_frames(path, [0])[0].astype(int) - colour).max() <= 3


def test_frames_that_an_edit_list_hides(folder):
  """A cut without encoding anew begins at a key frame that is not shown."""
  path, cut = video_clips.write(folder / 'uncut.mp4'), str(folder / 'cut.mp4')
  with av.open(path) as source, av.open(cut, 'w') as target:
    stream = target.add_stream_from_template(source.streams.video[0])
    shift = int(5 / 25 / source.streams.video[0].time_base)
    for packet in source.demux(video=0):
      if packet.dts is not None:
        packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
        target.mux(packet)
  shown = video_clips.numbers(np.stack(video_clips.decode_all(cut)))
  assert shown == list(range(5, 60))
  assert video_file.probe(cut).frames == len(shown)
  assert video_clips.numbers(video_file.read_frames(cut, range(55))) == shown
  for i in (0, 1, 20, 54):
    assert video_clips.numbers(video_file.read_frames(cut, [i])) == [shown[i]]


def test_fragments_and_recordings_without_a_duration(folder):
  fragments = video_clips.write(
    folder / 'fragments.mp4', container_options={'movflags': 'frag_keyframe+empty_moov'}
  )
  live = video_clips.write(folder / 'live.webm', kind='vp8.webm', container_options={'live': '1'})
  for path in (fragments, live):
    assert video_file.probe(path)[:4] == (64, 48, 60, 25.0)
    for indices in ([57, 3, 31], [44]):
      assert video_clips.numbers(video_file.read_frames(path, indices)) == indices


def test_names_that_look_like_protocols(folder):
  content = pathlib.Path(video_clips.write(folder / 'plain.mp4', 3)).read_bytes()
  for name in ('http:clip.mp4', 'a b%d?#é.mp4', 'concat:a|b.mp4'):
    (folder / name).write_bytes(content)
    assert video_clips.numbers(video_file.read_frames(folder / name, [2])) == [2]


def test_wrong_arguments(folder):
  path = video_clips.write(folder / 'fine.mp4', 3)
  for indices, times in [(None, None), ([0], [0.0]), ([], None), ([[0]], None), ([-1], None)]:
    with pytest.raises(ValueError, match=r'One of|Frames count'):
      video_file.read_frames(path, indices, times=times)
  with pytest.raises(ValueError, match='integers'):
    video_file.read_frames(path, [0.5])
  with pytest.raises(ValueError, match='Frames count'):
    video_file.read_frames(path, times=[float('nan')])


def test_several_threads(folder):
  sizes = (48, 64), (64, 64)
  paths = [video_clips.write(folder / f'thread{s[0]}.mp4', 40, size=s) for s in sizes]
  failures = []

  def work(seed):
    rng = np.random.default_rng(seed)
    for _ in range(15):
      indices = rng.integers(0, 40, 5).tolist()
      if video_clips.numbers(video_file.read_frames(paths[seed % 2], indices)) != indices:
        failures.append((seed, indices))

  threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not failures


def test_memory_is_that_of_the_wanted_frames(folder):
  """Of 120 frames of 2.8 MB, three are wanted: not much more than they may be held."""
  options = {'preset': 'ultrafast'}
  path = video_clips.write(folder / 'large.mp4', 120, size=(720, 1280), options=options)
  code = (
    'import resource; from losa_scenic.dataset_lib import video_file as v\n'
    f'v.read_frames({path!r}, [0])\n'
    'before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
    f'v.read_frames({path!r}, [1, 60, 119])\n'
    'print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)'
  )
  run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert int(run.stdout) < 40_000  # Kilobytes.


def test_the_core_does_not_import_pyav():
  code = (
    'import sys, losa_scenic.dataset_lib.video_file, losa_scenic.dataset_lib.frame_sampling;'
    'print("av" in sys.modules)'
  )
  run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert run.stdout.strip() == 'False', run.stderr


def test_without_pyav(folder, monkeypatch):
  monkeypatch.setitem(sys.modules, 'av', None)
  with pytest.raises(Exception, match=r"pip install 'losa_scenic\[video\]'"):
    video_file.probe(folder / 'any.mp4')


@needs_clips
def test_the_shared_clips_are_as_their_table_says():
  with open(VIDEO / 'fight' / 'clips.csv', newline='') as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 211
  for row in rows:
    info = video_file.probe(VIDEO / 'fight' / row['file'])
    stated = int(row['width']), int(row['height']), int(row['frames'])
    assert (info[:3], f'{info.frame_rate:.2f}') == (stated, f'{float(row["fps"]):.2f}'), row['file']


@needs_clips
@pytest.mark.parametrize('part', ['fight', 'fight_originals'])
def test_the_shared_clips_agree_with_opencv(part):
  cv2 = pytest.importorskip('cv2')
  paths = sorted((VIDEO / part).rglob('*.mp4'))
  for path in paths[:: 8 if part == 'fight' else 1]:
    capture, expected = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
      expected.append(read[1][:, :, ::-1])
    info = video_file.probe(path)
    assert info.frames == len(expected), path
    indices = np.random.default_rng(0).integers(0, info.frames, 6).tolist() + [0, info.frames - 1]
    for index, frame in zip(indices, video_file.read_frames(path, indices), strict=True):
      np.testing.assert_array_equal(frame, expected[index], f'{path} {index}')
