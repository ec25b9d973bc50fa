"""The config files: published settings of every method, and what the quickstart sets."""

import pathlib
import re
import subprocess

import cv2
import numpy as np
import pytest
from reference import kinds

from losa_scenic import app
from losa_scenic.adapt_lib import fold, methods
from losa_scenic.bench_lib import params
from losa_scenic.common_lib import config, errors
from losa_scenic.dataset_lib import datasets
from losa_scenic.model_lib import presets, sites
from losa_scenic.train_lib import lr_schedules, run_config

ROOT = pathlib.Path(__file__).parents[1]


def load(name):
  return config.load_file(__file__, f'../configs/{name}.py')


PUBLISHED = load('methods')


def test_every_method_has_published_settings():
  assert list(PUBLISHED.PUBLISHED) == sorted(methods.METHODS)


@pytest.mark.parametrize('method', sorted(methods.METHODS))
@pytest.mark.parametrize('backbone', ['B/16', 'g/14'])
def test_published_options_fit_the_method(method, backbone):
  entry = PUBLISHED.PUBLISHED[method]
  spec = presets.preset(backbone, **kinds.changes(method, frames=32))
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


# Table 7 and Table 12 of the LoSA paper: accuracies of LoSA, linear probing, full and LoRA.
LARGE = {
  'inat18_vitg': ('coco', 81.3, 73.3, 79.8, 80.9),
  'inat21_vitg': ('coco', 83.8, 70.1, 82.5, 83.3),
  'places365_vitg': ('image_list', 61.3, 57.8, 61.1, 61.5),
  'imagenet_vitg': ('image_folder', 89.0, 88.4, 89.0, 88.6),
}


@pytest.mark.parametrize('name', LARGE)
def test_a_large_set_has_the_published_recipe(name):
  file = load(name)
  run = run_config.resolve(file.get_config())
  assert (run.dataset_name, run.method, run.backbone) == (LARGE[name][0], 'losa', 'g/14')
  assert (run.optimizer, run.optimizer_configs.to_dict()['momentum']) == ('momentum', 0.9)
  assert (run.batch_size, run.num_training_steps) == (512, 20_000)
  rates = run.lr_configs
  assert (rates.base_learning_rate, rates.warmup_steps, rates.factors) == (0.05, 500, None)
  assert 'cosine' in lr_schedules.DEFAULT_FACTORS
  assert run.backbone_configs.image_size == 224 and run.evaluate_test
  # 4,746,280 trained parameters: see tests/golden/param_counts.json.
  assert methods.options(run) == {'rank': 64, 'map_head_lora_rank': 32}
  numbers = [float(number) for number in re.findall(r'(\d\d\.\d) %', file.__doc__)]
  assert numbers == list(LARGE[name][1:])
  assert f'--config=configs/{name}.py' in file.__doc__


@pytest.mark.parametrize('method', ['linear', 'full', 'lora', 'bitfit', 'last_k', 'lst'])
def test_a_large_set_takes_the_other_methods_of_the_table(method):
  path = ROOT / 'configs' / 'inat18_vitg.py'
  run, _ = app.parse(['main', f'--config={path}', f'--config.method={method}'])
  options = methods.options(run_config.resolve(run))
  entry = PUBLISHED.PUBLISHED[method]
  assert options == {**entry.options, **entry.large}
  methods.build(method, presets.preset('g/14'), options)


@pytest.mark.parametrize('name', ['places365_vitg', 'imagenet_vitg'])
def test_a_large_set_from_tfds_is_tested_on_the_images_that_have_labels(name):
  path = ROOT / 'configs' / f'{name}.py'
  run, _ = app.parse(['main', f'--config={path}:tfds', '--config.dataset_configs.root=DIR'])
  given = config.to_dict(run.dataset_configs)
  assert run.dataset_name == 'tfds' and given['test'] == 'validation'
  assert set(given) - set(datasets.COMMON_OPTIONS) <= config.options(datasets.get_dataset('tfds'))
  with pytest.raises(errors.UserError, match='image_folder'):
    app.parse(['main', f'--config={path}:image_folder2', '--config.dataset_configs.root=DIR'])


