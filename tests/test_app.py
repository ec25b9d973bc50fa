"""The command line: each mistake ends with one clear message; the same command, the same run."""

import pathlib
import subprocess
import sys

import pytest

from losa_scenic import app
from losa_scenic.train_lib import run_config

ROOT = pathlib.Path(__file__).parents[1]
QUICKSTART = f'--config={ROOT / "configs" / "quickstart.py"}'


def start(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, list]:
  """Runs a `main` that only notes that it was called: (exit status, stderr, its calls)."""
  calls = []
  try:
    app.run(lambda **kwargs: calls.append(kwargs), ['main', *argv])
    status = 0
  except SystemExit as e:
    status = e.code
  return status, capsys.readouterr().err, calls


def assert_one_message(status: int, err: str, calls: list, parts: tuple[str, ...]) -> None:
  assert status == 1
  assert not calls
  assert err.startswith('error: ')
  assert err.count('error:') == 1
  assert 'Traceback' not in err
  for part in parts:
    assert part in err, err


COMMAND_LINES = {
  'unknown key': (['--config.batch_sise=3'], ("'batch_sise'", "Did you mean 'batch_size'")),
  'unknown key in a block': (
    ['--config.lr_configs.base_learning_rte=3'],
    ("'lr_configs.base_learning_rte'", "Did you mean 'lr_configs.base_learning_rate'"),
  ),
  'unknown option of a method': (
    ['--config.method_configs.losa.rnk=3'],
    ("'method_configs.losa.rnk'", "Did you mean 'method_configs.losa.rank'"),
  ),
  'options of an unknown method': (
    ['--config.method_configs.lsoa.rank=3'],
    ("'method_configs.lsoa'", "Did you mean 'method_configs.losa'"),
  ),
  'text for a whole number': (['--config.batch_size=many'], ('config.batch_size', 'many')),
  'fraction for a whole number': (['--config.batch_size=3.5'], ('config.batch_size', '3.5')),
  'text for a number': (
    ['--config.lr_configs.base_learning_rate=fast'],
    ('config.lr_configs.base_learning_rate', 'fast'),
  ),
  'text for a truth value': (['--config.random_backbone=maybe'], ('random_backbone', 'maybe')),
  'number for a block': (['--config.dataset_configs=5'], ('config.dataset_configs', '5')),
  'stray argument': (['stray'], ("Unexpected argument 'stray'",)),
  'unknown flag': (['--wrkdir=x'], ("'wrkdir'", 'workdir')),
  'unknown method': (['--config.method=lsoa'], ("method 'lsoa'", "Did you mean 'losa'")),
  'unknown optimizer': (['--config.optimizer=adamW'], ("'adamW'", "Did you mean 'adamw'")),
  'option of another optimizer': (
    ['--config.optimizer_configs.momentum=0.9'],
    ("optimizer 'adamw'", "'momentum'", 'beta1'),
  ),
  'unknown schedule': (
    ['--config.lr_configs.learning_rate_schedule=compund'],
    ("'compund'", "Did you mean 'compound'"),
  ),
  'unknown factor': (
    ['--config.lr_configs.factors=constant*cosine'],
    ("'cosine'", "Did you mean 'cosine_decay'"),
  ),
  "another method's options": (
    ['--config.method=linear', '--config.method_configs.losa.rank=3'],
    ("method 'losa'", "'linear'", 'no effect'),
  ),
  "another method's learning rate": (
    ['--config.method_learning_rates.full=1.0'],
    ("method 'full'", 'no effect'),
  ),
  'no batch': (['--config.batch_size=0'], ('batch_size', 'at least 1')),
  'no steps': (['--config.num_training_steps=0'], ('num_training_steps', 'at least 1')),
  'negative steps': (['--config.num_training_steps=-3'], ('num_training_steps', '-3')),
  'negative epochs': (['--config.num_training_epochs=-1'], ('num_training_epochs', '-1')),
  'no checkpoint steps': (['--config.checkpoint_steps=0'], ('checkpoint_steps', 'at least 1')),
  'negative seed': (['--config.rng_seed=-1'], ('rng_seed', '-1')),
  'negative shuffle seed': (['--config.shuffle_seed=-1'], ('shuffle_seed', '-1')),
  'no gradient left': (['--config.max_grad_norm=0'], ('max_grad_norm', 'above 0')),
  'crops of nothing': (['--config.augment.min_crop_area=0'], ('augment.min_crop_area',)),
  'jitter above one': (['--config.augment.color_jitter=2'], ('augment.color_jitter', '2')),
  'unknown crop filter': (
    ['--config.augment.interpolation=bicubik'],
    ("augment.interpolation 'bicubik'", "Did you mean 'bicubic'"),
  ),
  'negative workers': (['--config.num_workers=-1'], ('num_workers', 'at least 0')),
  'unknown option of data': (
    ['--config.dataset_configs.central_corp=1.0'],
    ("'dataset_configs.central_corp'", "Did you mean 'dataset_configs.central_crop'"),
  ),
  'negative mixup': (['--config.augment.mixup_alpha=-1'], ('augment.mixup_alpha', '-1')),
  'smoothing all': (['--config.label_smoothing=1'], ('label_smoothing',)),
  'half a union': (['--config.method=lora+'], ("method ''", 'losa')),
  'a part twice': (['--config.method=losa+losa'], ('losa+losa', 'twice')),
}


