"""Folders of clips: layouts, splits, and errors that speak of clips."""

import pathlib
import pickle

import pytest
from reference import video_clips

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import clip_files, clip_folder, datasets, image_folder, video_file
from losa_scenic.dataset_lib.frame_sampling import WHOLE


def touch(root: pathlib.Path, *names: str) -> None:
  """Nothing opens these: they may be empty."""
  for name in names:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).touch()


def load(root, **options):
  return clip_folder.splits(root=str(root), **options)


def test_split_folders(tmp_path):
  touch(tmp_path, 'train/run/a.mp4', 'train/run/B.WebM', 'train/jump/c.avi', 'train/jump/.hidden')
  touch(tmp_path, 'val/run/d.mov', 'test/jump/e.mkv', 'test/run/f.ts', 'README.md')
  splits = load(tmp_path)
  assert splits.clips and splits.class_names == ('jump', 'run')
  records = [splits.train[i] for i in range(3)]
  assert [(pathlib.Path(r.id).name, r.label) for r in records] == [
    ('c.avi', 0),
    ('B.WebM', 1),
    ('a.mp4', 1),
  ]
  path = str(tmp_path / 'train' / 'jump' / 'c.avi')
  assert records[0].image == clip_files.Clip(path, WHOLE) and records[0].id == path
  assert [len(part) for part in (splits.valid, splits.test)] == [1, 2]
  assert splits.about == (
    f'train: 3 clips in {tmp_path}/train',
    f'val: 1 clips in {tmp_path}/val',
    f'test: 2 clips in {tmp_path}/test',
  )
  assert pickle.loads(pickle.dumps(splits.test))[1] == splits.test[1]


def test_class_folders_are_split_as_those_of_images_are(tmp_path):
  touch(tmp_path / 'clips', *(f'{name}/{i}.gif' for name in ('run', 'jump') for i in range(20)))
  splits = load(tmp_path / 'clips', val_fraction=0.1, split_seed=3)
  images = image_folder.splits(root=str(tmp_path / 'clips'), val_fraction=0.1, split_seed=3)
  for clips, others in zip(
    (splits.train, splits.valid, splits.test),
    (images.train, images.valid, images.test),
    strict=True,
  ):
    assert [clips[i].id for i in range(len(clips))] == [others[i].id for i in range(len(others))]
  assert not images.clips
  assert splits.about[1] == 'test: 8 clips split off train (test_fraction 0.2, split_seed 3)'


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('train/run/x.jpg', r'train/run/x\.jpg: not a clip; class folders may hold \.mp4, .*\.ogv\.$'),
    ('train/stray.mp4', r'train/stray\.mp4: a clip outside the class folders'),
    ('train/run/more/x.mp4', 'a folder inside a class folder; clips lie in it'),
    ('test/runn/x.mp4', r"test/runn \(not in train\): 'runn'\. Did you mean 'run'"),
  ],
)
def test_wrong_files(tmp_path, name, message):
  touch(tmp_path, 'train/run/a.mp4', 'train/run/b.mp4', 'train/run/c.mp4', name)
  with pytest.raises(errors.UserError, match=message):
    load(tmp_path)


def test_other_mistakes(tmp_path):
  with pytest.raises(errors.UserError, match=r"'clip_folder' needs .*root=PATH"):
    clip_folder.splits()
  touch(tmp_path, 'run/a.mp4', 'run/b.mp4')
  with pytest.raises(errors.UserError, match=r"'run': 2 clips are too few.*Add clips"):
    load(tmp_path)
  touch(tmp_path, 'run/c.mp4')
  with pytest.raises(errors.UserError, match='there are no test clips'):
    load(tmp_path, test_fraction=0)


def test_real_clips_are_read(tmp_path):
  pytest.importorskip('av', reason="PyAV is not installed: pip install 'losa_scenic[video]'")
  for name in ('run', 'jump'):
    (tmp_path / name).mkdir()
    for i in range(3):
      video_clips.write(tmp_path / name / f'{i}.mp4', 5 + i)
  name, splits = datasets.open_splits('auto', 32, {'root': str(tmp_path), 'val_fraction': 0})
  assert name == 'clip_folder' and splits.valid is None
  for source in (splits.train, splits.test):
    for clip, _, id in (source[i] for i in range(len(source))):
      frames = video_file.read_frames(clip.path, [4, 0])
      assert video_clips.numbers(frames) == [4, 0]
      assert video_file.probe(clip.path).frames == 5 + int(pathlib.Path(id).stem)
