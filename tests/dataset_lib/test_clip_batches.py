"""Batches of clips: shapes, order, conversion, mixing, and clear errors where images are meant."""

import pathlib

import numpy as np
import pytest
from PIL import Image
from reference import video_clips

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import dataset_utils, datasets, resize, sources
from losa_scenic.dataset_lib.augment import Augment
from losa_scenic.dataset_lib.clip_reader import Sampling

pytest.importorskip('av', reason="PyAV is not installed: pip install 'losa_scenic[video]'")

FRAMES, SIZE, TRAIN, TEST = 4, 12, 5, 3
DRAWN = {'square_crops': True, 'max_scale': 1.2, 'flip': True, 'color_jitter': 0.2}


@pytest.fixture(scope='module')
def root(tmp_path_factory) -> pathlib.Path:
  """Clips of two classes; clip i is a frame longer than clip i - 1."""
  folder = tmp_path_factory.mktemp('clips')
  for part, count in (('train', TRAIN), ('val', 2), ('test', TEST)):
    for i in range(count):
      path = folder / part / ('jump', 'run')[i % 2] / f'{i}.mp4'
      path.parent.mkdir(parents=True, exist_ok=True)
      video_clips.write(path, 8 + i, size=(32, 40))
  return folder


def build(root, frames=FRAMES, name='clip_folder', options=(), **more) -> dataset_utils.Dataset:
  return datasets.build_dataset(
    name,
    **{'batch_size': 4, 'eval_batch_size': 2, 'image_size': SIZE} | more,
    frames=frames,
    dataset_configs={'root': str(root)} | dict(options),
  )


def same(one, other) -> None:
  assert set(one) == set(other)
  for key in one:
    np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def test_shapes_and_meta_data(root):
  options = {'frame_stride': 2, 'num_test_clips': 2, 'num_test_crops': 3, 'short_clips': 'pad'}
  dataset = build(root, name='auto', options=options | {'central_crop': 0.9})
  meta = dataset.meta_data
  assert meta['name'] == 'clip_folder' and meta['class_names'] == ('jump', 'run')
  assert meta['input_shape'] == (-1, FRAMES, SIZE, SIZE, 3) and meta['train_crops'] is None
  assert meta['clips'] == options | {'num_frames': FRAMES, 'frames_per_second': None}
  counts = [meta[f'num_{part}_examples'] for part in ('train', 'eval', 'test')]
  assert counts == [TRAIN, 2, TEST] and set(meta['fingerprints']) == {'train', 'valid', 'test'}
  for ds, shape in (
    (dataset.train_ds, (4, FRAMES, SIZE, SIZE, 3)),
    (dataset.valid_ds, (2, FRAMES, SIZE, SIZE, 3)),
    (dataset.test_ds, (2, 6, FRAMES, SIZE, SIZE, 3)),
  ):
    batch = ds[0]
    assert batch['inputs'].shape == shape and batch['inputs'].dtype == np.uint8
    assert batch['inputs'].any()
  assert build(root).meta_data['clips']['num_test_clips'] == 1
  crops = build(root, augment=DRAWN).meta_data['train_crops']
  assert crops == {'min_scale': 1.0, 'max_scale': 1.2, 'interpolation': 'fast'}


def test_every_clip_once_an_epoch_and_once_in_an_evaluation(root):
  dataset = build(root)
  batches = list(dataset_utils.iterate(dataset.train_ds, 0, 5))
  seen = np.concatenate([batch['index'] for batch in batches]).reshape(4, TRAIN)
  assert [sorted(epoch) for epoch in seen.tolist()] == [list(range(TRAIN))] * 4
  assert len({tuple(epoch) for epoch in seen.tolist()}) > 1
  # Positions follow the folders: three clips of 'jump', then two of 'run'.
  labels = np.concatenate([batch['label'] for batch in batches])
  np.testing.assert_array_equal(labels, seen.ravel() >= 3)
  for ds, count in ((dataset.valid_ds, 2), (dataset.test_ds, TEST)):
    tested = list(dataset_utils.iterate(ds))
    indices = np.concatenate([batch['index'] for batch in tested])
    mask = np.concatenate([batch['batch_mask'] for batch in tested])
    assert indices[mask > 0].tolist() == list(range(count))
    assert (indices[mask == 0] == -1).all()