@pytest.mark.parametrize('argv,parts', COMMAND_LINES.values(), ids=COMMAND_LINES.keys())
def test_mistake_on_the_command_line(argv, parts, capsys):
  assert_one_message(*start([QUICKSTART, *argv], capsys), parts)


SETUP = """
import ml_collections
from losa_scenic.train_lib import run_config

def get_config():
  c = run_config.default_config()
  c.num_training_steps = 2
  c.lr_configs.base_learning_rate = 1e-3
"""
UNLOCK = '  c = ml_collections.ConfigDict(c.to_dict())\n'
# name -> (text of the file, parts of the message; {file} is its path).
FILES = {
  'unknown key, locked': (
    SETUP + '  c.batch_sise = 3\n  return c\n',
    ('{file}:9:', "'batch_sise'", "Did you mean 'batch_size'"),
  ),
  'unknown key in a block, locked': (
    SETUP + '  c.lr_configs.warmup_step = 3\n  return c\n',
    ('{file}:9:', "'warmup_step'", "'lr_configs.warmup_steps'"),
  ),
  'unknown key, plain': (
    SETUP + UNLOCK + '  c.batch_sise = 3\n  return c\n',
    ("'batch_sise'", "Did you mean 'batch_size'"),
  ),
  'unknown key in a block, plain': (
    SETUP + UNLOCK + '  c.augment.flp = True\n  return c\n',
    ("'augment.flp'", "Did you mean 'augment.flip'"),
  ),
  'wrong type, locked': (
    SETUP + '  c.batch_size = "many"\n  return c\n',
    ('{file}:9:', 'batch_size', 'many'),
  ),
  'wrong type, plain': (
    SETUP + UNLOCK + '  c.lr_configs.warmup_steps = 2.5\n  return c\n',
    ('lr_configs.warmup_steps', 'int', '2.5'),
  ),
  'truth value for a number': (
    SETUP + UNLOCK + '  c.log_eval_steps = True\n  return c\n',
    ('log_eval_steps', 'int', 'True'),
  ),
  'number for a block': (
    SETUP + UNLOCK + '  c.augment = None\n  return c\n',
    ('augment', 'block of options'),
  ),
  'most fields missing': (
    'import ml_collections\ndef get_config():\n'
    '  return ml_collections.ConfigDict({"batch_size": 3})\n',
    ('no field', 'run_config.default_config()'),
  ),
  'syntax error': ('def get_config():\n  x = (\n', ('{file}:2: SyntaxError', 'never closed')),
  'no get_config': ('X = 3\n', ('{file} defines no get_config()',)),
  'an exception': ('def get_config():\n  return 1 / 0\n', ('{file}:2: ZeroDivisionError',)),
  'a value error': ('def get_config():\n  raise ValueError("no")\n', ('{file}:2: ValueError: no',)),
  'a missing import': ('import nothere\n', ('{file}:1: ModuleNotFoundError', 'nothere')),
  'nothing returned': ('def get_config():\n  pass\n', ('{file}', 'must return')),
  'a dict returned': ('def get_config():\n  return {}\n', ('{file}', 'must return')),
}


