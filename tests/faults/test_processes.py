"""Several processes: the same numbers as one, one end for all, continued by any number of them."""

import json
import pathlib
import shutil
import signal
import sys
import time

import numpy as np
import pytest
from faults.processes import ROOT, Group

from losa_scenic.train_lib import checkpoint_files

STEPS = 24
TEST_IMAGES = 797


ARGUMENTS = (
  f'--config={ROOT / "configs" / "quickstart.py"}',
  '--config.dataset_name=digits',
  '--config.backbone=test/8',
  '--config.random_backbone=True',
  '--config.batch_size=16',
  '--config.lr_configs.warmup_steps=2',
  # Adam makes large steps of gradients that are nothing but rounding.
  '--config.optimizer=momentum',
  '--config.lr_configs.base_learning_rate=0.02',
  f'--config.num_training_steps={STEPS}',
  '--config.checkpoint_steps=100',
  '--config.log_summary_steps=5',
  '--config.log_eval_steps=16',
  # Of 797 test images the last batch holds 41: less than one of two or four shares of 84.
  '--config.eval_batch_size=84',
  '--config.augment.flip=True',
  '--config.watchdog_seconds=30',
)


@pytest.fixture
def launch(tmp_path_factory):
  """`fn(count, workdir, *overrides)` starts the observed run with four devices in all."""
  cache = tmp_path_factory.getbasetemp() / 'compiled_for_processes'

  def start(count: int, workdir: pathlib.Path, *overrides: str) -> Group:
    return Group(
      [f'{workdir}.seen', *ARGUMENTS, f'--workdir={workdir}', *overrides],
      count=count,
      devices=4 // count,
      log=pathlib.Path(f'{workdir}.log'),
      cache=cache,
      launcher=(sys.executable, str(ROOT / 'tests' / 'faults' / 'observed_run.py')),
    )

  return start


def seen(workdir: pathlib.Path) -> list[dict[int, list[int]]]:
  """Of each process: step -> positions."""
  tables = []
  for path in sorted(workdir.parent.glob(f'{workdir.name}.seen*')):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    tables.append({row['step']: row['positions'] for row in rows})
  return tables


def wait_for_step(group: Group, workdir: pathlib.Path, step: int) -> None:
  end = time.monotonic() + 120
  while time.monotonic() < end and all(process.poll() is None for process in group.processes):
    if any(step in table for table in seen(workdir)):
      return
    time.sleep(0.01)
  raise AssertionError(group.printed())


def rows(workdir: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def assert_same_numbers(one: pathlib.Path, other: pathlib.Path) -> None:
  pairs = list(zip(rows(one), rows(other), strict=True))
  for a, b in pairs:
    assert a['step'] == b['step']
    for name in a:
      if name.startswith(('train_', 'valid_', 'test_')):
        assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-5), (a['step'], name)
  a, b = (json.loads((workdir / 'summary.json').read_text()) for workdir in (one, other))
  assert a['test_accuracy'] == b['test_accuracy']
  right = a['test_accuracy'] * TEST_IMAGES
  assert right == pytest.approx(round(right))


def final_weights(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  folder = workdir / 'checkpoints' / 'last' / str(STEPS)
  leaves = json.loads((folder / 'meta.json').read_text())['leaves']
  return checkpoint_files.read_arrays(folder, leaves)


def assert_same_weights(one: pathlib.Path, other: pathlib.Path) -> None:
  a, b = final_weights(one), final_weights(other)
  assert a.keys() == b.keys()
  for path in a:
    np.testing.assert_allclose(a[path], b[path], rtol=1e-5, atol=2e-6, err_msg=path)


def test_stopped_and_killed_with_two_processes_and_ended_by_one(launch, tmp_path):
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  alone = launch(1, whole)
  # A request that one process gets stops both at the same step, and is saved.
  group = launch(2, broken)
  wait_for_step(group, broken, 7)
  group.processes[1].send_signal(signal.SIGTERM)
  assert group.wait() == [143, 143], group.printed()
  last = {max(table) for table in seen(broken)}
  assert len(last) == 1
  assert checkpoint_files.steps(broken / 'checkpoints' / 'last') == sorted(last)
  assert alone.wait() == [0], alone.printed()
  # One that is gone ends the other. Until then the clock asks for checkpoints, of process 0 alone.
  group = launch(2, broken, '--config.checkpoint_minutes=0.001')
  wait_for_step(group, broken, max(last) + 6)
  group.processes[0].kill()
  begun = time.monotonic()
  statuses = group.wait()
  assert statuses[0] == -9 and statuses[1]  # By itself, or aborted by JAX: process 0 was its link.
  assert time.monotonic() - begun < 30
  newest = checkpoint_files.steps(broken / 'checkpoints' / 'last')[-1]
  assert newest > max(last)
  group = launch(1, broken)
  assert group.wait() == [0], group.printed()
  assert f'continuing from step {newest}' in group.printed()
  assert_same_numbers(whole, broken)
  assert_same_weights(whole, broken)
  (wanted,) = seen(whole)
  tables = {len(next(iter(table.values()))): [] for table in seen(broken)}
  for table in seen(broken):
    tables[len(next(iter(table.values())))].append(table)
  (end,), (first, second) = tables[16], tables[8]
  for step in range(1, STEPS + 1):
    if step in first:
      assert step not in second or first[step] + second[step] == wanted[step]
    if step > newest:
      assert end[step] == wanted[step]


@pytest.mark.slow
def test_started_with_four_processes_and_ended_by_one_or_by_two(launch, tmp_path):
  whole, four = tmp_path / 'whole', tmp_path / 'four'
  assert launch(1, whole).wait() == [0]
  group = launch(4, four)
  wait_for_step(group, four, 8)
  group.processes[2].send_signal(signal.SIGTERM)
  assert group.wait() == [143] * 4, group.printed()
  for count in (1, 2, 4):
    end = tmp_path / f'ended_by_{count}'
    shutil.copytree(four, end)
    group = launch(count, end)
    assert group.wait(300) == [0] * count, group.printed()
    assert_same_numbers(whole, end)
    assert_same_weights(whole, end)


# The command line of each process with a seed of its own: its number.
SEEDED = """
import sys
from losa_scenic import app, main
app.run(main.main, [*sys.argv, f'--config.shuffle_seed={sys.argv[-1][-1]}'], ends_process=True)
"""


def test_processes_with_different_configs_are_refused(tmp_path):
  group = Group(
    [*ARGUMENTS, f'--workdir={tmp_path / "run"}'],
    count=2,
    devices=1,
    log=tmp_path / 'log',
    cache=tmp_path / 'cache',
    launcher=(sys.executable, '-c', SEEDED),
  )
  assert group.wait() == [1, 1]
  assert group.printed().count('error: config.shuffle_seed differs between the processes') == 2
