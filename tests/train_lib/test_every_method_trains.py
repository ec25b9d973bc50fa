"""The quickstart, as a user runs it, with every method: it learns."""

import json

import pytest
from reference import kinds

from losa_scenic.adapt_lib import methods

CHANCE = 0.1  # ten digits


METHODS = [name for name in sorted(methods.METHODS) if 'images' in kinds.of(name)]


@pytest.mark.slow
@pytest.mark.parametrize('method', [*METHODS, 'lora+ssf', 'vpt_deep+adapter'])
def test_the_quickstart_beats_chance(method, spawn, tmp_path):
  run = spawn(
    f'--config.method={method}',
    '--config.backbone=vit_mi8_tin120',
    '--config.random_backbone=False',
    '--config.batch_size=32',
    '--config.num_training_steps=100',
    workdir=tmp_path,
  )
  out, _ = run.communicate()
  assert run.returncode == 0, out
  accuracy = json.loads((tmp_path / 'summary.json').read_text())['test_accuracy']
  assert accuracy > 3 * CHANCE
