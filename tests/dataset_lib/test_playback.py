"""How a clip is played as its label: three records of each clip, alike but for the order."""

import pathlib

import numpy as np
import pytest
from PIL import Image
from reference import video_clips

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import augment, clip_files, datasets, loader, playback, resize, sources
from losa_scenic.dataset_lib.clip_reader import Sampling
from losa_scenic.dataset_lib.fingerprint import fingerprint
from losa_scenic.dataset_lib.frame_sampling import Segment

pytest.importorskip('av', reason="PyAV is not installed: pip install 'losa_scenic[video]'")

FRAMES, SIZE = 6, 40


@pytest.fixture(scope='module')
def root(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('clips')
  for part, count in (('train', 3), ('val', 2), ('test', 2)):
    for i in range(count):
      path = folder / part / ('jump', 'run')[i % 2] / f'{part}{i}.mp4'
      path.parent.mkdir(parents=True, exist_ok=True)
      video_clips.write(path, 30 + i)
  return folder


def build(root, **options):
  return datasets.build_dataset(
    'playback',
    batch_size=9,
    eval_batch_size=6,
    image_size=SIZE,
    frames=FRAMES,
    dataset_configs={'root': str(root), 'frame_stride': 2} | options,
  )


def shown(batch) -> dict[int, list[int]]:
  """Position -> which frames are shown."""
  return {
    int(index): video_clips.numbers(clip)
    for index, clip in zip(batch['index'], batch['inputs'], strict=True)
  }


def test_every_clip_is_there_in_each_order():
  segments = [Segment(), Segment(1.0, 2.0)]
  files = clip_files.ClipFiles('x', ('a.mp4', 'b.mp4'), (4, 2), num_classes=5, segments=segments)
  source = playback.Playback(files)
  assert len(source) == 6
  for index in range(6):
    image, label, name = source[index]
    assert label == index % 3
    assert image == files[index // 3].image._replace(order=playback.CLASSES[label])
    assert name == f'{files[index // 3].id} ({("forward", "backward", "shuffled")[label]})'


def test_splits_are_those_of_the_clips(root):
  splits = playback.splits(root=str(root), frames=FRAMES)
  own = datasets.open_splits('auto', SIZE, {'root': str(root)})[1]
  assert splits.clips and splits.class_names == ('forward', 'backward', 'shuffled')
  for part in ('train', 'valid', 'test'):
    ours, theirs = getattr(splits, part), getattr(own, part)
    assert len(ours) == 3 * len(theirs) and ours[0].image.path == theirs[0].image.path
  assert splits.about[:-1] == own.about and splits.about[-1].startswith('labels: how each clip is')


def test_evaluation_shows_the_same_frames_in_three_orders(root):
  dataset = build(root)
  assert dataset.meta_data['num_test_examples'] == 6
  batch = dataset.test_ds[0]
  windows = shown(batch)
  assert batch['label'].tolist() == [0, 1, 2, 0, 1, 2]
  for first in (0, 3):
    forward, backward, shuffled = (windows[first + k] for k in range(3))
    start = (30 + first // 3 - 11) // 2
    assert forward == list(range(start, start + 12, 2)) and backward == forward[::-1]
    assert sorted(shuffled) == forward and shuffled not in (forward, backward)
  again = build(root).test_ds[0]
  np.testing.assert_array_equal(batch['inputs'], again['inputs'])


def test_every_view_is_in_its_order(root):
  views = build(root, num_test_clips=2).test_ds[0]['inputs'][:3]
  windows = [[video_clips.numbers(view) for view in clip] for clip in views]
  forward = [list(range(start, start + 12, 2)) for start in (0, 19)]
  assert windows[:2] == [forward, [window[::-1] for window in forward]]
  assert [sorted(window) for window in windows[2]] == forward and windows[2] != forward


def test_training_draws_windows_and_orders_anew(root):
  dataset, seen = build(root), []
  for epoch in range(8):
    windows = shown(dataset.train_ds[epoch])  # A batch is an epoch.
    for index, window in windows.items():
      kind, places = index % 3, sorted(window)
      assert places == list(range(places[0], places[0] + 12, 2))
      assert (window == places) == (kind == 0) and (window == places[::-1]) == (kind == 1)
    seen.append(windows)
  assert sorted(seen[0]) == list(range(9))
  for index in range(9):
    windows = [epoch[index] for epoch in seen]
    assert len({min(window) for window in windows}) > 3
    shuffles = {tuple(np.argsort(window)) for window in windows}
    assert len(shuffles) > 5 if index % 3 == 2 else len(shuffles) == 1
  # With a cache or without, from any step on.
  late = build(root, cache_gigabytes=0.0).train_ds[5]
  assert shown(late) == seen[5]


def test_the_order_takes_nothing_from_the_augmentation(root):
  """What is drawn for a clip is drawn for it whatever its order is."""
  clip = clip_files.Clip(str(root / 'train' / 'run' / 'train1.mp4'))

  class Same:
    def __init__(self, order: str) -> None:
      self.order = order

    def __len__(self) -> int:
      return 1

    def __getitem__(self, index: int) -> sources.Record:
      return sources.Record(clip._replace(order=self.order), 0, 'clip')

  drawn = augment.Augment(square_crops=True, max_scale=1.3, flip=True, color_jitter=0.5)
  made = [
    loader.Loader(Same(order), resize.View(SIZE), sampling=Sampling(FRAMES), augment=drawn)
    for order in playback.CLASSES
  ]
  for epoch in range(4):
    clips = [m.batch(np.array([0]), np.array([epoch]))['inputs'][0] for m in made]
    frames = [sorted(frame.tobytes() for frame in clip) for clip in clips]
    assert frames[0] == frames[1] == frames[2] and len(set(frames[0])) == FRAMES
    np.testing.assert_array_equal(clips[1], clips[0][::-1])


def test_what_is_shuffled_is_never_in_order(root):
  """Of the 24 orders of four frames two are those of the other classes."""
  clips = playback.splits(root=str(root), frames=4).train
  made, orders = loader.Loader(clips, resize.View(SIZE), sampling=Sampling(4, 4)), set()
  for epoch in range(150):
    clip = made.batch(np.array([2]), np.array([epoch]))['inputs'][0]
    orders.add(tuple(np.argsort(video_clips.numbers(clip)).tolist()))
  assert len(orders) == 22 and not orders & {(0, 1, 2, 3), (3, 2, 1, 0)}


def test_three_frames_have_too_few_orders(root):
  with pytest.raises(errors.UserError, match='frames must be an integer of at least 4, not 3'):
    playback.splits(root=str(root), frames=3)
  with pytest.raises(errors.UserError, match=r'give --config\.backbone_configs\.frames=8'):
    datasets.open_splits('playback', SIZE, {'root': str(root)})


def test_every_name_counts_in_the_fingerprint(root):
  names = [f'{i}.mp4' for i in range(7)]
  prints = [
    fingerprint(playback.Playback(clip_files.ClipFiles('x', files, [0] * 7, num_classes=1)))
    for files in (names, names, [*names[:2], 'other.mp4', *names[3:]])
  ]
  assert prints[0] == prints[1] != prints[2]
  files = clip_files.ClipFiles('x', names, [0] * 7, num_classes=1)
  assert fingerprint(files) != prints[0]


def test_images_are_refused(tmp_path):
  for name in ('cat', 'dog'):
    (tmp_path / name).mkdir()
    for i in range(5):
      Image.new('RGB', (8, 8)).save(tmp_path / name / f'{i}.png')
  with pytest.raises(errors.UserError, match=r"holds images \('image_folder'\); .* for clips"):
    playback.splits(root=str(tmp_path), frames=FRAMES)
  with pytest.raises(errors.UserError, match=r"holds images \('image_folder'\); .* for clips"):
    playback.splits(root=str(tmp_path), frames=FRAMES, of='image_folder')
  with pytest.raises(
    errors.UserError, match=r"Unknown dataset 'clip_foldr'\. Did you mean 'clip_f"
  ):
    playback.splits(root=str(tmp_path), frames=FRAMES, of='clip_foldr')
  for root in (None, str(tmp_path / 'nowhere')):
    with pytest.raises(errors.UserError, match=r'--?config\.dataset_configs\.root'):
      playback.splits(root=root, frames=FRAMES)


def test_clips_in_memory_are_refused():
  class Pixels:
    def __len__(self) -> int:
      return 1

    def __getitem__(self, index: int) -> sources.Record:
      return sources.Record(np.zeros((4, 8, 8, 3), np.uint8), 0, 'clip[0]')

  with pytest.raises(errors.UserError, match=r'^clip\[0\]: playback is for clips in video files'):
    _ = playback.Playback(Pixels())[2]


def test_playback_of_sets_that_have_no_files():
  def opened(of):
    return datasets.open_splits('playback', 16, {'root': '/nowhere', 'of': of}, frames=4)

  with pytest.raises(errors.UserError, match=r"dataset 'moving_sprites'.*'root'"):
    opened('moving_sprites')
  with pytest.raises(errors.UserError, match="'of' must be another set"):
    opened('playback')
  with pytest.raises(errors.UserError, match=r"'clip_foldr'\. Did you mean 'clip_folder'"):
    opened('clip_foldr')
