"""Runs on clips, from the config file to the summary, and batches of real clips."""

import json
import os
import pathlib

import jax
import numpy as np
import pytest

from losa_scenic import app
from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import dataset_utils, datasets
from losa_scenic.main import main
from losa_scenic.model_lib import presets
from losa_scenic.train_lib import run_config
from losa_scenic.train_lib.writers import MultiWriter

ROOT = pathlib.Path(__file__).parents[2]
SHARED = pathlib.Path(os.environ.get('LOSA_SHARED_DATA', ROOT.parent / 'shared' / 'data'))
FIGHT = SHARED / 'video' / 'fight'
CONFIG = ROOT / 'configs' / 'video_quickstart.py'
TINY = (
  '--config.backbone=test/8',
  '--config.random_backbone=True',
  '--config.backbone_configs.depth=1',
  '--config.batch_size=4',
  '--config.eval_batch_size=4',
  '--config.num_training_steps=3',
  '--config.lr_configs.warmup_steps=1',
  '--config.log_summary_steps=1',
)
DRAWN = ('num_train=9', 'num_val=3', 'num_test=5')
OPTIONS = tuple(f'--config.dataset_configs.{text}' for text in DRAWN)


class Notes(MultiWriter):
  """Keeps the scalars."""

  def __init__(self) -> None:
    super().__init__()
    self.rows = []

  def write_scalars(self, step, scalars):
    self.rows.append((step, dict(scalars)))


def run(workdir: pathlib.Path, *overrides: str) -> tuple[dict, list]:
  """The content of summary.json, and the scalars."""
  config, _ = app.parse(['main', f'--config={CONFIG}', *TINY, *OPTIONS, *overrides])
  writer = Notes()
  main(rng=jax.random.key(config.rng_seed), config=config, workdir=workdir, writer=writer)
  return json.loads((workdir / 'summary.json').read_text()), writer.rows


def test_the_quickstart_trains(tmp_path, capfd):
  overrides = ('--config.augment.mixup_alpha=0.4', '--config.dataset_configs.num_test_crops=3')
  overrides += ('--config.dataset_configs.central_crop=0.9',)
  summary, rows = run(tmp_path, *overrides)
  printed = capfd.readouterr().err
  assert 'data: 2 classes (right, left); 9 training, 3 validation, 5 test' in printed
  assert 'data: clips of 8 frames, one by one; shorter ones begin again; 3 views' in printed
  assert ' clips/s (' in printed and ' a device)  data ' in printed
  assert summary['dataset'] == 'moving_sprites' and summary['num_steps'] == 3
  assert summary['num_train_examples'] == 9 and summary['bad_images'] == 0
  clips = summary['preprocessing']['clips']
  assert (clips['num_frames'], clips['num_test_crops'], clips['frame_stride']) == (8, 3, 1)
  assert summary['test_accuracy'] in [pytest.approx(k / 5) for k in range(6)]
  assert [step for step, _ in rows] == [1, 2, 2, 3, 3, 3]  # Two steps are an epoch.
  assert np.isfinite([value for _, row in rows for value in row.values()]).all()


def test_an_image_backbone_is_told_how_to_take_clips(tmp_path):
  with pytest.raises(errors.UserError, match=r'give --config\.backbone_configs\.frames=8\.'):
    run(
      tmp_path,
      '--config.backbone_configs.frames=0',
      '--config.backbone_configs.factorised=False',
      '--config.method=linear',
    )


@pytest.mark.skipif(not FIGHT.is_dir(), reason=f'no clips in {FIGHT}')
@pytest.mark.parametrize('name', ['auto', 'playback'])
def test_batches_of_real_clips(name):
  pytest.importorskip('av', reason="PyAV is not installed: pip install 'losa_scenic[video]'")
  config, _ = app.parse(
    [
      'main',
      f'--config={CONFIG}:{FIGHT}',
      *TINY,
      f'--config.dataset_name={name}',
      '--config.dataset_configs.num_test_crops=3',
      '--config.dataset_configs.central_crop=1.0',
      '--config.eval_batch_size=3',
    ]
  )
  config = run_config.resolve(config)
  spec = presets.preset('test/8', frames=8, factorised=True)
  dataset, again = (datasets.of_run(config, spec) for _ in range(2))
  kinds = {'auto': ('clip_list', 2), 'playback': ('playback', 3)}[name]
  assert (dataset.meta_data['name'], dataset.meta_data['num_classes']) == kinds
  batches = [dataset.train_ds[5], dataset.valid_ds[0], dataset.test_ds[1]]
  shape = (8, spec.image_size, spec.image_size, 3)
  for batch, views in zip(batches, ((4,), (3,), (3, 3)), strict=True):
    assert batch['inputs'].shape == (*views, *shape) and batch['batch_mask'].all()
    moves = np.diff(batch['inputs'].astype(int), axis=-4)
    assert (np.abs(moves).mean((-1, -2, -3)) > 0).mean() > 0.9
  assert not dataset.train_ds.bad_files.problems
  (resumed,) = dataset_utils.iterate(again.train_ds, 5, 6)
  for key, value in batches[0].items():
    np.testing.assert_array_equal(resumed[key], value, err_msg=key)
  if name == 'playback':
    forward, backward, shuffled = batches[1]['inputs']
    np.testing.assert_array_equal(backward, forward[::-1])
    np.testing.assert_array_equal(np.sort(shuffled, axis=0), np.sort(forward, axis=0))