def test_batches_do_not_depend_on_where_a_run_starts_nor_on_processes(root):
  more = {'augment': DRAWN | {'mixup_alpha': 0.8}, 'shuffle_seed': 7}
  first = build(root, **more)
  expected = list(dataset_utils.iterate(first.train_ds, 0, 7))
  fresh = build(root, **more)
  same(fresh.train_ds[5], expected[5])
  resumed = build(root, options={'cache_gigabytes': 0.0}, **more).train_ds
  for ours, theirs in zip(dataset_utils.iterate(resumed, 4, 7), expected[4:], strict=True):
    same(ours, theirs)
  processes = build(root, workers=2, **more).train_ds
  for ours, theirs in zip(dataset_utils.iterate(processes, 0, 7), expected, strict=True):
    same(ours, theirs)
  halves = [build(root, host=host, hosts=2, **more).train_ds[3] for host in range(2)]
  same({k: np.concatenate([half[k] for half in halves]) for k in halves[0]}, expected[3])


def test_float32_is_scaled_and_empty_slots_are_zero(root):
  options = {'num_test_clips': 2}
  stored = build(root, options=options)
  scaled = build(root, options=options, dtype_str='float32')
  for one, other in (
    (stored.train_ds[1], scaled.train_ds[1]),
    (stored.test_ds[0], scaled.test_ds[0]),
    (stored.test_ds[1], scaled.test_ds[1]),
  ):
    assert other['inputs'].dtype == np.float32
    real = one['batch_mask'] > 0
    expected = one['inputs'][real] / np.float32(127.5) - 1
    np.testing.assert_allclose(other['inputs'][real], expected, atol=1e-6)
    assert not other['inputs'][~real].any()
  assert stored.test_ds[1]['batch_mask'].tolist() == [1, 0]


def test_broken_clips_are_listed_and_too_many_end_the_run(tmp_path, capsys):
  for part, count in (('train', 4), ('test', 2)):
    for i in range(count):
      path = tmp_path / part / 'run' / f'{i}.mp4'
      path.parent.mkdir(parents=True, exist_ok=True)
      video_clips.write(path, 5, size=(32, 40))
  for name in ('train/run/2.mp4', 'test/run/0.mp4'):
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-300])
  options = {'val_fraction': 0.0, 'max_bad_fraction': 0.5}
  dataset = build(tmp_path, options=options)
  (trained,) = dataset_utils.iterate(dataset.train_ds, 0, 1)
  assert trained['batch_mask'].all() and sorted(trained['index']) == [0, 1, 2, 3]
  (tested,) = dataset_utils.iterate(dataset.test_ds)
  assert tested['batch_mask'].tolist() == [0, 1]
  problems = dataset.train_ds.bad_files.problems.values()
  assert {(p.split, p.index, p.reason) for p in problems} == {
    ('train', 2, 'the file is truncated'),
    ('test', 0, 'the file is truncated'),
  }
  assert 'train/run/2.mp4: the file is truncated' in capsys.readouterr().err
  with pytest.raises(errors.UserError, match=r'run/2\.mp4: the file is truncated'):
    _ = build(tmp_path, options=options | {'max_bad_fraction': 0.0}).train_ds[0]


