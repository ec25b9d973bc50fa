"""Faults of whole runs: what the user is told, with which status a run ends, and what is kept."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from faults.campaign import Campaign
from faults.processes import ROOT

from losa_scenic.train_lib import checkpoint_files, loop
from losa_scenic.train_lib import workdir as workdir_lib

STEPS = 12


@pytest.fixture(scope='module')
def campaign(tmp_path_factory) -> Campaign:
  """Starts runs on a folder of images; 'whole' has ended and was left alone."""
  made = Campaign(tmp_path_factory.mktemp('runs'), steps=STEPS, seed=0)
  made.finish('whole', *OVERRIDES)
  return made


OVERRIDES = ('--config.log_eval_steps=6', '--config.eval_batch_size=1')


def wait_for(condition, process: subprocess.Popen, seconds: float = 60) -> None:
  end = time.monotonic() + seconds
  while not condition():
    assert process.poll() is None and time.monotonic() < end
    time.sleep(0.005)


def newest(workdir: pathlib.Path) -> int:
  return checkpoint_files.steps(workdir / 'checkpoints' / 'last')[-1]


def notes(workdir: pathlib.Path) -> dict:
  folder = workdir / 'checkpoints' / 'last' / str(newest(workdir))
  return json.loads((folder / 'meta.json').read_text())['notes']


def test_sigterm_in_an_evaluation_saves_at_once_and_the_evaluation_comes_again(campaign):
  workdir = campaign.root / 'broken'
  process = campaign.start('broken', *OVERRIDES, '--config.checkpoint_steps=100')
  wait_for(lambda: len(campaign.seen('broken')) == 6, process)
  time.sleep(0.05)  # Of a step and an evaluation that is yet to be compiled.
  process.send_signal(signal.SIGTERM)
  assert process.wait(30) == 143
  assert newest(workdir) == 6 and notes(workdir)['evaluated'] is False
  process = campaign.start('broken', *OVERRIDES, '--config.checkpoint_steps=100')
  assert process.wait(60) == 0
  assert campaign.rows('broken') == campaign.rows('whole')
  assert [row['step'] for row in campaign.seen('broken')] == list(range(1, STEPS + 1))


def test_sigterm_while_the_input_hangs(campaign, tmp_path):
  images = shutil.copytree(campaign.root / 'images', tmp_path / 'images')
  workdir, log = tmp_path / 'run', tmp_path / 'log'
  program = tmp_path / 'hang.py'
  # After the data set is opened, as when a network drive goes away.
  program.write_text(
    'import os, pathlib, sys\n'
    'from losa_scenic import app, main\n'
    'from losa_scenic.train_lib import trainer\n'
    'train = trainer.train\n'
    'def late(**given):\n'
    '  (name,) = given["dataset"].train_ds.names([int(sys.argv[1])])\n'
    '  path = pathlib.Path(given["config"].dataset_configs.root, name)\n'
    '  path.unlink(); os.mkfifo(path)\n'
    '  return train(**given)\n'
    'trainer.TRAINERS["classification"] = late\n'
    'app.run(main.main, [sys.argv[0], *sys.argv[2:]], ends_process=True)\n'
  )
  arguments = campaign.arguments('x')
  seen = campaign.seen('whole')
  # An image that is first seen in the middle of the run.
  early = {i for row in seen[:6] for i in row['positions']}
  late = next(i for row in seen[6:] for i in row['positions'] if i not in early)
  command = [sys.executable, str(program), str(late), *arguments]
  command += [
    f'--config.dataset_configs.root={images}',
    f'--workdir={workdir}',
    '--config.watchdog_seconds=1',
    '--config.checkpoint_steps=100',
  ]
  with log.open('wb') as file:
    process = subprocess.Popen(
      command, env=campaign.environment, cwd=ROOT, stdout=file, stderr=file
    )
  told = f'training image {late} ({images}'
  wait_for(lambda: told in log.read_text().split('nothing has moved')[-1], process)
  process.send_signal(signal.SIGTERM)
  assert process.wait(30) == 143, log.read_text()
  assert newest(workdir) >= 6
  assert f'step {newest(workdir)} is saved' in log.read_text()


def test_a_second_run_is_refused_before_it_reads_any_data(campaign, tmp_path):
  process = campaign.start('live', '--config.num_training_steps=100000')
  wait_for(lambda: len(campaign.seen('live')) > 1, process)
  arguments = [a for a in campaign.arguments('live') if 'root=' not in a]
  second = subprocess.run(
    [sys.executable, '-m', 'losa_scenic.main', *arguments, '--config.dataset_configs.root=/no'],
    env=campaign.environment,
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert second.returncode == 1
  assert f'is in use by a live run (host {os.uname().nodename}, process {process.pid})' in (
    second.stderr
  )
  assert '/no' not in second.stderr.split('error:')[1].replace(str(campaign.root), '')
  process.kill()
  process.wait()
  workdir_lib.check_free(campaign.root / 'live')


def test_a_full_disk_ends_a_run_with_one_line_and_loses_nothing(campaign, tmp_path):
  disk = tmp_path / 'disk'
  disk.mkdir()
  mount = f'mount -t tmpfs -o size=900k tmpfs {disk}'
  apart = ['unshare', '-m'] if os.geteuid() == 0 else ['unshare', '-Urm']
  try:
    if subprocess.run([*apart, 'sh', '-c', mount], capture_output=True).returncode:
      pytest.skip('mounting a tmpfs is not allowed here')
  except FileNotFoundError:
    pytest.skip('needs unshare and mount (Linux)')
  run = subprocess.list2cmdline(
    [sys.executable, '-m', 'losa_scenic.main', *campaign.arguments('x'), *OVERRIDES]
  )
  script = f"""
    {mount}
    head -c 700000 /dev/zero > {disk}/ballast
    {run} --workdir={disk}/run > {tmp_path}/first 2>&1
    echo $? > {tmp_path}/status
    rm {disk}/ballast
    {run} --workdir={disk}/run > {tmp_path}/second 2>&1
    echo $? >> {tmp_path}/status
    cp -r {disk}/run {campaign.root}/full
    mount -o remount,ro {disk}
    {run} --workdir={disk}/run > {tmp_path}/third 2>&1
    echo $? >> {tmp_path}/status
  """
  subprocess.run([*apart, 'sh', '-c', script], env=campaign.environment, cwd=ROOT, check=True)
  first = (tmp_path / 'first').read_text()
  assert (tmp_path / 'status').read_text().split() == ['1', '0', '1'], first
  assert 'Traceback' not in first
  assert first.strip().splitlines()[-1].startswith('error: ')
  assert 'No space left on device' in first
  assert campaign.rows('full') == campaign.rows('whole')
  third = (tmp_path / 'third').read_text()
  assert third == f'error: Cannot write to the workdir {disk}/run: Read-only file system.\n'


class Poisoned:
  """Makes the inputs of some steps not a number, as a broken decoder would."""

  def __init__(self, monkeypatch, *steps: int):
    train = loop.Loop._train

    def poisoned(self, step, batch):
      if step in steps:
        batch = batch | {'inputs': np.full_like(batch['inputs'], np.nan)}
      train(self, step, batch)
      positions[step] = batch['index'].tolist()

    positions = self.positions = {}
    monkeypatch.setattr(loop.Loop, '_train', poisoned)


FLOATS = ('--config.data_dtype_str=float32', '--config.log_summary_steps=1')


def test_a_step_that_is_not_finite_is_dropped_and_listed(cli, tmp_path, monkeypatch):
  poisoned = Poisoned(monkeypatch, 3)
  status, printed = cli(*FLOATS, workdir=tmp_path)
  assert status == 0, printed
  assert 'step 3 is dropped: loss nan' in printed
  (row,) = (json.loads(line) for line in (tmp_path / 'bad_steps.jsonl').read_text().splitlines())
  assert row['step'] == 3 and row['loss'] == 'nan'
  assert row['positions'] == poisoned.positions[3] and len(row['images']) == 16
  rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  trained = {row['step']: row.get('train_l2_params') for row in rows if 'learning_rate' in row}
  assert trained.keys() == {1, 2, 3, 4} and trained[3] is None and trained[4] > 0
  assert json.loads((tmp_path / 'summary.json').read_text())['bad_steps'] == 1
  assert 'bad steps' in printed


def test_three_steps_in_a_row_end_the_run_with_the_last_good_state(cli, tmp_path, monkeypatch):
  Poisoned(monkeypatch, 2, 3, 4)
  status, printed = cli(*FLOATS, workdir=tmp_path)
  assert status == 3
  assert '3 steps in a row were not finite' in printed and 'The state of step 1 is saved' in printed
  assert 'Traceback' not in printed
  assert checkpoint_files.steps(tmp_path / 'checkpoints' / 'last') == [1]
  assert notes(tmp_path)['tally'] == {}
  folder = tmp_path / 'checkpoints' / 'last' / '1'
  leaves = json.loads((folder / 'meta.json').read_text())['leaves']
  for path, array in checkpoint_files.read_arrays(folder, leaves).items():
    assert np.isfinite(array.astype(float)).all(), path
  # The same command tries them again: now they are good.
  monkeypatch.undo()
  status, printed = cli(*FLOATS, workdir=tmp_path)
  assert status == 0 and 'continuing from step 1' in printed
  assert (tmp_path / 'bad_steps.jsonl').read_text() == ''


def test_a_learning_rate_that_is_much_too_high(cli, tmp_path):
  overrides = ('--config.lr_configs.base_learning_rate=1e30', '--config.optimizer=sgd')
  status, printed = cli(
    *overrides, '--config.max_bad_steps=1', '--config.lr_configs.warmup_steps=0', workdir=tmp_path
  )
  assert status == 3
  assert 'The step was not finite' in printed and 'max_grad_norm' in printed