@pytest.mark.parametrize('text,parts', FILES.values(), ids=FILES.keys())
def test_mistake_in_the_config_file(text, parts, capsys, tmp_path):
  file = tmp_path / 'mine.py'
  file.write_text(text)
  expected = tuple(part.format(file=file) for part in parts)
  assert_one_message(*start([f'--config={file}'], capsys), expected)


def test_config_file_argument_nobody_takes(capsys):
  outcome = start([f'{QUICKSTART}:fast'], capsys)
  assert_one_message(*outcome, ('quickstart.py', 'get_config() takes 0 positional arguments'))


@pytest.mark.parametrize('argv', [[], ['--workdir=x'], ['--config=']])
def test_no_config(argv, capsys):
  assert_one_message(*start(argv, capsys), ('--config=FILE.py is required',))


@pytest.mark.parametrize('path', ['nowhere.py', '.'])
def test_no_such_config_file(path, capsys, tmp_path):
  file = tmp_path / path
  outcome = start([f'--config={file}', '--config.batch_size=3'], capsys)
  assert_one_message(*outcome, ('There is no config file', str(file)))


def test_overrides_reach_main(capsys, tmp_path):
  status, _, calls = start(
    [QUICKSTART, '--config.batch_size=12', '--config.augment.flip', f'--workdir={tmp_path}'], capsys
  )
  assert status == 0
  assert calls[0].keys() == {'rng', 'config', 'workdir', 'writer'}
  assert calls[0]['config'].batch_size == 12
  assert calls[0]['config'].augment.flip is True
  assert calls[0]['workdir'] == tmp_path


def test_a_file_may_fill_a_plain_config(capsys, tmp_path):
  file = tmp_path / 'mine.py'
  file.write_text(SETUP + UNLOCK + '  c.lr_configs = {"base_learning_rate": 1}\n  return c\n')
  status, _, calls = start([f'--config={file}'], capsys)
  assert status == 0
  assert run_config.resolve(calls[0]['config']).lr_configs.base_learning_rate == 1


def test_same_command_same_default_workdir():
  first = app.parse(['main', QUICKSTART, '--config.rng_seed=1'])[1]
  assert first == app.parse(['main', QUICKSTART, '--config.rng_seed=1'])[1]
  assert first != app.parse(['main', QUICKSTART, '--config.rng_seed=2'])[1]
  assert first.parent == pathlib.Path('runs') / 'quickstart'
  assert first.name.startswith('losa-digits-')


def test_options_of_other_methods_do_not_change_the_default_workdir():
  config = app.parse(['main', QUICKSTART])[0]
  before = app.default_workdir('x', config)
  config.method_learning_rates.full = 7.0
  assert app.default_workdir('x', config) == before


def test_help(capsys):
  with pytest.raises(SystemExit) as stop:
    app.parse(['main', '--help'])
  assert stop.value.code == 0
  assert '--workdir=DIR' in capsys.readouterr().out


def test_interruption_by_hand(capsys, tmp_path):
  def main(**kwargs):
    raise KeyboardInterrupt

  with pytest.raises(SystemExit) as stop:
    app.run(main, ['main', QUICKSTART, f'--workdir={tmp_path}'])
  assert stop.value.code == 130
  assert 'continues from the last checkpoint' in capsys.readouterr().err


def test_a_mistake_in_a_real_process(tmp_path):
  done = subprocess.run(
    [sys.executable, '-m', 'losa_scenic.main', QUICKSTART, '--config.batch_sise=3'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert done.returncode == 1
  assert done.stdout == ''
  assert done.stderr.startswith(
    "error: Unknown config key 'batch_sise'. Did you mean 'batch_size'?"
  )
  assert 'Traceback' not in done.stderr
