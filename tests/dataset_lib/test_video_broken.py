"""Video files that are truncated, damaged or no videos are refused when they are read."""

import pathlib

import numpy as np
import pytest
from reference import video_clips

from losa_scenic.dataset_lib import video_file
from losa_scenic.dataset_lib.sources import BadImage

pytest.importorskip('av', reason="PyAV is not installed: pip install 'losa_scenic[video]'")


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> pathlib.Path:
  return tmp_path_factory.mktemp('videos')


@pytest.mark.parametrize('kind', video_clips.KINDS)
def test_truncated_files_are_refused(folder, kind):
  whole = pathlib.Path(video_clips.write(folder / f'whole_{kind}', kind=kind)).read_bytes()
  cut = folder / f'cut_{kind}'
  for share in (0.01, 0.1, 0.5, 0.9, 0.99):
    cut.write_bytes(whole[: int(len(whole) * share)])
    if kind == 'mpeg2.mpg':  # It does not say its length: a part of it is a shorter clip.
      if share < 0.1:
        continue
      frames = video_file.probe(cut).frames
      assert video_clips.numbers(video_file.read_frames(cut, [1])) == [1]
      assert 60 * share - 10 < frames < 60 * share + 10
      continue
    for read in (video_file.probe, lambda path: video_file.read_frames(path, [0])):
      with pytest.raises(BadImage, match=f'cut_{kind}: '):
        read(cut)


def test_a_truncated_file_with_its_index_in_front(folder):
  path = video_clips.write(folder / 'front.mp4', container_options={'movflags': 'faststart'})
  whole, cut = pathlib.Path(path).read_bytes(), folder / 'front_cut.mp4'
  assert whole.index(b'moov') < whole.index(b'mdat')
  for share in (0.4, 0.7, 0.95):
    cut.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(BadImage, match=r'front_cut\.mp4: the file is truncated\.'):
      video_file.read_frames(cut, [0])
  for more in (b'\0' * 100, b'some rubbish after the end'):
    cut.write_bytes(whole + more)
    assert video_clips.numbers(video_file.read_frames(cut, [0, 59])) == [0, 59]


def test_what_is_no_video_is_refused(folder):
  (folder / 'empty.mp4').write_bytes(b'')
  (folder / 'page.mp4').write_text('<html><body>404 not found</body></html>')
  (folder / 'words.txt').write_text('FFmpeg would draw this text.\n' * 20)
  (folder / 'list.mp4').write_text(f'#EXTM3U\n#EXTINF:1,\n{folder}/h264.mp4\n#EXT-X-ENDLIST\n')
  (folder / 'noise.avi').write_bytes(np.random.default_rng(0).bytes(5000))
  for name, reason in [
    ('empty.mp4', 'the file is empty'),
    ('page.mp4', 'no video, or a damaged one'),
    ('words.txt', 'no video, or a damaged one'),
    ('list.mp4', 'no video, or a damaged one'),
    ('noise.avi', 'no video, or a damaged one'),
    ('missing.mp4', r'cannot be read \(No such file or directory\)'),
    ('', r'cannot be read \(Is a directory\)'),
    (video_clips.write_sound(folder / 'sound.m4a'), 'it has no pictures, only sound'),
    (video_clips.write_sound(folder / 'sound.mp4'), 'it has no pictures, only sound'),
  ]:
    for read in (video_file.probe, lambda path: video_file.read_frames(path, [0])):
      with pytest.raises(BadImage, match=reason) as raised:
        read(folder / name)
      assert raised.value.id == str(folder / name)


def test_damaged_pictures_do_not_crash(folder):
  """Noise in the pictures: frames of the right shape, or a `BadImage`."""
  whole = pathlib.Path(video_clips.write(folder / 'clean.mp4')).read_bytes()
  start, end = whole.index(b'mdat') + 4, whole.index(b'moov') - 4
  for seed in range(20):
    rng = np.random.default_rng(seed)
    broken = bytearray(whole)
    for place in rng.integers(start, end, 40):
      broken[place] = rng.integers(256)
    (folder / 'damaged.mp4').write_bytes(broken)
    try:
      assert video_file.read_frames(folder / 'damaged.mp4', [0, 30, 59]).shape == (3, 48, 64, 3)
    except BadImage as error:
      assert error.id.endswith('damaged.mp4')
