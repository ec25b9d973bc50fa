"""Runs on a quantised backbone, through the program's own entry point."""

import json
import math


def test_a_run_trains_and_is_not_continued_on_other_weights(cli, tmp_path):
  kind = '--config.backbone_quantisation='
  status, printed = cli(f'{kind}w8a8', workdir=tmp_path)
  assert status == 0, printed
  summary = json.loads((tmp_path / 'summary.json').read_text())
  assert summary['backbone_quantisation'] == 'w8a8'
  assert summary['num_steps'] == 4 and math.isfinite(summary['test_loss'])
  for other in ((f'{kind}int8',), ()):
    status, printed = cli(*other, workdir=tmp_path)
    assert status == 1 and 'backbone_quantisation' in printed, printed


def test_what_cannot_train_is_an_error_before_any_step(cli, tmp_path):
  for method, says in (('full', 'trains weight matrices'), ('dora', 'frozen weights themselves')):
    status, printed = cli(
      '--config.backbone_quantisation=int8',
      f'--config.method={method}',
      f'--config.method_learning_rates.{method}=0.1',
      workdir=tmp_path / method,
    )
    assert status == 1 and says in printed, printed
