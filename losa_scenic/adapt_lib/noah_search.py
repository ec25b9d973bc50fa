"""NOAH's evolutionary search over widths: pure functions of a random generator and a score.

Zhang, Zhou, Liu 2022, Neural Prompt Search, https://arxiv.org/abs/2206.04673, section 3.2; numbers
as in https://github.com/ZhangYuanhan-AI/NOAH. A choice is a tuple of three rows (prompts, LoRA's
ranks, adapters' widths), each with one integer per block and 0 behind its depth.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from losa_scenic.adapt_lib import noah_supernet
from losa_scenic.common_lib import errors

Choice = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Settings:
  """The search; the defaults are the authors'.

  Attributes:
    generations: how often the best are varied.
    population: choices that are compared in a generation.
    top: how many of the best so far are varied.
    mutations: new choices of a generation that are mutations, at most.
    crossovers: new choices of a generation that are crossovers, at most. Random ones fill up.
    mutate_module: probability that a mutation touches a row.
    mutate_depth: probability that it then draws the row's depth anew.
    max_params: more trainable parameters are not considered.
  """

  generations: int = 15
  population: int = 50
  top: int = 10
  mutations: int = 25
  crossovers: int = 25
  mutate_module: float = 0.2
  mutate_depth: float = 0.4
  max_params: int = 640_000

  def __post_init__(self):
    for name in ('population', 'top'):
      if getattr(self, name) < 1:
        raise errors.UserError(f'{name} must be at least 1, got {getattr(self, name)}.')
    for name in ('generations', 'mutations', 'crossovers'):
      if getattr(self, name) < 0:
        raise errors.UserError(f'{name} must not be negative, got {getattr(self, name)}.')
    for name in ('mutate_module', 'mutate_depth'):
      if not 0 <= getattr(self, name) <= 1:
        raise errors.UserError(f'{name} must be in [0, 1], got {getattr(self, name)}.')


@dataclasses.dataclass(frozen=True)
class Generation:
  """What is known after a generation.

  Attributes:
    number: 0 for the first, random one.
    scored: (choice, score) of the choices that were new in it.
    best: (choice, score) of the best so far, the best first.
  """

  number: int
  scored: list[tuple[Choice, float]]
  best: list[tuple[Choice, float]]


def count(choice: Choice, width: int) -> int:
  """Trainable parameters, without the classifier, on a backbone of that width."""
  prompts, rank, bottleneck = choice
  adapters = sum(2 * width * h + h + width for h in bottleneck if h)
  return sum(prompts) * width + sum(rank) * 4 * width + adapters


def sample(rng: np.random.Generator, depth: int) -> Choice:
  """A random choice: uniform over depths, then over the widths of each block within."""
  return tuple(_grown((), _depth(rng, depth), depth, rng) for _ in noah_supernet.MODULES)


def mutate(rng: np.random.Generator, choice: Choice, settings: Settings) -> Choice:
  """Gives some rows another depth. Widths are drawn only for blocks that get the module anew."""
  rows = []
  for row in choice:
    if rng.random() < settings.mutate_module and rng.random() < settings.mutate_depth:
      within = row[: _depth_of(row)]
      row = _grown(within, _depth(rng, len(row)), len(row), rng)
    rows.append(row)
  return tuple(rows)


def crossover(rng: np.random.Generator, one: Choice, other: Choice) -> Choice:
  """Every row whole from one of two choices."""
  return tuple((a, b)[rng.integers(2)] for a, b in zip(one, other, strict=True))


def check_ceiling(depth: int, width: int, settings: Settings) -> None:
  """Raises `UserError` if no choice has so few parameters as `settings.max_params` asks for."""
  shallow = min(noah_supernet.depths(depth))
  row = tuple(min(noah_supernet.WIDTHS) if i < shallow else 0 for i in range(depth))
  least = count((row,) * len(noah_supernet.MODULES), width)
  if least > settings.max_params:
    raise errors.UserError(
      f'max_params must be at least {least}, the fewest that a choice of widths has here, not '
      f'{settings.max_params}.'
    )


def evolve(
  score: Callable[[Choice], float],
  *,
  depth: int,
  width: int,
  rng: np.random.Generator,
  settings: Settings,
) -> Iterator[Generation]:
  """Searches; no choice is scored twice.

  Args:
    score: the higher, the better.
    depth: blocks of the backbone.
    width: its channels, for the count of parameters.
    rng: the source of all randomness.
    settings: the numbers of the search.

  Yields:
    Every generation, `settings.generations` and the random first one; fewer if nothing new is left.

  Raises:
    errors.UserError: if no choice has so few parameters as `settings.max_params` asks for.
  """
  known: dict[Choice, float] = {}
  check_ceiling(depth, width, settings)

  def new(make: Callable[[], Choice], number: int, tries: int) -> list[tuple[Choice, float]]:
    """Up to `number` choices that were never seen, with their scores."""
    found = []
    for _ in range(tries):
      if len(found) >= number:
        break
      choice = make()
      if choice not in known and 0 < count(choice, width) <= settings.max_params:
        known[choice] = score(choice)
        found.append((choice, known[choice]))
    return found

  def parent() -> Choice:
    return best[rng.integers(len(best))][0]

  best: list[tuple[Choice, float]] = []
  for number in range(settings.generations + 1):
    scored = []
    if best:
      wanted = min(settings.mutations, settings.population)
      scored += new(lambda: mutate(rng, parent(), settings), wanted, 10 * wanted)
      wanted = min(settings.crossovers, settings.population - len(scored))
      scored += new(lambda: crossover(rng, parent(), parent()), wanted, 10 * wanted)
    wanted = settings.population - len(scored)
    scored += new(lambda: sample(rng, depth), wanted, 100 * wanted)
    if not best and not scored:
      raise errors.UserError(
        f'No choice of widths was found with at most {settings.max_params} parameters.'
      )
    if not scored:
      return
    # Stable: of equals the one that was found first stays in front.
    best = sorted(best + scored, key=lambda pair: -pair[1])[: settings.top]
    yield Generation(number, scored, best)


def _depth(rng: np.random.Generator, depth: int) -> int:
  return int(rng.choice(noah_supernet.depths(depth)))


def _depth_of(row: Sequence[int]) -> int:
  return next((i for i, value in enumerate(row) if not value), len(row))


def _grown(
  within: tuple[int, ...], last: int, depth: int, rng: np.random.Generator
) -> tuple[int, ...]:
  """`within` cut or continued with random widths to `last` blocks, then 0."""
  more = rng.choice(noah_supernet.WIDTHS, max(0, last - len(within)))
  row = (*within[:last], *(int(value) for value in more))
  return row + (0,) * (depth - len(row))
