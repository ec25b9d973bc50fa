"""Learning rates: golden values of Scenic's, formulas of the rest, and what is refused."""

import math

import ml_collections
import pytest

from losa_scenic.common_lib import errors
from losa_scenic.train_lib import lr_schedules


def rate(step: int, total_steps: int = 30, **block) -> float:
  config = ml_collections.ConfigDict({'lr_configs': block})
  return float(lr_schedules.get_learning_rate_fn(config, total_steps)(step))


# Scenic at commit 4a38d47: base 0.05, warmup 3, steps_per_cycle = total_steps = 30.
SCENIC = {0: 0.0, 1: 0.016667, 3: 0.05, 10: 0.042156, 20: 0.015098, 29: 0.000169, 30: 0.05}


@pytest.mark.parametrize('step,expected', SCENIC.items())
def test_golden_values_of_scenic(step, expected):
  value = rate(
    step,
    base_learning_rate=0.05,
    factors='constant*linear_warmup*cosine_decay',
    warmup_steps=3,
    steps_per_cycle=30,
    total_steps=30,
  )
  assert value == pytest.approx(expected, abs=5e-7)


def test_defaults_are_constant_warmup_cosine_over_the_run():
  assert rate(15, base_learning_rate=0.2) == pytest.approx(0.1)
  assert rate(10, total_steps=20, base_learning_rate=0.2) == pytest.approx(0.1)


def test_total_steps_of_the_block_go_before_those_of_the_run():
  assert rate(10, total_steps=99, base_learning_rate=0.2) != pytest.approx(0.1)
  block = {'base_learning_rate': 0.2, 'total_steps': 20}
  config = ml_collections.ConfigDict({'lr_configs': block})
  assert float(lr_schedules.get_learning_rate_fn(config, 99)(10)) == pytest.approx(0.1)


@pytest.mark.parametrize('step', [0, 1, 4, 5, 12, 30])
def test_factors_against_their_formulas(step):
  base = {'base_learning_rate': 0.3}
  assert rate(step, factors='constant', **base) == pytest.approx(0.3)
  warm = 0.2 + min(1.0, step / 5) * 0.8
  options = {'warmup_steps': 5, 'warmup_alpha': 0.2}
  assert rate(step, factors='constant*linear_warmup', **base, **options) == pytest.approx(
    0.3 * warm
  )
  share = min(max((step - 5) / 25, 0), 1)
  linear = 0.3 + share * (0.06 - 0.3)
  assert rate(
    step, factors='constant * linear_decay', warmup_steps=5, end_learning_rate=0.06, **base
  ) == pytest.approx(linear)
  pieces = (0.1 if step >= 4 else 1) * (0.5 if step >= 12 else 1)
  assert rate(
    step,
    factors='constant*piecewise_constant',
    decay_events=(4, 12),
    decay_factors=(0.1, 0.5),
    **base,
  ) == pytest.approx(0.3 * pieces)
  cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step / 40)))
  assert rate(
    step, factors='constant*cosine_decay', steps_per_cycle=40, alpha=0.1, **base
  ) == pytest.approx(0.3 * cosine)


@pytest.mark.parametrize(
  'block,part',
  [
    ({'learning_rate_schedule': 'compond'}, "Did you mean 'compound'"),
    ({'factors': 'constant*cosine'}, "Did you mean 'cosine_decay'"),
    ({'warmup_step': 3}, "Did you mean 'warmup_steps'"),
    ({'warmup_steps': 30}, 'below 30'),
    ({'base_learning_rate': -1.0}, 'positive'),
    ({'decay_events': (1, 2), 'decay_factors': (0.1,)}, 'differ in length'),
  ],
)
def test_refused(block, part):
  with pytest.raises(errors.UserError, match=part):
    rate(0, **{'base_learning_rate': 0.1} | block)


def test_a_base_is_required():
  with pytest.raises(errors.UserError, match='base_learning_rate is required'):
    rate(0, factors='constant')


def test_every_factor_is_known_and_no_other():
  for name in lr_schedules.FACTORS:
    assert math.isfinite(rate(7, factors=name, base_learning_rate=0.1))


@pytest.mark.parametrize(
  ('option', 'factors'),
  [
    ({'end_learning_rate': 0.1}, {}),
    ({'alpha': 0.1}, {'factors': 'constant*linear_decay'}),
    ({'warmup_alpha': 0.1}, {'factors': 'constant*cosine_decay'}),
    ({'decay_events': (3,)}, {}),
  ],
)
def test_an_option_that_no_factor_reads_is_refused(option, factors):
  with pytest.raises(errors.UserError, match='would have no effect'):
    lr_schedules.check({'base_learning_rate': 0.1, **option, **factors})
