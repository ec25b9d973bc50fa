"""The measurement of checkpoints: sizes that can be counted, nothing left behind."""

import json

import pytest

from losa_scenic import bench

WHAT = ['checkpoint', '--backbone=test/8', '--method=losa', '--num_classes=100', '--saves=2']


@pytest.mark.parametrize('optimizer,copies', [('sgd', 1), ('momentum', 2), ('adamw', 3)])
def test_it_saves_what_trains_and_the_moments_of_the_optimizer(tmp_path, capsys, optimizer, copies):
  assert bench.main([*WHAT, f'--optimizer={optimizer}', f'--folder={tmp_path}']) == 0
  result = json.loads(capsys.readouterr().out)
  size = result['trainable_bytes']
  assert size == 4 * (result['trainable_params'] + result['head_params'])
  # Random float32 numbers shrink by a tenth; the tables of what is there do not grow with them.
  assert 0.85 * copies * size < result['disk_bytes'] < copies * size + 40_000
  assert all(result[name] > 0 for name in result if name.endswith('_ms'))
  assert result['restore_ms'] > result['verify_ms']
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  'option,message',
  [
    ('--saves=0', 'saves must be an integer of at least 1'),
    ('--optimizer=adam', "Did you mean 'adamw'"),
    ('--folder=/nowhere/at/all', 'No such file or directory'),
  ],
)
def test_bad_options_are_one_message(capsys, option, message):
  assert bench.main([*WHAT, option]) == 1
  assert message in capsys.readouterr().err
