"""Chooses the recipes of packs.py: on the val splits of four packs, with the test splits unseen.

  python -m losa_scenic.sweep --config=projects/losa/tune.py:DIR --workdir=WORK --slots=2
  python -m losa_scenic.bench_lib.tables WORK/results.jsonl --value=valid_accuracy --scale=100 \
      --rows=dataset --columns=config.lr_configs.base_learning_rate --where=method=linear
"""

import importlib.util
import pathlib
from types import SimpleNamespace
from typing import Any

from losa_scenic.common_lib.types import Config

# Config files are loaded by path, not as a package.
_SPEC = importlib.util.spec_from_file_location(
  'packs', pathlib.Path(__file__).with_name('packs.py')
)
assert _SPEC is not None and _SPEC.loader is not None
packs = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(packs)

TUNED_ON = ('clothing10', 'elpv_solar', 'signdigits', 'omniglot_strokes')


def get_config(directory: str = '.') -> Config:
  """As packs.py, trained on the train split only and judged on the val split."""
  config = packs.get_config(directory)
  config.dataset_configs.train_split = 'train'
  config.evaluate_test = False
  config.method_configs.losa.rank = 16
  return config


def get_hyper(hyper: SimpleNamespace, directory: str = '.') -> list[dict[str, Any]]:
  """Learning rates of every method, and two ranks of LoSA, one seed each."""
  rate = 'config.lr_configs.base_learning_rate'

  def recipe(method: str, **options: tuple[float, ...]) -> list[dict[str, Any]]:
    return hyper.product(
      [
        hyper.fixed('config.method', method),
        hyper.fixed('config.num_training_epochs', packs.METHODS[method]),
        *(hyper.sweep(key, values) for key, values in options.items()),
      ]
    )

  recipes = hyper.chainit(
    [
      recipe('losa', **{rate: (1e-3, 3e-3, 1e-2)}),
      recipe('losa', **{rate: (3e-3,), 'config.method_configs.losa.rank': (64,)}),
      recipe('linear', **{rate: (3e-3, 1e-2, 3e-2)}),
      recipe('full', **{rate: (3e-4, 1e-3)}),
    ]
  )
  return hyper.product([packs.packs(hyper, directory, TUNED_ON), recipes])
