"""The config files: published settings of every method, and what the quickstart sets."""

import pathlib
import re

import pytest

from losa_scenic import app
from losa_scenic.adapt_lib import fold, methods
from losa_scenic.bench_lib import params
from losa_scenic.common_lib import config, errors
from losa_scenic.model_lib import presets, sites
from losa_scenic.train_lib import run_config

ROOT = pathlib.Path(__file__).parents[1]


def load(name):
  return config.load_file(__file__, f'../configs/{name}.py')


PUBLISHED = load('methods')


def test_every_method_has_published_settings():
  assert list(PUBLISHED.PUBLISHED) == sorted(methods.METHODS)


@pytest.mark.parametrize('method', sorted(methods.METHODS))
@pytest.mark.parametrize('backbone', ['B/16', 'g/14'])
def test_published_options_fit_the_method(method, backbone):
  entry, spec = PUBLISHED.PUBLISHED[method], presets.preset(backbone)
  assert entry.source and entry.recipe in PUBLISHED.RECIPES
  methods.build(method, spec, entry.options)
  methods.build(method, spec, {**entry.options, **(entry.large if backbone == 'g/14' else {})})


@pytest.mark.parametrize('method', [*sorted(methods.METHODS), 'lora+ssf'])
def test_the_published_config_of_a_method_is_a_valid_run(method):
  run = run_config.resolve(PUBLISHED.get_config(method))
  first = PUBLISHED.PUBLISHED[methods.parts(method)[0]]
  recipe = PUBLISHED.RECIPES[first.recipe]
  rates = [PUBLISHED.PUBLISHED[part] for part in methods.parts(method)]
  rates = [e.learning_rate or PUBLISHED.RECIPES[e.recipe].learning_rate for e in rates]
  assert run.lr_configs.base_learning_rate == min(rates)
  assert (run.optimizer, run.batch_size) == (recipe.optimizer, recipe.batch_size)
  given = methods.options(run)
  for part in methods.parts(method):
    block = given[part] if '+' in method else given
    assert block == dict(PUBLISHED.PUBLISHED[part].options)


def test_the_published_config_takes_its_method_from_the_command_line():
  path = ROOT / 'configs' / 'methods.py'
  run, _ = app.parse(['main', f'--config={path}:lora', '--config.method_configs.lora.rank=3'])
  assert run.method == 'lora' and run.method_configs.lora.rank == 3


def test_the_quickstart_has_a_learning_rate_for_every_method():
  quickstart = load('quickstart').get_config()
  rates = {name: quickstart.method_learning_rates[name] for name in methods.METHODS}
  assert all(rate and rate > 0 for rate in rates.values())


def test_another_method_on_the_command_line_has_its_own_published_options_and_rate():
  path = ROOT / 'configs' / 'methods.py'
  run, _ = app.parse(['main', f'--config={path}:lora', '--config.method=vera'])
  assert methods.options(run) == {'rank': 256}
  assert run_config.resolve(run).lr_configs.base_learning_rate == 1e-2
  argv = [f'--config={path}:lora', '--config.method_learning_rates.lora=0.5']
  run, _ = app.parse(['main', *argv])
  assert run_config.resolve(run).lr_configs.base_learning_rate == 0.5


def test_the_published_options_leave_room_for_others():
  spec, options = presets.preset('B/16'), PUBLISHED.PUBLISHED
  for more in ({'architecture': 'cifar'}, {'supernet': True}):
    methods.build('noah', spec, {**options['noah'].options, **more})
  first_stage = methods.build('head2toe', spec, options['head2toe'].options)
  assert first_stage.penalty is not None


def test_a_config_file_that_is_not_there():
  with pytest.raises(errors.UserError, match=r'no Python file .*nothing\.py'):
    load('nothing')


ROWS = dict(
  re.findall(r'^\| `(\w+)` \| (.* \| [ABCD] \| .*) \|$', (ROOT / 'README.md').read_text(), re.M)
)


@pytest.mark.parametrize('method', sorted(methods.METHODS))
def test_the_readme_says_what_a_method_costs(method):
  built = methods.build(method, presets.preset('B/16'), PUBLISHED.PUBLISHED[method].options)
  try:
    fold.check(built)
    merges = 'yes'
  except errors.UserError:
    merges = ''
  count = params.count('B/16', method, PUBLISHED.PUBLISHED[method].options)['trainable_params']
  what, where, *rest = (cell.strip() for cell in ROWS[method].split('|'))
  assert what and rest == [built.memory_class, merges, f'{count:,}']
  named = {name for code in re.findall(r'`([\w+]+)`', where) for name in code.split('+')}
  used = {site for table in built.inserts for site in sites.sites_of(table)} | set(built.collect)
  assert named == used or (not named and 'every linear layer and norm' in where)


def test_the_readme_has_a_row_for_every_method_and_no_other():
  assert set(ROWS) == set(methods.METHODS)
