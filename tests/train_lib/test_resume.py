"""Killed at any moment and started again, a run logs and ends as if nothing had happened."""

import json
import pathlib
import random
import subprocess
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tensorboard.backend.event_processing import event_accumulator

from losa_scenic.train_lib import writers

STEPS = 40
# Checkpoints, logs and evaluations fall on different steps.
RUN = (
  f'--config.num_training_steps={STEPS}',
  '--config.checkpoint_steps=5',
  '--config.log_summary_steps=3',
  '--config.log_eval_steps=8',
)
AUGMENTED = (
  '--config.augment.min_crop_area=0.5',
  '--config.augment.flip=True',
  '--config.augment.randaugment_ops=1',
  '--config.augment.mixup_alpha=0.3',
  '--config.optimizer_configs.weight_decay=0.01',
)
TIMING = ('img/sec', 'input_wait')


def lines(workdir: pathlib.Path) -> list[dict]:
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [{k: v for k, v in row.items() if k not in TIMING} for row in rows]


def saved_steps(workdir: pathlib.Path) -> list[int]:
  folders = (workdir / 'checkpoints' / 'last').glob('*')
  return sorted(int(folder.name) for folder in folders if folder.name.isdigit())


def newest_state(workdir: pathlib.Path, kind: str) -> dict[str, np.ndarray]:
  with ocp.CheckpointManager(workdir / 'checkpoints' / kind) as manager:
    step = manager.latest_step()
    restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))
  flat, _ = jax.tree_util.tree_flatten_with_path(restored['state'])
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


def curves(workdir: pathlib.Path) -> dict[str, list[tuple[int, float]]]:
  """What TensorBoard shows."""
  events = event_accumulator.EventAccumulator(str(workdir), size_guidance={'scalars': 0})
  events.Reload()
  assert 'config/text_summary' in events.Tags()['tensors']
  assert 'valid_predictions' in events.Tags()['images']
  timing = [writers.tag(name) for name in TIMING]
  names = [name for name in events.Tags()['scalars'] if name not in timing]
  return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


def assert_same_run(one: pathlib.Path, other: pathlib.Path) -> None:
  assert lines(one) == lines(other)
  assert curves(one) == curves(other)
  for kind in ('last', 'best'):
    want, have = newest_state(one, kind), newest_state(other, kind)
    assert want.keys() == have.keys()
    for name in want:
      assert want[name].tobytes() == have[name].tobytes(), (kind, name)
  summaries = [json.loads((workdir / 'summary.json').read_text()) for workdir in (one, other)]
  for key in ('test_accuracy', 'test_loss', 'valid_accuracy', 'valid_loss', 'num_steps'):
    assert summaries[0][key] == summaries[1][key], key


def finish(process: subprocess.Popen) -> str:
  printed = process.communicate(timeout=120)[0]
  assert process.returncode == 0, printed
  return printed


def kill_at(process: subprocess.Popen, workdir: pathlib.Path, how: str, value: float) -> bool:
  """Kills at a logged step, `value` seconds after the first new line, in or right after a save."""
  metrics, saves = workdir / 'metrics.jsonl', workdir / 'checkpoints' / 'last'
  since = None

  def reached() -> bool:
    nonlocal since
    if how == 'save':  # Orbax writes here before it renames.
      return any('tmp' in folder.name for folder in saves.glob('*'))
    if how == 'saved':
      return (saves / str(int(value))).exists()
    text = metrics.read_text() if metrics.exists() else ''
    steps = [json.loads(line)['step'] for line in text.splitlines(keepends=True) if '\n' in line]
    if how == 'step':
      return bool(steps) and max(steps) >= value
    if since is None and max(steps, default=0) > max(saved_steps(workdir), default=0):
      since = time.monotonic()
    return since is not None and time.monotonic() - since > value

  while process.poll() is None and not reached():
    time.sleep(0.001)
  process.kill()
  process.communicate()
  return process.returncode == -9


def interrupt_and_compare(spawn, tmp_path, overrides, plan) -> int:
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  finish(spawn(*overrides, workdir=whole))
  killed, start = 0, None
  for how, value in plan:
    killed += kill_at(spawn(*overrides, workdir=broken), broken, how, value)
  start = max(saved_steps(broken), default=None)
  printed = finish(spawn(*overrides, workdir=broken))
  assert json.loads((broken / 'summary.json').read_text())['resumed_from_step'] == start
  assert f'continuing from step {start}' in printed
  assert_same_run(whole, broken)
  return killed


def test_three_kills_change_nothing(spawn, tmp_path):
  rng = random.Random(0)
  plan = [
    ('step', rng.randint(1, 4)),  # Before the first checkpoint.
    ('save', 0),
    ('saved', 5 * rng.randint(5, 7)),
  ]
  assert interrupt_and_compare(spawn, tmp_path, RUN + AUGMENTED, plan) >= 2


@pytest.mark.slow
@pytest.mark.parametrize('augmented', [False, True])
def test_ten_more_kills_change_nothing(spawn, tmp_path, augmented):
  rng = random.Random(1 + augmented)
  plan = [
    (how, rng.uniform(0, 0.6) if how == 'time' else 5 * rng.randint(1, 8))
    for how in rng.choices(('step', 'save', 'saved', 'time'), k=10)
  ]
  overrides = RUN + (AUGMENTED if augmented else ())
  assert interrupt_and_compare(spawn, tmp_path, overrides, plan) >= 3


@pytest.mark.slow
def test_results_do_not_depend_on_the_compilation_cache(spawn, tmp_path):
  for cached in (False, True, True):
    workdir = tmp_path / f'{cached}{len(list(tmp_path.iterdir()))}'
    finish(spawn(*RUN, *AUGMENTED, workdir=workdir, cached=cached))
  one, *others = sorted(tmp_path.iterdir())
  for other in others:
    assert_same_run(one, other)
