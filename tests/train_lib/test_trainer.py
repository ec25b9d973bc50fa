"""The train loop as a function: what it asks of a writer, in which order, and what it returns."""

import json

import jax
import numpy as np
import pytest

from losa_scenic import app
from losa_scenic.main import main
from losa_scenic.train_lib import checkpoints


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


@pytest.fixture
def trained(tiny, tmp_path, monkeypatch) -> tuple[CluWriter, object]:
  writer = CluWriter()
  save = checkpoints.Checkpoints.save

  def noted(self, state):
    writer.calls.append('save')
    save(self, state)

  monkeypatch.setattr(checkpoints.Checkpoints, 'save', noted)
  config, _ = app.parse(['main', *tiny, '--config.checkpoint_steps=2', '--config.log_eval_steps=2'])
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
  logged = {'learning_rate', 'epoch', 'img/sec'} | {
    f'train_{name}' for name in ('loss', 'accuracy', 'l2_grads', 'l2_params', 'l2_updates')
  }
  assert writer.rows[0][1].keys() == logged
  assert np.isfinite(list(writer.rows[2][1].values())).all()
  summary = json.loads((workdir / 'summary.json').read_text())
  assert summary['test_accuracy'] == writer.rows[-1][1]['test_accuracy']
  assert summary['resumed_from_step'] is None
  assert summary['num_steps'] == 4
