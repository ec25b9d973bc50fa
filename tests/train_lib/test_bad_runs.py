"""What a run cannot go on with ends in one clear message, and leaves a usable workdir."""

import json
import os
import pathlib
import shutil
import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from losa_scenic.adapt_lib import methods
from losa_scenic.model_lib import presets
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.train_lib import checkpoint_files, progress
from losa_scenic.train_lib import workdir as workdir_lib
from losa_scenic.weights_lib import backbones

EVERY_SECOND = ('--config.checkpoint_steps=2', '--config.log_eval_steps=2')


def assert_refused(outcome: tuple[int, str], *parts: str) -> None:
  status, printed = outcome
  assert status == 1, printed
  assert printed.count('error: ') == 1
  assert 'Traceback' not in printed
  for part in parts:
    assert part in printed, printed


def saved(workdir: pathlib.Path, kind: str = 'last') -> list[int]:
  return sorted(int(f.name) for f in (workdir / 'checkpoints' / kind).glob('*') if f.name.isdigit())


@pytest.fixture(scope='module')
def finished_once(cli, tmp_path_factory) -> pathlib.Path:
  workdir = tmp_path_factory.mktemp('runs') / 'finished'
  status, printed = cli(*EVERY_SECOND, workdir=workdir)
  assert status == 0, printed
  return workdir


@pytest.fixture
def finished(finished_once, tmp_path) -> pathlib.Path:
  """A workdir with checkpoints at steps 2 and 4 of 4."""
  return pathlib.Path(shutil.copytree(finished_once, tmp_path / 'finished'))


MISTAKES = {
  'dataset': (['--config.dataset_name=digit'], ("'digit'", "Did you mean 'digits'")),
  'dataset option': (['--config.dataset_configs.num_train=9'], ("'digits'", "'num_train'")),
  'backbone': (['--config.backbone=tset/8'], ("'tset/8'", "Did you mean 'test/8'")),
  'backbone file': (['--config.backbone=/no/where.json'], ('/no/where.json',)),
  'pooling': (['--config.backbone_configs.pool=avg'], ("'avg'", 'gap')),
  'random weights': (['--config.random_backbone=False'], ('random weights', 'random_backbone')),
  'pack': (
    ['--config.dataset_name=image_pack', '--config.dataset_configs.root=/no/where.npz'],
    ('/no/where.npz', 'no such file'),
  ),
  'no root': (
    ['--config.dataset_name=image_pack'],
    ('image_pack', '--config.dataset_configs.root'),
  ),
  'old name of the root': (
    ['--config.dataset_name=image_pack', '--config.dataset_configs.path=/no/where.npz'],
    ("'dataset_configs.path'",),
  ),
  'root of what': (
    ['--config.dataset_name=auto', '--config.dataset_configs.root=/no/where'],
    ('/no/where', 'no such file or folder'),
  ),
  'folder': (
    ['--config.dataset_name=image_folder', '--config.dataset_configs.root=/no/where'],
    ('/no/where', 'no such file or folder'),
  ),
  'image size': (
    ['--config.dataset_configs.image_size=64'],
    ('[64, 64, 3]', 'test/8', '[32, 32, 3]'),
  ),
  'batch size': (['--config.batch_size=15'], ('batch_size 15', 'multiple of 2 devices')),
  'eval batch size': (['--config.eval_batch_size=3'], ('eval_batch_size 3', '2 devices')),
  'export': (['--config.export_backbone=x'], ('cannot be merged', 'side network')),
  'rank': (['--config.method_configs.losa.rank=0'], ('rank', '0')),
  'warm-up': (['--config.lr_configs.warmup_steps=9'], ('warmup_steps 9', 'below 4')),
  'dtype': (['--config.model_dtype_str=float31'], ("'float31'", "Did you mean 'float32'")),
  'data dtype': (['--config.data_dtype_str=uint9'], ("'uint9'", "Did you mean 'uint8'")),
  'layer loop': (['--config.layer_loop=scn'], ("'scn'", "Did you mean 'scan'")),
  'model': (['--config.model_name=clasification'], ("Did you mean 'classification'",)),
  'trainer': (['--config.trainer_name=clasification'], ("Did you mean 'classification'",)),
}


