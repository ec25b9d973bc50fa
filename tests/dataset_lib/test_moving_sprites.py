"""Moving sprites: the order of the frames tells the class, and nothing else does."""

import numpy as np
import pytest

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import datasets, moving_sprites
from losa_scenic.dataset_lib.moving_sprites import LABELS, MovingSprites, order

SIZE, FRAMES = 32, 8


def source(label='direction', count=40, size=SIZE) -> MovingSprites:
  return MovingSprites(label, 0, count, FRAMES, size, seed=0)


def across(pixels: np.ndarray) -> np.ndarray:
  """Where the shape is, from left to right, in image sides: [t]."""
  weight = pixels[..., 0].astype(float).sum(1)
  places = (np.arange(pixels.shape[2]) + 0.5) / pixels.shape[2]
  return weight @ places / weight.sum(1)


def orders(label: str, value: int, count: int, draws: int = 400) -> list[list[int]]:
  rng = np.random.RandomState(0)
  return [order(rng, label, value, count).tolist() for _ in range(draws)]


@pytest.mark.parametrize('label', LABELS)
@pytest.mark.parametrize('count', [4, 5, 8, 16])
def test_every_place_is_taken_once_in_every_class(label, count):
  for value in (0, 1):
    for places in orders(label, value, count, 50):
      assert sorted(places) == list(range(count))


@pytest.mark.parametrize('count', [4, 5, 8])
def test_the_orders_of_the_classes(count):
  forward, backward = list(range(count)), list(range(count))[::-1]
  assert orders('direction', 0, count, 5) == [forward] * 5
  assert orders('direction', 1, count, 5) == [backward] * 5
  quick = [*range(0, count, 2), *range(1, count, 2)]
  for label, value, allowed in (
    ('order', 0, (forward, backward)),
    ('speed', 0, (forward, backward)),
    ('speed', 1, (quick, quick[::-1])),
  ):
    drawn = orders(label, value, count)
    assert all(places in allowed for places in drawn)
    assert 0.4 < np.mean([places == allowed[0] for places in drawn]) < 0.6


def test_what_is_shuffled_is_never_in_order():
  drawn = orders('order', 1, 4, 2000)
  assert all(len(set(np.diff(places))) > 1 for places in drawn)
  # Of the 24 orders of four places two are in order; all others occur, about equally often.
  counts = np.unique(drawn, axis=0, return_counts=True)[1]
  assert len(counts) == 22 and counts.min() > 50 and counts.max() < 140
  assert len({tuple(places) for places in orders('order', 1, 8)}) > 390


@pytest.mark.parametrize('label', ['direction', 'speed'])
def test_the_same_clip_in_the_other_class_has_the_same_frames(label):
  ours, theirs = source(label), source(label)
  theirs.labels = 1 - theirs.labels
  for index in range(8):
    one, other = ours[index], theirs[index]
    assert {one.label, other.label} == {0, 1}
    assert np.any(one.image != other.image)
    frames = [sorted(frame.tobytes() for frame in clip.image) for clip in (one, other)]
    assert frames[0] == frames[1] and len(set(frames[0])) == FRAMES
    if label == 'direction':
      np.testing.assert_array_equal(one.image, other.image[::-1])


@pytest.mark.parametrize('label', LABELS)
def test_frames_alone_are_distributed_alike_in_both_classes(label):
  clips = source(label, 240, size=64)
  lengths, middles, sizes = ([[], []] for _ in range(3))
  for index in range(240):
    pixels, value, _ = clips[index]
    places = across(pixels)
    np.testing.assert_allclose(np.diff(np.sort(places)), np.ptp(places) / 7, atol=0.005)
    lengths[value].append(np.ptp(places))
    middles[value].append(places.mean())
    sizes[value].append(pixels.mean())
    area = pixels[..., 0].astype(float).sum((1, 2))
    np.testing.assert_allclose(area, area.mean(), rtol=0.05)  # Nothing is cut off.
  for values, spread in ((lengths, 0.2), (middles, 0.3), (sizes, 8.0)):
    for quantile in (0.25, 0.5, 0.75):
      one, other = (np.quantile(of_class, quantile) for of_class in values)
      assert abs(one - other) < 0.2 * spread


def test_pixels_follow_the_class():
  for index in range(6):
    pixels, label, name = source()[index]
    assert pixels.shape == (FRAMES, SIZE, SIZE, 3) and pixels.dtype == np.uint8
    assert name == f'moving_sprites[{index}]' and LABELS['direction'] == ('right', 'left')
    steps = np.diff(across(pixels))
    assert (steps < 0).all() if label else (steps > 0).all()
    height = pixels[..., 0].astype(float).sum(2) @ np.arange(SIZE)
    height /= pixels[..., 0].astype(float).sum((1, 2))
    assert np.ptp(height) < 0.15  # The line is level.


