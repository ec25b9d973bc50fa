"""Result files and the tables made of them."""

import statistics

import pytest

from losa_scenic.bench_lib import results, tables
from losa_scenic.common_lib import errors


def _row(dataset: str, method: str, accuracy: float, seed: int = 0) -> results.Row:
  return {'dataset': dataset, 'method': method, 'test_accuracy': accuracy, 'seed': seed}


def _table(rows, **options) -> list[str]:
  return tables.table(rows, 'dataset', 'method', 'test_accuracy', **options).split('\n')


FULL = [
  _row('dtd', 'linear', 0.5, 0),
  _row('dtd', 'linear', 0.6, 1),
  _row('dtd', 'losa', 0.7, 0),
  _row('dtd', 'losa', 0.9, 1),
  _row('pets', 'linear', 0.1, 0),
  _row('pets', 'linear', 0.1, 1),
  _row('pets', 'losa', 0.4, 0),
  _row('pets', 'losa', 0.4, 1),
]


def test_full_table():
  spread = 100 * statistics.stdev([0.7, 0.9])
  assert _table(FULL, scale=100, digits=1, reference='linear') == [
    '| dataset | linear | losa |',
    '| --- | ---: | ---: |',
    f'| dtd | 55.0 ± 7.1 (2) | 80.0 ± {spread:.1f} (2) [+25.0] |',
    '| pets | 10.0 ± 0.0 (2) | 40.0 ± 0.0 (2) [+30.0] |',
    '| mean | 32.5 | 60.0 [+27.5] |',
    '',
    "- [±x]: difference to 'linear', over the rows that both have.",
  ]


def test_mean_is_over_row_means_not_over_runs():
  rows = [_row('a', 'm', 1.0, seed) for seed in range(9)] + [_row('b', 'm', 0.0)]
  lines = _table(rows)
  assert lines[3:5] == ['| b | 0.00 (1) |', '| mean | 0.50 |']
  assert any('Unequal numbers of runs' in line and 'b/m: 1' in line for line in lines)


def test_missing_cell_is_excluded_and_noted():
  lines = _table(FULL[:6], scale=100, digits=0, reference='linear')
  assert f'| pets | 10 ± 0 (2) | {tables.MISSING} |' in lines
  assert '| mean | 32 | 80* [+25] |' in lines
  assert "- \\* mean of 'losa' over 1 of 2 rows: no runs for pets." in lines


def test_mixed_settings_are_noted():
  lines = _table([_row('a', 'losa', 0.1), _row('a', 'losa', 0.2)])
  assert any('a/losa pools several runs of seed 0' in line for line in lines)


def test_overrides_serve_as_keys_and_nan_shows():
  rows = [{'config.d': 'a|b', 'config.m': True, 'v': value} for value in (1, float('nan'))]
  lines = tables.table(rows, 'd', 'm', 'v').split('\n')
  assert lines[0] == '| d | True |'
  assert lines[2] == '| a\\|b | nan ± nan (2) |'


@pytest.mark.parametrize(
  ('rows', 'options', 'message'),
  [
    ([], {}, 'no result rows'),
    ([{'datasets': 'a', 'method': 'm', 'test_accuracy': 1}], {}, "Did you mean 'datasets'"),
    ([_row('a', 'm', None)], {}, 'result row 1.*must be a number, got None'),
    ([_row('a', 'm', True)], {}, 'must be a number'),
    (FULL, {'reference': 'linaer'}, "Did you mean 'linear'"),
  ],
)
def test_table_errors(rows, options, message: str):
  with pytest.raises(errors.UserError, match=message):
    _table(rows, **options)


def test_command_line(tmp_path, capsys):
  path = tmp_path / 'results.jsonl'
  results.write_rows(path, FULL)
  keys = ['--rows=dataset', '--columns=method', '--value=test_accuracy', '--digits=1']
  assert tables.main([str(path), *keys, '--scale=100', '--where=dataset=pets']) == 0
  assert '| mean | 10.0 | 40.0 |' in capsys.readouterr().out
  assert tables.main([str(path), *keys, '--where=dataset=pests']) == 2
  assert "error: Unknown value of 'dataset' 'pests'. Did you mean" in capsys.readouterr().err
  assert tables.main([str(tmp_path / 'none'), *keys]) == 2
  assert 'No such file' in capsys.readouterr().err


def test_rows_round_trip(tmp_path):
  path = tmp_path / 'new' / 'rows.jsonl'
  rows = [{'a': 'ü\u2028'}, {'b': 1.5}]
  for count in (1, 2):
    results.write_rows(path, rows * count)
    assert results.read_rows(path) == rows * count
  assert [entry.name for entry in path.parent.iterdir()] == ['rows.jsonl']


def test_a_torn_line_is_named(tmp_path):
  path = tmp_path / 'rows.jsonl'
  path.write_text('{"a": 1}\n{"b":')
  with pytest.raises(errors.UserError, match=r'rows.jsonl:2: not valid JSON'):
    results.read_rows(path)


def test_read_and_write_errors(tmp_path):
  path = tmp_path / 'rows.jsonl'
  path.write_text('\n[1]\n')
  with pytest.raises(errors.UserError, match=r'rows.jsonl:2: expected a JSON object .* got a list'):
    results.read_rows(path)
  path.write_bytes(b'\xff\xfe')
  with pytest.raises(errors.UserError, match='not UTF-8'):
    results.read_rows(path)
  with pytest.raises(errors.UserError, match='is a folder'):
    results.read_object(tmp_path)
  path.write_text('kept')
  with pytest.raises(errors.UserError, match='as JSON'):
    results.write_rows(path, [{'a': object()}])
  assert path.read_text() == 'kept'


def test_tail_shows_the_last_state_of_rewritten_lines(tmp_path):
  path = tmp_path / 'log'
  path.write_bytes(b'old attempt\nnew\n10%\r50%\r\nlast \xff\n\n')
  assert results.tail(path, offset=12) == '  | new\n  | 50%\n  | last \ufffd'
  assert results.tail(path, lines=1) == '  | last \ufffd'
  assert 'gone' in results.tail(tmp_path / 'none')


def test_confidence_intervals_are_students_and_differences_are_of_pairs():
  # t quantiles of a printed table: 97.5 % at 2 degrees of freedom is 4.303.
  runs = {'linear': (0.5, 0.6, 0.4), 'losa': (0.7, 0.9, 0.5)}
  rows = [_row('dtd', name, v, s) for name, values in runs.items() for s, v in enumerate(values)]
  half = 4.303 * 10 / 3**0.5, 4.303 * 20 / 3**0.5
  pairs = 4.303 * statistics.stdev([20, 30, 10]) / 3**0.5
  lines = _table(rows, scale=100, digits=1, reference='linear', confidence=0.95)
  want = f'| dtd | 50.0 ± {half[0]:.1f} (3) | 70.0 ± {half[1]:.1f} (3) [+20.0 ± {pairs:.1f}] |'
  assert lines[2] == want
  assert lines[-1] == '- ±: 95% confidence interval of the mean over the seeds.'
  one = _table([_row('dtd', 'losa', 0.5)], confidence=0.95)
  assert one[2] == '| dtd | 0.50 (1) |'
  for wrong in (0, 1, 1.5):
    with pytest.raises(errors.UserError, match='--confidence'):
      _table(rows, confidence=wrong)
  with pytest.raises(errors.UserError, match='one run of each seed'):
    _table([*rows, _row('dtd', 'losa', 0.8, 0)], reference='linear', confidence=0.9)