def test_clips_and_images_are_not_mistaken_for_each_other(root, tmp_path):
  message = "'clip_folder' holds clips, .*: give --config.backbone_configs.frames=N"
  with pytest.raises(errors.UserError, match=message):
    build(root, frames=0)
  with pytest.raises(errors.UserError, match=message):
    build(root, frames=0, name='auto')
  for name in ('cat', 'dog'):
    (tmp_path / name).mkdir()
    for i in range(5):
      Image.new('RGB', (8, 8)).save(tmp_path / name / f'{i}.png')
  with pytest.raises(errors.UserError, match=r"'image_folder' holds images, .* clips of 4 frames"):
    build(tmp_path, name='auto')
  with pytest.raises(errors.UserError, match=r"'digits' holds images, .* clips of 4 frames"):
    datasets.build_dataset('digits', batch_size=4, eval_batch_size=4, image_size=8, frames=4)


@pytest.mark.parametrize('option', datasets.CLIP_OPTIONS)
def test_options_of_clips_are_refused_for_images(option):
  value = {'frames_per_second': 4.0, 'short_clips': 'loop'}.get(option, 1)
  message = rf'dataset_configs\.{option} is for clips, .*backbone_configs\.frames=N'
  with pytest.raises(errors.UserError, match=message):
    datasets.build_dataset(
      'digits', batch_size=4, eval_batch_size=4, image_size=8, dataset_configs={option: value}
    )


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'num_test_crops': 2}, 'num_test_crops must be 1 or 3'),
    ({'num_test_crops': 3}, 'num_test_crops 3 needs central_crop'),
    ({'num_test_crops': 3.0}, 'num_test_crops must be of type int'),
    ({'frame_stride': 0}, 'frame_stride must be'),
    ({'frames_per_second': -1.0}, 'frames_per_second must be above 0'),
    ({'short_clips': 'repeat'}, "Unknown short_clips 'repeat'"),
    ({'frames': 4}, "option of dataset 'clip_folder' 'frames'"),
    ({'frame_strid': 4}, "'frame_strid'. Did you mean 'frame_stride'"),
  ],
)
def test_bad_options(root, options, message):
  with pytest.raises(errors.UserError, match=message):
    build(root, options=options)


class Coloured:
  """Clips of one colour each: twenty times their number."""

  def __len__(self) -> int:
    return 10

  def __getitem__(self, index: int) -> sources.Record:
    return sources.Record(np.full((6, 8, 9, 3), 20 * index, np.uint8), index, f'clip {index}')


def mixed(**options) -> dict:
  names = tuple('abcdefghij')
  pipeline = dataset_utils.Pipeline(
    10, 10, 0, 'uint8', resize.View(16), Sampling(FRAMES), Augment(**options)
  )
  splits = sources.Splits(Coloured(), None, Coloured(), names, clips=True)
  batch = dataset_utils.make_dataset(splits, pipeline).train_ds[0]
  np.testing.assert_array_equal(batch['label'], batch['index'])
  np.testing.assert_array_equal(
    batch['partner_label'], batch['index'].reshape(5, 2)[:, ::-1].ravel()
  )
  return batch


def test_mixup_shows_both_clips_by_their_shares():
  batch = mixed(mixup_alpha=1.0)
  share = batch['label_share']
  expected = 20 * (share * batch['label'] + (1 - share) * batch['partner_label'])
  for clip, value in zip(batch['inputs'], expected, strict=True):
    np.testing.assert_allclose(clip, value, atol=0.51)
  assert len(set(share)) == 10 and 0.5 <= share.min() < share.max() <= 1


def test_cutmix_pastes_the_same_box_into_all_frames():
  batch, boxes = mixed(cutmix_alpha=1.0), set()
  for clip, own, other, share in zip(
    *(batch[key] for key in ('inputs', 'label', 'partner_label', 'label_share')), strict=True
  ):
    assert set(np.unique(clip)) <= {20 * own, 20 * other}
    pasted = clip == 20 * other
    assert (pasted == pasted[:1, :, :, :1]).all()
    rows, columns = pasted[0, ..., 0].any(1), pasted[0, ..., 0].any(0)
    assert pasted[0, ..., 0].sum() == rows.sum() * columns.sum()
    assert share == pytest.approx(1 - pasted.mean())
    boxes.add(pasted[0].tobytes())
  assert len(boxes) > 5
