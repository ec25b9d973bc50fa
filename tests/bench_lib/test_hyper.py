"""The sweep vocabulary: its algebra, its errors, and the names and flags of runs."""

import itertools
import random
import sys

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from losa_scenic.bench_lib import hyper
from losa_scenic.common_lib import errors

A = hyper.sweep('config.a', [1, 2, 3])
B = hyper.sweep('config.b', ['x', 'y'])
C = hyper.fixed('config.c', 0.5)


def _random_sweep(rng: random.Random, key: str) -> hyper.Sweep:
  values = rng.sample(range(100), rng.randint(1, 5))
  return hyper.sweep(f'config.{key}', values)


def _same(left: hyper.Sweep, right: hyper.Sweep) -> bool:
  return sorted(map(hyper.canonical, left)) == sorted(map(hyper.canonical, right))


def test_examples():
  assert A == [{'config.a': 1}, {'config.a': 2}, {'config.a': 3}]
  assert hyper.fixed('config.c', 1, length=2) == [{'config.c': 1}] * 2
  assert hyper.product([B, C]) == [
    {'config.b': 'x', 'config.c': 0.5},
    {'config.b': 'y', 'config.c': 0.5},
  ]
  assert hyper.zipit([B, hyper.sweep('config.d', [3, 4])]) == [
    {'config.b': 'x', 'config.d': 3},
    {'config.b': 'y', 'config.d': 4},
  ]
  assert hyper.chainit([B, C]) == [{'config.b': 'x'}, {'config.b': 'y'}, {'config.c': 0.5}]
  assert hyper.product([]) == [{}]
  assert hyper.zipit([]) == [{}]


def test_product_varies_the_last_sweep_fastest():
  runs = hyper.product([A, B])
  expected = list(itertools.product([1, 2, 3], ['x', 'y']))
  assert [(run['config.a'], run['config.b']) for run in runs] == expected


def test_zipit_repeats_a_sweep_of_length_one():
  assert hyper.zipit([A, C]) == hyper.product([A, C])
  assert hyper.zipit([A, hyper.product([])]) == A


@pytest.mark.parametrize('seed', range(20))
def test_algebra(seed: int):
  rng = random.Random(seed)
  a, b, c, d = (_random_sweep(rng, key) for key in 'abcd')
  assert len(hyper.product([a, b, c])) == len(a) * len(b) * len(c)
  assert hyper.product([hyper.product([a, b]), c]) == hyper.product([a, b, c])
  assert hyper.product([a, hyper.product([b, c])]) == hyper.product([a, b, c])
  assert _same(hyper.product([a, b]), hyper.product([b, a]))
  assert hyper.product([a, hyper.product([])]) == a == hyper.product([a])
  assert hyper.chainit([hyper.chainit([a, b]), c]) == hyper.chainit([a, b, c])
  assert len(hyper.chainit([a, b, c])) == len(a) + len(b) + len(c)
  left = hyper.product([hyper.chainit([a, b]), d])
  assert left == hyper.chainit([hyper.product([a, d]), hyper.product([b, d])])
  e = hyper.sweep('config.e', range(len(a)))
  assert [run['config.e'] for run in hyper.zipit([a, e])] == list(range(len(a)))
  assert _same(hyper.zipit([a, e]), hyper.zipit([e, a]))


def test_results_share_nothing_with_their_parts():
  part = hyper.sweep('config.a', [1])
  for combined in (hyper.product([part]), hyper.zipit([part]), hyper.chainit([part])):
    combined[0]['config.a'] = 9
  assert part == [{'config.a': 1}]


def test_values_become_plain_json():
  runs = hyper.sweep('config.a', np.logspace(-2, -1, 2))
  assert [type(run['config.a']) for run in runs] == [float, float]
  assert hyper.sweep('config.a', [np.int64(3)]) == [{'config.a': 3}]
  assert hyper.sweep('config.a', (n for n in [(1, 2)])) == [{'config.a': [1, 2]}]


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: hyper.sweep('a.b', [1]), "Did you mean 'config.a.b'"),
    (lambda: hyper.sweep('config.', [1]), 'config.NAME'),
    (lambda: hyper.sweep('config', [1]), 'config.NAME'),
    (lambda: hyper.sweep('config.a=1', [1]), 'config.NAME'),
    (lambda: hyper.sweep(3, [1]), 'config.NAME'),
    (lambda: hyper.sweep('config.a', []), 'empty'),
    (lambda: hyper.sweep('config.a', 'abc'), "'abc'"),
    (lambda: hyper.sweep('config.a', 3), 'list of values, not 3'),
    (lambda: hyper.sweep('config.a', [None]), 'NoneType'),
    (lambda: hyper.sweep('config.a', [{'x': 1}]), 'dict'),
    (lambda: hyper.fixed('config.a', 1, length=0), 'at least 1, got 0'),
    (lambda: hyper.zipit([A, B]), r'unequal lengths \[3, 2\]'),
    (lambda: hyper.zipit([A, A]), "zipit: two sweeps set 'config.a'"),
    (lambda: hyper.product([A, hyper.zipit([A])]), "product: two sweeps set 'config.a'"),
    (lambda: hyper.product(A), 'is not a sweep'),
    (lambda: hyper.product([A, []]), 'is not a sweep'),
    (lambda: hyper.product('abc'), 'expected a list of sweeps'),
    (lambda: hyper.chainit([]), 'empty'),
  ],
)
def test_errors(make, message: str):
  with pytest.raises(errors.UserError, match=message):
    make()


