"""The command that searches widths for NOAH, on a few digits and a tiny random backbone."""

import json

import pytest

from losa_scenic import app, main, noah_search
from losa_scenic.adapt_lib import noah_search as search_lib
from losa_scenic.common_lib import errors

CONFIG = """
from losa_scenic.train_lib import run_config

def get_config():
  config = run_config.default_config()
  config.backbone = 'test/8'
  config.random_backbone = True
  config.lr_configs.base_learning_rate = 3e-3
  config.num_training_steps = 3
  config.batch_size = 16
  config.eval_batch_size = 64
  return config
"""
NUMBERS = ['--generations=1', '--population=3', '--top=2', '--mutations=1', '--crossovers=1']


@pytest.fixture
def config(tmp_path):
  path = tmp_path / 'config.py'
  path.write_text(CONFIG)
  return f'--config={path}'


def test_numbers_of_the_search_are_told_from_options_of_the_run():
  settings, rest = noah_search.parse(['x', '--config=a.py', *NUMBERS, '--workdir=w'])
  assert settings == search_lib.Settings(
    generations=1, population=3, top=2, mutations=1, crossovers=1
  )
  assert rest[:3] == ['x', '--config=a.py', '--workdir=w']
  assert '--config.method=noah' in rest and '--config.evaluate_test=False' in rest


def test_options_name_every_width():
  choice = ((5, 1, 0), (1, 0, 0), (10, 5, 1))
  assert noah_search.options(choice) == [
    '--config.method=noah',
    '--config.method_configs.noah.prompts=5,1,0',
    '--config.method_configs.noah.rank=1,0,0',
    '--config.method_configs.noah.bottleneck=10,5,1',
  ]


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--config.method=losa'], "the search is for method 'noah'"),
    (['--population=0'], 'population must be at least 1'),
    (['--config.method_configs.noah.rank=3'], 'supernet and rank exclude each other'),
    (['--populaton=3'], 'populaton'),
  ],
)
def test_mistakes_end_with_a_message(arguments, message, config, tmp_path, capsys):
  with pytest.raises(SystemExit) as exit_:
    noah_search.main(['x', config, f'--workdir={tmp_path / "w"}', *arguments])
  assert exit_.value.code == 1
  assert message in capsys.readouterr().err


def test_search_ends_with_options_that_train(config, tmp_path, capsys):
  noah_search.main(['x', config, f'--workdir={tmp_path / "w"}', *NUMBERS])
  printed = capsys.readouterr()
  found = json.loads((tmp_path / 'w' / 'search.json').read_text())
  assert all(option in printed.out for option in found['options'])
  assert 'generation 1/1' in printed.err
  scores = [score for g in found['generations'] for _, score in g['scored']]
  assert len(scores) == 6 and found['valid_accuracy'] == max(scores)
  supernet = json.loads((tmp_path / 'w' / 'summary.json').read_text())
  assert supernet['test_accuracy'] is None, 'the test split stays unseen'
  app.run(
    main.main, ['x', config, f'--workdir={tmp_path / "v"}', *found['options']], ends_process=False
  )
  summary = json.loads((tmp_path / 'v' / 'summary.json').read_text())
  assert str(found['trainable_params']) in json.dumps(summary)


def test_data_without_validation_split_is_a_user_error(config, tmp_path, capsys):
  with pytest.raises(SystemExit):
    noah_search.main(
      ['x', config, f'--workdir={tmp_path}', '--config.dataset_configs.train_split=trainval']
    )
  assert 'validation split' in capsys.readouterr().err


def test_settings_out_of_range_are_user_errors():
  with pytest.raises(errors.UserError, match='must be in'):
    noah_search.parse(['x', '--mutate_module=2'])
