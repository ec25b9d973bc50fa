"""`python -m losa_scenic.bench params`."""

import json
import re

import pytest

from losa_scenic import bench


def run(capsys, *arguments: str) -> dict:
  assert bench.main(['params', *arguments]) == 0
  return json.loads(capsys.readouterr().out)


def test_counts_of_the_largest_model_need_no_memory(capsys):
  counts = run(capsys, '--backbone=e/14', '--method=losa', '--set', 'rank=64')
  # 28 channel and 28 token mixers of width 1792 and 256, each with biases and an alpha.
  assert counts['trainable_params'] == 28 * (2 * 64 * (1792 + 256) + 64 * 2 + 1792 + 256 + 2)
  assert counts['frozen_params'] == counts['backbone_params'] == 3_873_342_720


def test_pooling_and_head_are_counted_apart(capsys):
  counts = run(capsys, '--backbone=g/14', '--method=linear', '--pool=gap', '--num_classes=10')
  assert (counts['trainable_params'], counts['head_params']) == (0, 1409 * 10)
  assert counts['frozen_params'] == 1_011_199_616


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--backbone=g/41x', '--method=losa'], 'g/41x'),
    (['--backbone=g/14', '--method=lsa'], "Did you mean 'losa'"),
    (['--backbone=g/14', '--method=losa', '--set', 'rnk=4'], "Did you mean 'rank'"),
    (['--backbone=g/14', '--method=losa', '--set', 'rank=4.5'], 'rank .* must be of type int'),
    (['--backbone=g/14', '--method=losa', '--set', 'rank'], 'NAME=VALUE'),
    (['--backbone=g/14', '--method=losa', '--set', 'rank=4', '--set', 'rank=5'], 'given twice'),
    (['--backbone=g/14', '--method=linear', '--num_classes=0'], 'num_classes'),
  ],
)
def test_mistakes_end_with_one_message(capsys, arguments, message):
  assert bench.main(['params', *arguments]) == 1
  error = capsys.readouterr().err
  assert error.startswith('error: ') and error.count('\n') == 1
  assert re.search(message, error), error
