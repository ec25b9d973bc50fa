"""`python -m losa_scenic.bench`: counts of one model, and checks of a file of counts."""

import json
import re

import pytest

from losa_scenic import bench


def run(capsys, *arguments: str, command: str = 'params') -> dict:
  assert bench.main([command, *arguments]) == 0
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
    (['--backbone=g/14', '--method=losa', '--set', 'rank=4.5'], 'rank must be of type int'),
    (['--backbone=g/14', '--method=losa', '--set', 'rank'], 'KEY=VALUE'),
    (['--backbone=g/14', '--method=losa', '--set', 'rank=4', '--set', 'rank=5'], 'given twice'),
    (['--backbone=g/14', '--method=linear', '--num_classes=0'], 'num_classes'),
    (['--method=linear'], 'Give --backbone and --method'),
    (['--backbone=B/16', '--method=lora', '--set', 'targets=qurey'], "Did you mean 'query'"),
    (['--backbone=B/16', '--method=lora', '--set', 'alpha=1e400'], 'alpha must be positive'),
    (['--backbone=B/16', '--method=lora+ssf', '--set', 'rank=4'], 'say whose option it is'),
    (['--backbone=B/16', '--method=lora+ssf', '--set', 'vpt.rank=4'], "part of method 'lora.ssf'"),
    (['--backbone=B/16', '--method=vera', '--set', f'seed={10**20}'], 'seed must be in'),
    (['--all=rows.json', '--method=lora'], '--all takes its backbones'),
    (['--all=nothing.json'], 'There is no file nothing.json'),
  ],
)
def test_mistakes_end_with_one_message(capsys, arguments, message):
  assert bench.main(['params', *arguments]) == 1
  error = capsys.readouterr().err
  assert error.startswith('error: ') and error.count('\n') == 1
  assert re.search(message, error), error


@pytest.mark.parametrize(
  ('method', 'option', 'want'),
  [
    ('noah', 'prompts=3', 12 * (3 * 768 + 4 * 5 * 768 + 2 * 768 * 5 + 5 + 768)),
    ('st_adapter', 'kernel=3,1,1', 2 * 12 * (2 * 768 * 384 + 384 + 3 * 384 + 384 + 768)),
    ('lst', 'mlp_dim=backbone', None),
    ('lora', 'alpha=None', 294_912),
    ('lora', 'shared_down=true', None),
    ('lora+ssf', 'lora.rank=4', 294_912 // 2 + 205_824),
  ],
)
def test_texts_become_values_of_the_options_types(capsys, method, option, want):
  counts = run(capsys, '--backbone=B/16', f'--method={method}', '--set', option)
  assert counts['trainable_params'] == want or want is None


ROW = {'backbone': 'test/8', 'method': 'lora', 'set': {'rank': 2}, 'trainable_params': 768}


def check(tmp_path, rows) -> int:
  path = tmp_path / 'rows.json'
  path.write_text(json.dumps(rows))
  return bench.main(['params', f'--all={path}'])


def test_a_file_of_counts_is_checked_row_by_row(capsys, tmp_path):
  union = ROW | {
    'method': 'lora+bitfit',
    'set': {'lora': {'rank': 2}},
    'trainable_params': 768 + 3 * (7 * 32 + 64) + 64,
  }
  clip = {'backbone_options': {'pool': 'map', 'frames': 4}, 'set': {'rank': 2, 'map_head': True}}
  clip |= {'trainable_params': 768 + 2 * 2 * 2 * 32}
  assert check(tmp_path, {'rows': [ROW, union, ROW | clip]}) == 0
  assert '3 of 3 rows' in capsys.readouterr().out
  assert check(tmp_path, {'rows': [ROW, ROW | {'trainable_params': 767}]}) == 1
  out = capsys.readouterr().out
  assert 'WRONG' in out and '768 test/8 lora rank=2, should be 767' in out and '1 of 2' in out


@pytest.mark.parametrize(
  ('rows', 'message'),
  [
    ([], 'no file of parameter counts'),
    ({'rows': []}, 'has no rows'),
    ({'rows': [{}]}, 'no file of parameter counts'),
    ({'rows': [ROW | {'pool': 'map'}]}, "Unknown key in row 0 of .* 'pool'"),
    ({'rows': [ROW | {'set': 4}]}, 'row 0'),
    ({'rows': [ROW | {'backbone_options': 4}]}, 'row 0'),
    ({'rows': [ROW | {'backbone_options': {'frmes': 4}}]}, "Did you mean 'frames'"),
    ({'rows': [ROW | {'method': 'lora+ssf', 'set': {'lora': 5}}]}, "options of 'lora' must be"),
  ],
)
def test_a_bad_file_of_counts(capsys, tmp_path, rows, message):
  assert check(tmp_path, rows) == 1
  assert re.search(message, capsys.readouterr().err)


def test_multiply_accumulates_from_the_command_line(capsys):
  arguments = ['--backbone=B/16', '--method=lora', '--num_classes=10']
  macs = run(capsys, *arguments, command='macs')
  assert macs['macs'] - macs['backbone_macs'] == 12 * 2 * 2 * 8 * 768 * 197
  assert bench.main(['macs', '--backbone=B/16', '--method=lora', '--num_classes=0']) == 1