@pytest.mark.parametrize(
  ('value', 'expected'),
  [
    (1e-05, '--config.a=1e-05'),
    (True, '--config.a=True'),
    ('a b', '--config.a=a b'),
    ([4], '--config.a=(4,)'),
    ([], '--config.a=()'),
    ([[1, 2], ['x', "y'"]], "--config.a=((1, 2), ('x', \"y'\"))"),
  ],
)
def test_flag(value, expected: str):
  assert hyper.flag('config.a', value) == expected


def test_flags_are_read_back_by_ml_collections(tmp_path, monkeypatch):
  config = tmp_path / 'c.py'
  config.write_text(
    'import ml_collections\n'
    'def get_config():\n'
    "  return ml_collections.ConfigDict({'t': (1,), 'f': 0.5, 'b': True, 's': 'x', 'n': 1})\n"
  )
  given = {'t': [4, 5], 'f': 1e-05, 'b': False, 's': "a 'b', c=d", 'n': 7}
  overrides = [hyper.flag(f'config.{key}', value) for key, value in given.items()]
  arguments = ['program', f'--config={config}', *overrides]
  monkeypatch.setattr(sys, 'argv', arguments)  # Where config_flags looks for overrides.
  values = flags.FlagValues()
  holder = config_flags.DEFINE_config_file('config', flag_values=values)
  values(arguments)
  assert holder.value.to_dict() == {**given, 't': (4, 5)}


def test_run_names_are_readable_stable_and_unique():
  own = {'config.seed': 1, 'config.adapt.method': 'losa'}
  name = hyper.run_name(own, {})
  assert name.startswith('method=losa,seed=1-')
  assert name == hyper.run_name(dict(reversed(own.items())), {})
  assert name != hyper.run_name(own, {'config.steps': '3'})
  assert hyper.run_name({'config.a.rank': 1, 'config.b.rank': 2}, {}).startswith(
    'a.rank=1,b.rank=2-'
  )
  path = {'config.init': '/data/models/vit b16.npz'}
  assert hyper.run_name(path, {}).startswith('init=vit_b16-')
  assert hyper.run_name({}, {}).startswith('run-')
  values = [1, 1.0, True, '1', 'true', '../x', 'x', 'a' * 500, 'a' * 501, '', ' ', (1, 2), '(1, 2)']
  names = [hyper.run_name(run, {}) for run in hyper.sweep('config.a', values)]
  assert len(set(names)) == len(values)
  assert all(len(name) <= 110 and '/' not in name and ' ' not in name for name in names)


def test_expand(tmp_path):
  config = tmp_path / 'c.py'
  config.write_text(
    'def get_hyper(hyper, arg="none"):\n'
    "  part = hyper.sweep('config.a', [1, 2])\n"
    "  return hyper.chainit([part, part, hyper.fixed('config.b', arg)])\n"
  )
  runs, repeated = hyper.expand(f'{config}:hello')
  assert runs == [{'config.a': 1}, {'config.a': 2}, {'config.b': 'hello'}]
  assert repeated == 2
  assert hyper.expand(str(config))[0][-1] == {'config.b': 'none'}


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('def get_config():\n  return {}\n', r'no get_hyper.*Functions it defines: get_config'),
    ('def get_hyper(hyper):\n  return []\n', 'get_hyper of .* is not a sweep'),
    ('def get_hyper(hyper):\n  return None\n', 'is not a sweep'),
    ("def get_hyper(hyper):\n  return [{'a': 1}]\n", "Did you mean 'config.a'"),
  ],
)
def test_expand_errors(tmp_path, text: str, message: str):
  config = tmp_path / 'c.py'
  config.write_text(text)
  with pytest.raises(errors.UserError, match=message):
    hyper.expand(str(config))


def test_expand_names_a_missing_file(tmp_path):
  with pytest.raises(errors.UserError, match=r'No config file .*nothing.py'):
    hyper.expand(str(tmp_path / 'nothing.py'))
