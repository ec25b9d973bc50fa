"""The configs for clips: the paper's recipe and parameter counts, and the quickstart."""

import pathlib
import re

import pytest

from losa_scenic import app
from losa_scenic.adapt_lib import methods
from losa_scenic.bench_lib import params
from losa_scenic.common_lib import config, errors
from losa_scenic.train_lib import run_config

ROOT = pathlib.Path(__file__).parents[1]
# Table 2 of the paper, exact: LoSA, ST-Adapter (methods.md, section 2.4).
TABLE_2 = {
  'h': (3_616_048, 127_336_448),
  'g': (4_788_860, 174_909_440),
  'G': (6_531_016, 247_664_640),
  'e': (8_034_068, 310_976_512),
}


def parse(name, *flags):
  run, _ = app.parse(['main', f'--config={ROOT}/configs/{name}', *flags])
  return run_config.resolve(run)


@pytest.mark.parametrize('size', TABLE_2)
def test_kinetics_has_the_published_recipe(size):
  run = parse(f'k400_vivit_{size}.py')
  assert run.backbone == f'vivit-{size.upper() if size == "h" else size}/14x2'
  assert (run.optimizer, run.optimizer_configs.to_dict()['momentum']) == ('momentum', 0.9)
  assert (run.batch_size, run.num_training_epochs) == (64, 30.0)
  assert run.lr_configs.base_learning_rate == 0.04
  assert run.lr_configs.warmup_steps == 2.5 * 240_000 / 64
  fields = run.backbone_configs
  assert (fields.frames, fields.tubelet, fields.image_size) == (32, 2, 224)
  assert run == parse(f'k400_vivit.py:{run.backbone[6]}')
  changes = config.to_dict(fields)
  counts = []
  for method in ('losa', 'st_adapter'):
    given = methods.options(parse(f'k400_vivit_{size}.py', f'--config.method={method}'))
    counts.append(params.count(run.backbone, method, given, changes, 400)['trainable_params'])
  assert tuple(counts) == TABLE_2[size]
  with pytest.raises(errors.UserError, match="'L'"):
    parse('k400_vivit.py:L')


def test_the_published_accuracies_stand_in_the_config():
  text = (ROOT / 'configs' / 'k400_vivit.py').read_text()
  rows = {
    'LoSA': [80.0, 84.0, 84.4, 86.2],
    'linear': [75.0, 80.7, 81.1, 83.1],
    'ST-Adapter': [80.9, 83.9],
    'full': [84.9],
  }
  for name, accuracies in rows.items():
    line = re.search(rf'^  {name} .*$', text, re.M)
    assert [float(number) for number in re.findall(r'(\d\d\.\d) %', line[0])] == accuracies


def test_the_quickstart_draws_clips_and_takes_a_folder():
  drawn = parse('video_quickstart.py')
  assert (drawn.dataset_name, drawn.backbone) == ('moving_sprites', 'vit_mi8_tin120')
  found = parse('video_quickstart.py:/some/clips')
  assert (found.dataset_name, found.dataset_configs.root) == ('auto', '/some/clips')
  for run in (drawn, found):
    assert run.backbone_configs.frames == 8 and run.backbone_configs.factorised
