"""The evolutionary search of NOAH, without any training."""

import dataclasses

import numpy as np
import pytest

from losa_scenic.adapt_lib import methods, noah_search
from losa_scenic.adapt_lib.method import partition, split_head
from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib import presets
from losa_scenic.model_lib.adapted import Adapted

DEPTH, WIDTH = 8, 32
SMALL = noah_search.Settings(generations=4, population=12, top=4, mutations=5, crossovers=4)
ANY = 10**9


def rng(seed=0):
  return np.random.default_rng(seed)


def depth_of(row):
  return sum(value > 0 for value in row)


def is_in_the_space(choice):
  return len(choice) == 3 and all(
    len(row) == DEPTH
    and set(row) <= {0, 1, 5, 10}
    and depth_of(row) in (2, 4, 6, 8)
    and all(row[: depth_of(row)])
    for row in choice
  )


def evolved(score=lambda choice: float(sum(map(sum, choice))), seed=0, **changes):
  settings = dataclasses.replace(SMALL, **{'max_params': ANY} | changes)
  return list(noah_search.evolve(score, depth=DEPTH, width=WIDTH, rng=rng(seed), settings=settings))


def test_defaults_are_the_published_ones():
  s = noah_search.Settings()
  assert (s.generations, s.population, s.top, s.mutations, s.crossovers) == (15, 50, 10, 25, 25)
  assert (s.mutate_module, s.mutate_depth, s.max_params) == (0.2, 0.4, 640_000)


def test_samples_fill_the_space():
  draws = [noah_search.sample(rng(seed), DEPTH) for seed in range(300)]
  assert all(map(is_in_the_space, draws))
  for row in range(3):
    depths = [depth_of(choice[row]) for choice in draws]
    assert all(45 < depths.count(depth) < 110 for depth in (2, 4, 6, 8))
  assert {value for choice in draws for row in choice for value in row} == {0, 1, 5, 10}


def test_mutation_keeps_the_widths_of_blocks_that_keep_the_module():
  settings = noah_search.Settings(mutate_module=1.0, mutate_depth=1.0)
  generator, changed = rng(), 0
  for seed in range(100):
    parent = noah_search.sample(rng(seed), DEPTH)
    child = noah_search.mutate(generator, parent, settings)
    assert is_in_the_space(child)
    for before, after in zip(parent, child, strict=True):
      kept = min(depth_of(before), depth_of(after))
      assert before[:kept] == after[:kept]
      changed += before != after
  assert changed > 150, 'three in four depths are others'


@pytest.mark.parametrize(('module', 'depth', 'share'), [(0.2, 1.0, 0.15), (0.5, 0.4, 0.15)])
def test_mutation_touches_a_row_as_often_as_asked(module, depth, share):
  settings = noah_search.Settings(mutate_module=module, mutate_depth=depth)
  generator, parent = rng(), noah_search.sample(rng(1), DEPTH)
  children = [noah_search.mutate(generator, parent, settings) for _ in range(2000)]
  for row in range(3):  # A depth drawn anew is another one in three of four cases.
    assert abs(np.mean([c[row] != parent[row] for c in children]) - share) < 0.03


def test_crossover_takes_every_row_whole_from_either_parent():
  one, other = noah_search.sample(rng(1), DEPTH), noah_search.sample(rng(2), DEPTH)
  generator = rng()
  children = {noah_search.crossover(generator, one, other) for _ in range(200)}
  assert children == {
    (a, b, c) for a in (one[0], other[0]) for b in (one[1], other[1]) for c in (one[2], other[2])
  }


@pytest.mark.parametrize(
  'choice', [((5, 1, 0), (1, 0, 0), (10, 5, 1)), ((0, 10, 5), (0, 0, 0), (0, 1, 0))]
)
def test_count_is_that_of_the_network(choice):
  spec = presets.preset('test/8')
  names = ('prompts', 'rank', 'bottleneck')
  options = {k: ','.join(map(str, row)) for k, row in zip(names, choice, strict=True)}
  model = Adapted(spec, methods.build('noah', spec, options), 5)
  trainable = split_head(partition(model.param_shapes(), model.method)[0])[0]
  assert noah_search.count(choice, spec.width) == trees.count(trainable)


def test_search_is_seeded_and_scores_no_choice_twice():
  asked = []

  def score(choice):
    asked.append(choice)
    return -abs(noah_search.count(choice, WIDTH) - 9000.0)

  first = evolved(score)
  assert len(asked) == len(set(asked)) == 5 * 12
  assert [len(g.scored) for g in first] == [12] * 5
  assert [g.number for g in first] == [0, 1, 2, 3, 4]
  assert first == evolved(score)
  assert first != evolved(score, seed=1)


def test_best_are_the_best_of_all_that_was_scored():
  seen = []
  for generation in evolved():
    seen += generation.scored
    want = sorted((score for _, score in seen), reverse=True)[:4]
    assert [score for _, score in generation.best] == want
    assert all(pair in seen for pair in generation.best)


def test_search_finds_more_than_chance():
  target = noah_search.sample(rng(7), DEPTH)
  right = lambda choice: float(np.mean(np.asarray(choice) == np.asarray(target)))  # noqa: E731
  gains = []
  for seed in range(8):
    searched = evolved(right, seed, generations=12)
    by_chance = evolved(right, seed, generations=12, mutations=0, crossovers=0)
    gains.append(searched[-1].best[0][1] - by_chance[-1].best[0][1])
  assert np.mean(gains) > 0.02 and np.median(gains) > 0


def test_choices_with_too_many_parameters_are_not_considered():
  asked = []
  evolved(lambda choice: asked.append(choice) or 0.0, max_params=9000)
  counts = [noah_search.count(choice, WIDTH) for choice in asked]
  assert len(asked) > 20 and max(counts) <= 9000


def test_a_ceiling_below_everything_is_a_user_error():
  with pytest.raises(errors.UserError, match='max_params must be at least 514'):
    evolved(max_params=10)


def test_no_generations_is_a_random_search():
  assert [g.number for g in evolved(generations=0)] == [0]


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'population': 0}, 'population must be at least 1, got 0'),
    ({'top': 0}, 'top must be at least 1'),
    ({'generations': -1}, 'generations must not be negative, got -1'),
    ({'mutate_depth': 1.5}, r'mutate_depth must be in \[0, 1\], got 1.5'),
  ],
)
def test_a_number_out_of_range_is_a_user_error(changes, message):
  with pytest.raises(errors.UserError, match=message):
    dataclasses.replace(SMALL, **changes)
