"""Searches widths for method 'noah': trains the supernet, then compares choices on the val split.

  python -m losa_scenic.noah_search --config=FILE.py [--config.KEY=VALUE ...] [--workdir=DIR]
    [--generations=15] [--population=50] [--max_params=640000] ...

The supernet trains as any other method does, on the train split; started again with the same
command, training continues from its last checkpoint, and the search begins anew. At the end stand
the options with which `losa_scenic.main` trains the winner from the start, also in search.json.
"""

import argparse
import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from losa_scenic import app
from losa_scenic.adapt_lib import noah_search, noah_supernet
from losa_scenic.common_lib import config as config_lib
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Config
from losa_scenic.dataset_lib import dataset_utils, datasets
from losa_scenic.model_lib import models
from losa_scenic.train_lib import evaluate, run_config, trainer
from losa_scenic.train_lib import workdir as workdir_lib
from losa_scenic.train_lib.program import Program, build_program
from losa_scenic.train_lib.state import TrainState
from losa_scenic.train_lib.writers import Writer
from losa_scenic.weights_lib import backbones

# The test split stays unseen: this chooses hyper-parameters.
_OVERRIDES = (
  '--config.method=noah',
  '--config.method_configs.noah.supernet=True',
  '--config.evaluate_test=False',
)


def search(
  *,
  rng: jax.Array,
  config: Config,
  workdir: pathlib.Path,
  writer: Writer,
  settings: noah_search.Settings,
) -> dict[str, Any]:
  """Trains the supernet and searches.

  Args:
    rng: a key: parameters, augmentation, choices in training. The search is seeded by
      `config.rng_seed`.
    config: a run of method 'noah' with its option `supernet`.
    workdir: outputs.
    writer: measurements of the training.
    settings: the numbers of the search.

  Returns:
    The content of search.json.

  Raises:
    errors.UserError: for bad input, and for data without a validation split.
  """
  config = run_config.resolve(config)
  model_cls = models.get_model_cls(config.model_name)
  spec = backbones.find(config.backbone, config_lib.to_dict(config.backbone_configs)).spec
  dataset = datasets.of_run(config, spec)
  if dataset.valid_ds is None:
    raise errors.UserError(
      'The search compares choices on a validation split, and this data has none (train_split '
      "must be 'train')."
    )
  noah_search.check_ceiling(spec.depth, spec.width, settings)
  given: Any = {'config': config, 'model_cls': model_cls, 'dataset': dataset, 'rng': rng}
  state, _, _ = trainer.train(**given, workdir=workdir, writer=writer)
  program, _ = build_program(**given)
  started = time.monotonic()
  generations = run(
    functools.partial(accuracy, program, state, dataset),
    depth=spec.depth,
    width=spec.width,
    seed=config.rng_seed,
    settings=settings,
  )
  choice, score = generations[-1].best[0]
  content = {
    'widths': dict(zip(noah_supernet.MODULES, choice, strict=True)),
    'valid_accuracy': score,
    'trainable_params': noah_search.count(choice, spec.width),
    'options': options(choice),
    'seconds': time.monotonic() - started,
    'settings': dataclasses.asdict(settings) | {'seed': config.rng_seed},
    'generations': [dataclasses.asdict(generation) for generation in generations],
  }
  workdir_lib.write_json(pathlib.Path(workdir) / 'search.json', content)
  return content


def accuracy(
  program: Program, state: TrainState, dataset: dataset_utils.Dataset, choice: noah_search.Choice
) -> float:
  """Accuracy of a choice on the validation split. All choices share one compiled function."""
  variables = {'architecture': {'side': {'widths': jnp.asarray(choice, jnp.int32)}}}
  chosen = state.replace(model_state=variables)
  return evaluate.evaluate(program, chosen, dataset, 'valid').values['valid_accuracy']


def run(
  score: Callable[[noah_search.Choice], float],
  *,
  depth: int,
  width: int,
  seed: int,
  settings: noah_search.Settings,
) -> list[noah_search.Generation]:
  """All generations, with a bar on a terminal and a line for each."""
  total = (settings.generations + 1) * settings.population
  bar = tqdm.tqdm(
    total=total, unit='choice', dynamic_ncols=True, disable=not sys.stderr.isatty(), leave=False
  )

  def scored(choice: noah_search.Choice) -> float:
    value = score(choice)
    bar.update(1)
    return value

  generations = []
  rng = np.random.default_rng(seed)
  for generation in noah_search.evolve(
    scored, depth=depth, width=width, rng=rng, settings=settings
  ):
    generations.append(generation)
    choice, best = generation.best[0]
    tqdm.tqdm.write(
      f'generation {generation.number}/{settings.generations}  {len(generation.scored)} new  '
      f'best valid accuracy {best:.4f} with {noah_search.count(choice, width):,} parameters',
      file=sys.stderr,
    )
    sys.stderr.flush()
  bar.close()
  return generations


def options(choice: noah_search.Choice) -> list[str]:
  """What to add to `python -m losa_scenic.main --config=FILE.py` to train this choice."""
  return ['--config.method=noah'] + [
    f'--config.method_configs.noah.{name}={",".join(map(str, row))}'
    for name, row in zip(noah_supernet.MODULES, choice, strict=True)
  ]


def _main(*, settings: noah_search.Settings, **given: Any) -> None:
  content = search(**given, settings=settings)
  print(
    f'best of the search: valid accuracy {content["valid_accuracy"]:.4f} with the weights of the '
    f'supernet, {content["trainable_params"]:,} trainable parameters without the head\n'
    'to train it from the start:\n  python -m losa_scenic.main --config=FILE.py \\\n    '
    + ' \\\n    '.join(content['options'])
  )


def parse(argv: Sequence[str]) -> tuple[noah_search.Settings, list[str]]:
  """Command line -> the numbers of the search, and what is left for `app.run`.

  Raises:
    errors.UserError: for a number out of range.
  """
  parser = argparse.ArgumentParser(
    prog='python -m losa_scenic.noah_search',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  for field in dataclasses.fields(noah_search.Settings):
    kind = type(field.default)
    parser.add_argument(
      f'--{field.name}', type=kind, default=field.default, help=f'default {field.default}'
    )
  known, rest = parser.parse_known_args(argv[1:])
  for arg in rest:
    if arg.startswith('--config.method=') and arg != _OVERRIDES[0]:
      raise errors.UserError(f"{arg}: the search is for method 'noah'.")
  return noah_search.Settings(**vars(known)), [argv[0], *rest, *_OVERRIDES]


def main(argv: Sequence[str] | None = None) -> None:
  """Parses the command line and searches."""
  try:
    settings, rest = parse(sys.argv if argv is None else argv)
  except errors.UserError as e:
    print(f'error: {e}', file=sys.stderr)
    sys.exit(1)
  app.run(functools.partial(_main, settings=settings), rest, ends_process=argv is None)


if __name__ == '__main__':
  main()
