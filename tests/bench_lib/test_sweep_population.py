"""A sweep with --population: fewer runs, the same rows."""

import pathlib

import pytest

from losa_scenic import sweep
from losa_scenic.bench_lib import results
from losa_scenic.common_lib import errors

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = f"""
import importlib.util
spec = importlib.util.spec_from_file_location('q', '{ROOT}/configs/quickstart.py')
quickstart = importlib.util.module_from_spec(spec)
spec.loader.exec_module(quickstart)

def get_config():
  config = quickstart.get_config()
  config.backbone, config.random_backbone = 'test/8', True
  config.batch_size, config.num_training_steps = 16, 4
  config.lr_configs.warmup_steps = 2
  config.checkpoint = False
  return config

def get_hyper(hyper):
  return hyper.product([
    hyper.sweep('config.dataset_name', {{names}}),
    hyper.chainit([
      hyper.product([
        hyper.sweep('config.method_configs.losa.rank', [2, 4]),
        hyper.sweep('config.lr_configs.base_learning_rate', [0.001, 0.01]),
      ]),
      [{{{{'config.method': 'linear'}}}}],
    ]),
  ])
"""


@pytest.fixture
def config(tmp_path):
  def write(*names):
    path = tmp_path / 'config.py'
    path.write_text(CONFIG.format(names=list(names)))
    return str(path)

  return write


def test_runs_that_share_a_pass_are_one_run(config, tmp_path):
  path = config('digits', 'sprites')
  alone, _ = sweep.plan(path, tmp_path / 'work')
  runs, _ = sweep.plan(path, tmp_path / 'work', population=True)
  assert len(alone) == 10 and [len(run.members) for run in runs] == [5, 5]
  assert [m.name for run in runs for m in run.members] == [run.name for run in alone]
  assert [m.overrides for run in runs for m in run.members] == [run.overrides for run in alone]
  for run, name in zip(runs, ('digits', 'sprites'), strict=True):
    assert f'--config.dataset_name={name}' in run.command
    assert not any('rank=' in a and 'population' not in a for a in run.command)
    assert len({m.directory for m in run.members}) == 5


def test_a_population_of_populations_is_refused(config, tmp_path):
  with pytest.raises(errors.UserError, match=r'leave config\.population out'):
    sweep.plan(
      config('digits'), tmp_path / 'work', {'config.population': 'rng_seed=0|1'}, population=True
    )


@pytest.mark.slow
def test_rows_are_those_of_runs_alone(config, tmp_path):
  path, rows = config('digits'), {}
  for population in (False, True):
    work = tmp_path / f'{population}'
    sweep.run_sweep(path, work, population=population)
    found = results.read_rows(work / 'results.jsonl')
    rows[population] = {row['run']: row for row in found}
  assert rows[True].keys() == rows[False].keys() and len(rows[True]) == 5
  for name, row in rows[False].items():
    own = rows[True][name]
    assert row.keys() <= own.keys()
    for key, value in row.items():
      if key.startswith(('config.', 'test_', 'valid_')) or key.endswith('_params'):
        wanted = value if isinstance(value, str) else pytest.approx(value, rel=1e-5)
        assert own[key] == wanted, key
