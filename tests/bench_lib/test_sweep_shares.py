"""What a sweep shares out between its slots, and the runs it takes for finished."""

import json
import os
import pathlib
import sys

import pytest

from losa_scenic import sweep
from losa_scenic.bench_lib import results
from losa_scenic.bench_lib import sweep as engine
from losa_scenic.common_lib import errors

SHOW_CORES = """
import json, os, pathlib, sys
summary = {'cores': sorted(os.sched_getaffinity(0))}
pathlib.Path(sys.argv[1], 'summary.json').write_text(json.dumps(summary))
"""


def test_cores_are_split_evenly_and_completely(monkeypatch):
  monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {9, 3, 4, 5, 7})
  assert sweep.core_shares(2) == [[3, 4], [5, 7, 9]]
  assert sweep.core_shares(1) == [[3, 4, 5, 7, 9]]
  with pytest.raises(errors.UserError, match='5 cores for 6 slots'):
    sweep.core_shares(6)


def test_a_slots_runs_are_bound_to_its_cores(tmp_path):
  directory = tmp_path / 'run'
  command = [sys.executable, '-c', SHOW_CORES, str(directory)]
  run = engine.Run('run', directory, {}, command)
  core = min(os.sched_getaffinity(0))
  assert engine.execute([run], [{}], [tmp_path / 'rows.jsonl'], cores=[[core]]) == 0
  assert json.loads((directory / 'summary.json').read_text()) == {'cores': [core]}


def test_a_finished_run_of_a_changed_config_is_refused(tmp_path):
  quickstart = pathlib.Path(__file__).parents[2] / 'configs' / 'quickstart.py'
  config = tmp_path / 'swept.py'
  config.write_text(
    quickstart.read_text()
    + "\n\ndef get_hyper(hyper):\n  return hyper.sweep('config.rng_seed', [1])\n"
  )
  (run,), _ = sweep.plan(str(config), tmp_path / 'runs')
  results.write_object(run.directory / 'overrides.json', run.overrides)
  results.write_object(run.directory / 'summary.json', {'test_accuracy': 0.5})
  parsed, _ = sweep.app.parse(['main', *run.command[3:]])
  fields = sweep.run_config.resolve(parsed).to_dict()
  results.write_object(run.directory / 'config.json', fields)
  assert sweep.run_sweep(str(config), tmp_path / 'runs') == 0
  config.write_text(config.read_text().replace('batch_size = 32', 'batch_size = 16'))
  with pytest.raises(errors.UserError, match='batch_size: 32 -> 16'):
    sweep.run_sweep(str(config), tmp_path / 'runs')