@pytest.mark.parametrize('overrides,parts', MISTAKES.values(), ids=MISTAKES.keys())
def test_refused_before_training(cli, tmp_path, overrides, parts):
  assert_refused(cli(*overrides, workdir=tmp_path / 'run'), *parts)
  assert not (tmp_path / 'run' / 'metrics.jsonl').exists()


def test_workdir_is_or_lies_under_a_file(cli, tmp_path):
  file = tmp_path / 'file'
  file.write_text('mine')
  assert_refused(cli(workdir=file), 'Cannot write to the workdir', str(file))
  assert_refused(cli(workdir=file / 'run'), 'Cannot write to the workdir', str(file / 'run'))
  assert file.read_text() == 'mine'


def test_workdir_in_use_names_host_and_process(cli, finished):
  with workdir_lib.locked(finished):
    outcome = cli(*EVERY_SECOND, workdir=finished)
  assert_refused(outcome, 'in use', socket.gethostname(), f'process {os.getpid()}')
  assert cli(*EVERY_SECOND, workdir=finished)[0] == 0


@pytest.mark.parametrize(
  'override,part',
  [
    ('--config.method=linear', 'method: "losa" -> "linear"'),
    ('--config.batch_size=32', 'batch_size: 16 -> 32'),
    ('--config.augment.flip=True', 'augment.flip: false -> true'),
  ],
)
def test_workdir_of_another_run(cli, finished, override, part):
  before = (finished / 'summary.json').read_bytes()
  outcome = cli(*EVERY_SECOND, override, workdir=finished)
  assert_refused(outcome, str(finished), part, 'another --workdir')
  assert (finished / 'summary.json').read_bytes() == before


