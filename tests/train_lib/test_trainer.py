"""The train loop as a function: what it asks of a writer, in which order, and what it returns."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from losa_scenic import app
from losa_scenic.common_lib import errors
from losa_scenic.main import main
from losa_scenic.train_lib import checkpoints, loop, progress
from losa_scenic.weights_lib import backbones, checkpoint

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'backbones'


class CluWriter:
  """The interface of clu's writers, which have no `rewind`; notes what happens."""

  def __init__(self):
    self.calls, self.rows = [], []

  def write_scalars(self, step, scalars):
    self.calls.append('write')
    self.rows.append((step, dict(scalars)))

  def write_images(self, step, images):
    self.calls.append('write')

  def write_texts(self, step, texts):
    self.calls.append('write')

  def write_hparams(self, hparams):
    self.calls.append('write')

  def flush(self):
    self.calls.append('flush')

  def close(self):
    self.calls.append('close')


EACH_SECOND = tuple(
  f'--config.{name}_steps=2' for name in ('checkpoint', 'log_eval', 'log_summary')
)


@pytest.fixture
def trained(tiny, tmp_path, monkeypatch) -> tuple[CluWriter, object]:
  writer = CluWriter()
  save = checkpoints.Checkpoints.save

  def noted(self, state, notes):
    writer.calls.append('save')
    save(self, state, notes)

  monkeypatch.setattr(checkpoints.Checkpoints, 'save', noted)
  config, _ = app.parse(['main', *tiny, *EACH_SECOND])
  main(rng=jax.random.key(0), config=config, workdir=tmp_path, writer=writer)
  return writer, tmp_path


def test_a_clu_writer_is_enough_and_is_flushed_before_each_checkpoint(trained):
  writer, workdir = trained
  saves = [i for i, call in enumerate(writer.calls) if call == 'save']
  assert len(saves) == 2
  assert all(writer.calls[i - 1] == 'flush' for i in saves)
  assert 'write' not in writer.calls[saves[-1] :]  # The last checkpoint stands for everything.
  assert writer.calls[-1] == 'close'
  steps = [(step, next(iter(row)).split('_')[0]) for step, row in writer.rows]
  assert steps == [(2, 'train'), (2, 'valid'), (4, 'train'), (4, 'valid'), (4, 'test')]
  timing = set(progress.MEASUREMENTS) - {'mfu', 'tflops_per_device', 'device_memory_gb'}
  logged = (
    {'learning_rate', 'epoch'}
    | timing
    | {f'train_{name}' for name in ('loss', 'accuracy', 'l2_grads', 'l2_params', 'l2_updates')}
  )
  assert writer.rows[0][1].keys() == logged
  assert np.isfinite(list(writer.rows[2][1].values())).all()
  summary = json.loads((workdir / 'summary.json').read_text())
  assert summary['test_accuracy'] == writer.rows[-1][1]['test_accuracy']
  assert summary['resumed_from_step'] is None
  assert summary['num_steps'] == 4
  assert summary['backbone_facts'] == {}
  assert 0 <= summary['input_wait'] <= 1
  assert summary['bad_images'] == 0 and not (workdir / 'bad_files.csv').exists()
  assert summary['data'] == [] and summary['dataset'] == 'digits'
  preprocessing = summary['preprocessing']
  assert (preprocessing['interpolation'], preprocessing['central_crop']) == ('bicubic', None)


@pytest.fixture(scope='module')
def bare(tmp_path_factory):
  """A public checkpoint without a config.json."""
  folder = tmp_path_factory.mktemp('bare')
  shutil.copy(GOLDEN / 'timm_vit_clip_quickgelu' / 'model.safetensors', folder)
  return folder


def test_a_run_says_what_was_guessed_of_its_backbone(cli, bare, tmp_path):
  status, printed = cli(
    f'--config.backbone={bare}',
    '--config.backbone_configs.activation=quick_gelu',
    '--config.backbone_configs.heads=2',
    '--config.method=linear',
    workdir=tmp_path,
  )
  assert status == 0, printed
  line = next(line for line in printed.splitlines() if line.startswith('backbone '))
  assert line.startswith(f'backbone {bare}: timm; by convention: ')
  assert 'mean 0.481455/0.45782' in line and 'norm_eps 1e-05' in line
  assert 'heads' not in line and 'width' not in line
  assert [line for line in printed.splitlines() if line.startswith('data: ')] == [
    'data: 10 classes (0, 1, 2, 3, 4, ...); 800 training, 200 validation, 797 test',
    'data: the whole image to 12 x 12, bicubic; '
    'mean 0.481455/0.457827/0.408211, std 0.26863/0.261303/0.275777',
  ]
  facts = json.loads((tmp_path / 'summary.json').read_text())['backbone_facts']
  assert facts['heads'] == 'given' and facts['mean'] == 'convention'
  assert set(facts.values()) == {'given', 'convention'}


def test_what_cannot_be_exported_is_said_before_training(cli, bare, tmp_path):
  status, printed = cli(
    f'--config.backbone={bare}',
    '--config.backbone_configs.activation=quick_gelu',
    '--config.backbone_configs.heads=2',
    '--config.method=ssf',
    f'--config.export_backbone={tmp_path / "out.json"}',
    workdir=tmp_path / 'run',
  )
  assert status == 1 and "adds a bias at 'patch'" in printed
  assert 'loss' not in printed and not (tmp_path / 'run' / 'summary.json').exists()


def test_a_summary_is_written_before_an_export_that_fails(cli, tmp_path, monkeypatch):
  def fails(*_, **__):
    raise errors.UserError('The disk is full.')

  monkeypatch.setattr(backbones, 'save', fails)
  status, printed = cli(
    f'--config.export_backbone={tmp_path / "out.json"}', '--config.method=lora', workdir=tmp_path
  )
  assert status == 1 and 'The disk is full.' in printed
  assert json.loads((tmp_path / 'summary.json').read_text())['num_steps'] == 4


def test_weights_are_not_held_during_training(tiny, bare, tmp_path, monkeypatch):
  held = []
  original = loop.Loop.run

  def noted(self):
    weights = self._program.model.backbone.weights
    held.append(isinstance(weights, checkpoint.Checkpoint))
    return original(self)

  monkeypatch.setattr(loop.Loop, 'run', noted)
  overrides = ('activation=quick_gelu', 'heads=2')
  overrides = [f'--config.backbone_configs.{text}' for text in overrides]
  overrides += [f'--config.backbone={bare}', '--config.method=linear']
  config, _ = app.parse(['main', *tiny, *overrides])
  main(rng=jax.random.key(0), config=config, workdir=tmp_path, writer=CluWriter())
  assert held == [False]
  assert json.loads((tmp_path / 'summary.json').read_text())['backbone_sha256']