@pytest.mark.parametrize('label', LABELS)
def test_the_same_number_is_the_same_clip(label):
  def clips(**counts):
    return moving_sprites.splits(image_size=SIZE, frames=FRAMES, label=label, **counts)

  one = clips(num_train=6, num_val=3, num_test=5)
  other = clips(num_train=9, num_val=0, num_test=4)
  assert other.valid is None and one.clips and one.class_names == LABELS[label]

  def by_name(splits):
    parts = [part for part in (splits.train, splits.valid, splits.test) if part is not None]
    records = [part[i] for part in parts for i in range(len(part))]
    found = {name: (image, label) for image, label, name in records}
    assert len(found) == len(records)
    return found

  ours, theirs = by_name(one), by_name(other)
  assert len(ours) == 14 and len(theirs) == 13 and set(theirs) < set(ours)
  for name, (image, value) in theirs.items():
    np.testing.assert_array_equal(image, ours[name][0])
    assert value == ours[name][1]
  reseeded = clips(num_train=6, num_val=3, num_test=5, seed=1)
  assert np.any(reseeded.train[0].image != one.train[0].image)


def test_labels_are_balanced_in_every_split():
  for counts in ((7, 3, 5), (8, 2, 4), (5, 0, 9)):
    splits = moving_sprites.splits(
      image_size=8,
      frames=4,
      **dict(zip(('num_train', 'num_val', 'num_test'), counts, strict=True)),
    )
    for part in (splits.train, splits.valid, splits.test):
      if part is not None:
        assert abs(np.bincount(part.labels, minlength=2) @ [1, -1]) <= 1
        assert [part[i].label for i in range(len(part))] == part.labels.tolist()


def build(frames=FRAMES, options=()):
  return datasets.build_dataset(
    'moving_sprites',
    batch_size=4,
    eval_batch_size=4,
    image_size=16,
    frames=frames,
    dataset_configs={'num_train': 6, 'num_val': 2, 'num_test': 3} | dict(options),
  )


def test_batches_show_whole_clips():
  dataset = build()
  assert dataset.meta_data['class_names'] == ('right', 'left')
  drawn = moving_sprites.splits(image_size=16, frames=FRAMES, num_train=6, num_val=2, num_test=3)
  for ds, part in ((dataset.train_ds, drawn.train), (dataset.test_ds, drawn.test)):
    batch = ds[0]
    for clip, label, index in zip(batch['inputs'], batch['label'], batch['index'], strict=True):
      if index >= 0:
        np.testing.assert_array_equal(clip, part[int(index)].image)
        assert label == part[int(index)].label


@pytest.mark.parametrize(
  ('frames', 'options', 'message'),
  [
    (0, {}, r"'moving_sprites' draws clips, .* give --config\.backbone_configs\.frames=8\.$"),
    (3, {}, 'frames must be an integer of at least 4, not 3'),
    (8, {'label': 'directon'}, "label of dataset 'moving_sprites' 'directon'. Did you mean 'dir"),
    (8, {'num_train': -1}, 'num_train must be an integer of at least 0, not -1'),
    (8, {'seed': -1}, 'seed must be an integer of at least 0, not -1'),
    (8, {'num_train': 0}, 'the train split is empty'),
    (8, {'num_test': 0}, 'the test split is empty'),
    (8, {'frames': 8}, "option of dataset 'moving_sprites' 'frames'"),
    (8, {'frames_per_second': 5.0}, r'makes clips of 8 frames, .* leave out dataset_configs\.'),
    (8, {'frame_stride': 2}, r'makes clips of 8 frames, .* leave out dataset_configs\..*frame_str'),
  ],
)
def test_mistakes(frames, options, message):
  with pytest.raises(errors.UserError, match=message):
    _ = build(frames, options).train_ds[0]


@pytest.mark.parametrize('label', LABELS)
def test_only_what_may_be_mirrored_is(label):
  def flipped():
    return datasets.build_dataset(
      'moving_sprites',
      batch_size=8,
      eval_batch_size=4,
      image_size=16,
      frames=FRAMES,
      dataset_configs={'label': label, 'num_train': 8, 'num_val': 0, 'num_test': 3},
      augment={'flip': True},
    )

  if label == 'direction':
    with pytest.raises(errors.UserError, match=r'left and right tell classes apart, .*flip'):
      flipped()
  else:
    assert flipped().train_ds[0]['inputs'].any()


@pytest.mark.parametrize(
  ('options', 'augment', 'message'),
  [
    ({'frame_stride': 2}, {}, r'shown as they are: leave out dataset_configs\.frame_stride\.'),
    ({'num_test_clips': 4, 'short_clips': 'pad'}, {}, r'configs\.short_clips, num_test_clips\.'),
    ({'frames_per_second': 4.0}, {}, r'leave out dataset_configs\.frames_per_second\.'),
    ({'num_test_crops': 3}, {}, 'num_test_crops 3 needs central_crop'),
    ({'label': 'direction'}, {'flip': True}, 'left and right tell classes apart'),
  ],
)
def test_settings_that_would_spoil_the_clips_are_refused(options, augment, message):
  settings = {'batch_size': 2, 'eval_batch_size': 2, 'image_size': 16, 'frames': 8}
  with pytest.raises(errors.UserError, match=message):
    datasets.build_dataset('moving_sprites', dataset_configs=options, augment=augment, **settings)


def test_speed_has_no_left_and_right():
  settings = {'batch_size': 2, 'eval_batch_size': 2, 'image_size': 16, 'frames': 8}
  dataset = datasets.build_dataset(
    'moving_sprites', dataset_configs={'label': 'speed'}, augment={'flip': True}, **settings
  )
  assert dataset.train_ds[0]['inputs'].shape == (2, 8, 16, 16, 3)