def test_a_finished_run_again_changes_nothing_that_was_measured(cli, finished):
  curves = (finished / 'metrics.jsonl').read_bytes()
  before = json.loads((finished / 'summary.json').read_text())
  status, printed = cli(*EVERY_SECOND, workdir=finished)
  assert status == 0
  assert 'continuing from step 4' in printed
  after = json.loads((finished / 'summary.json').read_text())
  assert (finished / 'metrics.jsonl').read_bytes() == curves
  assert after == before


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('damage', ['truncate arrays', 'delete arrays', 'delete meta', 'empty'])
def test_damaged_checkpoint(cli, finished, damage):
  newest = finished / 'checkpoints' / 'last' / '4'
  if damage == 'truncate arrays':
    for file in newest.glob('*.safetensors'):
      os.truncate(file, file.stat().st_size // 2)
  elif damage == 'delete arrays':
    for file in newest.glob('*.safetensors'):
      file.unlink()
  elif damage == 'delete meta':
    (newest / 'meta.json').unlink()
  else:
    shutil.rmtree(newest)
    newest.mkdir()
  curves = (finished / 'metrics.jsonl').read_text()
  status, printed = cli(*EVERY_SECOND, workdir=finished)
  assert status == 0, printed
  assert printed.count('checkpoint 4: ') == 1
  assert 'set aside as 4.damaged, continuing from 2' in printed
  assert saved(finished) == [2, 4]

  def without_timing(text: str) -> list[dict]:
    rows = [json.loads(row) for row in text.splitlines()]
    return [{k: v for k, v in row.items() if k not in progress.MEASUREMENTS} for row in rows]

  assert without_timing((finished / 'metrics.jsonl').read_text()) == without_timing(curves)


def test_divergence_keeps_finite_checkpoints_and_has_a_status_of_its_own(cli, tmp_path):
  overrides = ('--config.optimizer=momentum', '--config.lr_configs.base_learning_rate=1e30')
  each = ('--config.checkpoint_steps=1', '--config.log_eval_steps=1', '--config.max_bad_steps=1')
  for origin in ('starting', 'continuing from step 1'):
    status, printed = cli(*overrides, *each, workdir=tmp_path)
    assert status == 3 and origin in printed
    # The warm-up begins with 0.
    for part in (
      'step 2 is dropped',
      'The step was not finite',
      'max_grad_norm',
      'step 1 is saved',
    ):
      assert part in printed, printed
    assert printed.count('error: ') == 1 and 'Traceback' not in printed
    assert saved(tmp_path) == [1]
  for kind in ('last', 'best'):
    folder = tmp_path / 'checkpoints' / kind / '1'
    leaves = json.loads((folder / 'meta.json').read_text())['leaves']
    for array in checkpoint_files.read_arrays(folder, leaves).values():
      assert np.isfinite(array.astype(float)).all()


def random_backbone(path: pathlib.Path, seed: int) -> None:
  spec = presets.preset('test/8')
  model = Adapted(
    spec=spec, method=methods.build('linear', spec), num_classes=2, dtype=jnp.float32, scan=True
  )
  params = model.init(jax.random.key(seed), jnp.zeros(model.input_shape()))['params']
  backbones.save(path, spec, params['backbone'])


def test_another_backbone_under_the_same_name(cli, tmp_path):
  file, run = tmp_path / 'vit.json', tmp_path / 'run'
  random_backbone(file, seed=0)
  overrides = (f'--config.backbone={file}', '--config.method=linear')
  assert cli(*overrides, workdir=run)[0] == 0
  random_backbone(file, seed=1)
  assert_refused(cli(*overrides, workdir=run), 'another backbone', 'sha256')
  random_backbone(file, seed=0)
  assert cli(*overrides, workdir=run)[0] == 0


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
  rng = np.random.default_rng(0)
  for part, count in (('train', 8), ('test', 3)):
    for name in ('cat', 'dog'):
      place = tmp_path / 'images' / part / name
      place.mkdir(parents=True)
      for i in range(count):
        pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f'{i}.jpg')
  return tmp_path / 'images'


def test_corrupt_image_met_during_training(cli, folder, tmp_path):
  file, run = folder / 'train' / 'dog' / '3.jpg', tmp_path / 'run'
  whole = file.read_bytes()
  file.write_bytes(whole[: len(whole) // 2])  # The header is right.
  overrides = ('--config.dataset_name=image_folder', f'--config.dataset_configs.root={folder}')
  # One of fourteen is more than one in a hundred.
  parts = (str(file), 'truncated or corrupt', 'max_bad_fraction')
  assert_refused(cli(*overrides, workdir=run), *parts)
  assert saved(run) == []
  file.write_bytes(whole)
  assert cli(*overrides, workdir=run)[0] == 0
  # More images are other data: the run would not be the same one.
  shutil.copy(file, file.with_name('9.jpg'))
  assert_refused(cli(*overrides, workdir=run), 'another data', 'num_train_examples')


def test_label_out_of_range_in_a_pack(cli, folder, tmp_path):
  images = [file.read_bytes() for file in sorted(folder.rglob('*.jpg'))[:6]]
  labels = [0, 1, 2, 0, 1, 1]
  np.savez(
    tmp_path / 'pack.npz',
    blob=np.frombuffer(b''.join(images), np.uint8),
    offsets=np.cumsum([0] + [len(image) for image in images]),
    label=np.array(labels),
    split=np.array([0, 0, 0, 1, 2, 2]),
    classes=np.array(['cat', 'dog']),
  )
  overrides = (
    '--config.dataset_name=image_pack',
    f'--config.dataset_configs.root={tmp_path}/pack.npz',
  )
  assert_refused(cli(*overrides, workdir=tmp_path / 'run'), 'image 2', "'label' is 2")