def _splits(name, root):
  """The images that a config finds below `root`."""
  run = load(name).get_config()
  given = config.to_dict(run.dataset_configs)
  fn = datasets.get_dataset(run.dataset_name)
  own = {key: value for key, value in given.items() if key in config.options(fn)}
  return fn(root=str(root), **own)


def test_the_lists_of_places365_are_made_as_its_config_says(tmp_path):
  for file in (
    'data_256/b/bar/indoor/1.jpg',
    'data_256/a/airfield/2.jpg',
    'val_256/Places365_val_3.jpg',
  ):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
  lists = {
    'places365_train_standard': '/b/bar/indoor/1.jpg 1\n/a/airfield/2.jpg 0\n',
    'places365_val': 'Places365_val_3.jpg 1\n',
    'categories_places365': '/a/airfield 0\n/b/bar/indoor 1\n',
  }
  for name, text in lists.items():
    (tmp_path / f'{name}.txt').write_text(text)
  commands = re.findall(r'^  ((?:sed|cut) .*)$', load('places365_vitg').__doc__, re.M)
  subprocess.run(['sh', '-ec', '\n'.join(commands)], cwd=tmp_path, check=True)
  splits = _splits('places365_vitg', tmp_path)
  assert splits.class_names == ('/a/airfield', '/b/bar/indoor')
  assert [record.label for record in splits.train] == [1, 0]
  assert [record.id for record in splits.test] == [str(tmp_path / 'val_256/Places365_val_3.jpg')]
  assert splits.valid is None


def test_nothing_is_split_off_the_training_images_of_imagenet(tmp_path):
  for file in (*(f'train/n1/{i}.JPEG' for i in range(20)), 'test/n1/ILSVRC2012_val_1.JPEG'):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
  splits = _splits('imagenet_vitg', tmp_path)
  assert (len(splits.train), splits.valid, len(splits.test)) == (20, None, 1)


def test_own_images_need_no_other_setting(tmp_path):
  path = ROOT / 'configs' / 'finetune.py'
  run, _ = app.parse(['main', f'--config={path}', f'--config.dataset_configs.root={tmp_path}'])
  assert (run.dataset_name, run.method, run.backbone) == ('auto', 'losa', 'vit_mi8_tin120')
  for method in methods.METHODS:
    run.method = method
    assert run_config.resolve(run).lr_configs.base_learning_rate > 0
  for kind in ('cat', 'dog'):
    (tmp_path / kind).mkdir()
    for i in range(5):
      shade = np.full((40, 60, 3), 20 * i + 100 * (kind == 'dog'), np.uint8)
      cv2.imwrite(str(tmp_path / kind / f'{i}.png'), shade)
  spec = presets.preset('test/8', image_size=16)
  batch = datasets.of_run(run_config.resolve(run), spec).train_ds[0]
  assert batch['inputs'].shape == (32, 16, 16, 3) and set(batch['label']) == {0, 1}


def test_a_config_file_that_is_not_there():
  with pytest.raises(errors.UserError, match=r'no Python file .*nothing\.py'):
    load('nothing')


ROWS = dict(
  re.findall(r'^\| `(\w+)` \| (.* \| [ABCD] \| .*) \|$', (ROOT / 'README.md').read_text(), re.M)
)


@pytest.mark.parametrize('method', sorted(methods.METHODS))
def test_the_readme_says_what_a_method_costs(method):
  changes, options = kinds.changes(method, frames=32), PUBLISHED.PUBLISHED[method].options
  built = methods.build(method, presets.preset('B/16', **changes), options)
  try:
    fold.check(built)
    merges = 'yes'
  except errors.UserError:
    merges = ''
  count = params.count('B/16', method, options, changes)['trainable_params']
  what, where, *rest = (cell.strip() for cell in ROWS[method].split('|'))
  assert what and rest == [built.memory_class, merges, f'{count:,}']
  named = {name for code in re.findall(r'`([\w+]+)`', where) for name in code.split('+')}
  used = {site for table in built.inserts for site in sites.sites_of(table)} | set(built.collect)
  assert named == used or (not named and 'every linear layer and norm' in where)


def test_the_readme_has_a_row_for_every_method_and_no_other():
  assert set(ROWS) == set(methods.METHODS)
