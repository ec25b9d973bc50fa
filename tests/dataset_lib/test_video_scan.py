"""Every frame of a clip is decoded, and none is kept."""

import pathlib

import numpy as np
import pytest
from reference import video_clips

from losa_scenic.dataset_lib import video_cursor, video_file
from losa_scenic.dataset_lib.sources import BadImage

pytest.importorskip('av', reason="PyAV is not installed: pip install 'losa_scenic[video]'")

CODECS = {'open_gop': 'h264', 'h265': 'hevc', 'mpeg2': 'mpeg2video', 'palette': 'gif'}


@pytest.mark.parametrize('kind', video_clips.KINDS)
def test_frames_of_constant_rate(tmp_path, kind):
  path = video_clips.write(tmp_path / kind, 40, kind=kind)
  info = video_file.probe(path)
  found = video_file.scan(path, range(info.frames))
  assert (found.frames, found.varying) == (40, False)
  stem = kind.partition('.')[0].removesuffix('_reordered')
  assert found.codec == CODECS.get(stem, stem)
  assert video_file.scan(path, range(10, 25)).frames == 15


@pytest.mark.parametrize('kind', ['h264.mp4', 'h264.mkv'])
@pytest.mark.parametrize('rate', [24, 30, 60])
def test_rounded_times_are_no_varying_rate(tmp_path, kind, rate):
  ticks = [round(1000 * i / rate) for i in range(30)]
  path = video_clips.write(tmp_path / kind, 30, kind=kind, rate=rate, ticks=ticks)
  assert not video_file.scan(path, range(video_file.probe(path).frames)).varying


def test_frames_of_varying_rate(tmp_path):
  ticks = np.cumsum([0, *[20, 60, 40] * 10])
  path = video_clips.write(tmp_path / 'h264.mp4', len(ticks), ticks=ticks.tolist())
  info = video_file.probe(path)
  found = video_file.scan(path, range(info.frames))
  assert found.varying
  shown = video_clips.numbers(video_file.read_frames(path, range(info.frames)))
  assert found.frames == len(set(shown))


def test_a_part_starts_at_its_key_frame(tmp_path, monkeypatch):
  decoded, original = [], video_cursor.Cursor._decoded

  def spy(self):
    for time, frame in original(self):
      decoded.append(time)
      yield time, frame

  monkeypatch.setattr(video_cursor.Cursor, '_decoded', spy)
  path = video_clips.write(tmp_path / 'h264.mp4', 100, gop=10)
  assert video_file.scan(path, range(80, 90)).frames == 10
  assert len(decoded) < 30


def test_damage_anywhere_is_found(tmp_path):
  """Noise at the end of the pictures is met by a scan, though the first frames are fine."""
  whole = pathlib.Path(video_clips.write(tmp_path / 'clean.mp4', 120, size=(96, 128))).read_bytes()
  start, end = whole.index(b'mdat') + 4, whole.index(b'moov') - 4
  found = 0
  for seed in range(10):
    broken = bytearray(whole)
    first = start + (end - start) * 3 // 4
    broken[first:end] = np.random.default_rng(seed).bytes(end - first)
    (tmp_path / 'damaged.mp4').write_bytes(broken)
    assert len(video_file.read_frames(tmp_path / 'damaged.mp4', [0, 1])) == 2
    try:
      video_file.scan(tmp_path / 'damaged.mp4', range(120))
    except BadImage as error:
      assert error.id.endswith('damaged.mp4')
      found += 1
  assert found == 10


def test_what_cannot_be_read(tmp_path):
  (tmp_path / 'empty.mp4').write_bytes(b'')
  for name in ('empty.mp4', 'missing.mp4'):
    with pytest.raises(BadImage):
      video_file.scan(tmp_path / name, range(3))
