"""The schema of a run lists everything there is to set, and every shipped config fits it."""

import dataclasses
import pathlib

import ml_collections
import pytest

from losa_scenic import app
from losa_scenic.adapt_lib import methods
from losa_scenic.common_lib import config as config_lib
from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import datasets
from losa_scenic.dataset_lib.augment import Augment
from losa_scenic.train_lib import lr_schedules, optimizers, run_config, workdir

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = sorted((ROOT / 'configs').rglob('*.py')) + sorted(ROOT.glob('projects/*/configs/**/*.py'))


def runnable(**changes) -> ml_collections.ConfigDict:
  config = run_config.default_config()
  config.num_training_steps = 10
  config.lr_configs.base_learning_rate = 0.1
  for key, value in changes.items():
    config[key] = value
  return config


@pytest.mark.parametrize(
  'file',
  [f for f in CONFIGS if 'def get_config' in f.read_text()],
  ids=lambda f: str(f.relative_to(ROOT)),
)
def test_config_files(file):
  config, workdir = app.parse(['main', f'--config={file}'])
  assert config.is_locked
  with pytest.raises(AttributeError):
    config.no_such_field = 1
  resolved = run_config.resolve(config)
  assert resolved.is_locked
  assert resolved.lr_configs.base_learning_rate > 0
  assert config.optimizer in optimizers.OPTIMIZERS
  assert config.dataset_name in {*datasets.DATASETS, datasets.AUTO}
  assert (app.parse(['main', f'--config={file}'])[1]) == workdir


def test_every_option_of_every_dataset_is_in_the_schema():
  options = set(datasets.COMMON_OPTIONS)
  for name in datasets.DATASETS:
    options |= config_lib.options(datasets.get_dataset(name)) - datasets.DRAWN
  schema = run_config.default_config().dataset_configs
  assert options == set(schema)
  assert {name: schema.get_type(name) for name in schema} == datasets.option_types()


def test_every_option_of_augmentation_is_in_the_schema():
  schema = run_config.default_config().augment
  assert set(schema) == {field.name for field in dataclasses.fields(Augment)}
  assert not Augment(**schema).active


def test_normalisation_stands_for_mean_and_std():
  config = runnable()
  config.dataset_configs.normalisation = 'imagenet'
  resolved = run_config.resolve(config)
  assert resolved.backbone_configs.mean == (0.485, 0.456, 0.406)
  assert resolved.backbone_configs.std == (0.229, 0.224, 0.225)
  assert run_config.resolve(resolved) == resolved
  given = runnable(backbone_configs={'std': (1.0, 1.0, 1.0)})
  given.dataset_configs.normalisation = 'unit'
  assert run_config.resolve(given).backbone_configs.mean == (0.0, 0.0, 0.0)
  given.dataset_configs.normalisation = 'inception'
  with pytest.raises(errors.UserError, match=r"'inception' and backbone_configs\.std .*contradict"):
    run_config.resolve(given)
  given.dataset_configs.normalisation = 'imagnet'
  with pytest.raises(errors.UserError, match=r"'imagnet'\. Did you mean 'imagenet'"):
    run_config.resolve(given)


@pytest.mark.parametrize('name', methods.METHODS)
def test_every_option_of_every_method_is_in_the_schema(name):
  schema = run_config.default_config()
  assert config_lib.options(methods.METHODS[name]) == set(schema.method_configs[name])
  assert name in schema.method_learning_rates


def test_every_option_of_optimizers_and_schedules_is_in_the_schema():
  schema = run_config.default_config()
  options = set().union(*(config_lib.options(fn) for fn in optimizers.OPTIMIZERS.values()))
  assert options == set(schema.optimizer_configs)
  options = set().union(*(config_lib.options(fn) for fn in lr_schedules.SCHEDULES.values()))
  assert options | {'learning_rate_schedule'} == set(schema.lr_configs)


def test_resolve_fills_in():
  config = runnable(rng_seed=7, batch_size=12)
  resolved = run_config.resolve(config)
  assert (resolved.shuffle_seed, resolved.eval_batch_size) == (7, 12)
  assert config.shuffle_seed is None
  assert run_config.resolve(resolved) == resolved


def test_the_methods_learning_rate_stands_in():
  config = runnable()
  config.lr_configs.base_learning_rate = None
  config.method_learning_rates.losa = 0.25
  config.method_learning_rates.full = 0.5
  assert run_config.resolve(config).lr_configs.base_learning_rate == 0.25
  config.lr_configs.base_learning_rate = 0.125
  assert run_config.resolve(config).lr_configs.base_learning_rate == 0.125
  config.lr_configs.base_learning_rate = config.method_learning_rates.losa = None
  with pytest.raises(errors.UserError, match=r'method_learning_rates\.losa'):
    run_config.resolve(config)


def test_other_methods_leave_no_trace():
  one, other = runnable(), runnable()
  other.method_configs.full.token_keep = 0.5
  other.method_learning_rates.linear = 3.0
  assert run_config.resolve(one) == run_config.resolve(other)


def test_number_of_steps():
  config = runnable(batch_size=32)
  assert run_config.number_of_steps(config, 800) == (10, 25)
  config.num_training_steps, config.num_training_epochs = None, 2.5
  assert run_config.number_of_steps(config, 800) == (63, 25)
  assert run_config.number_of_steps(config, 5) == (1, 1)


def test_no_length_is_refused():
  config = runnable()
  config.num_training_steps = None
  with pytest.raises(errors.UserError, match='num_training_steps or num_training_epochs'):
    run_config.resolve(config)


def test_fields_that_may_change_exist():
  schema = run_config.default_config()
  for name in run_config.MAY_CHANGE:
    block, _, field = name.rpartition('.')
    assert field in (schema[block] if block else schema)


def test_what_may_change_is_left_out_at_any_depth():
  fields = {'a': 1, 'b': {'c': 2, 'd': {'e': 3, 'f': 4}}, 'g': 5}
  assert workdir.what_matters(fields, ('g', 'b.c', 'b.d.e')) == {'a': 1, 'b': {'d': {'f': 4}}}
  assert workdir.what_matters(fields, ()) == fields
