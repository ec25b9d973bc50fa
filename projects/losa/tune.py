"""Chooses the recipes of packs.py by accuracy on val splits, with the test splits unseen.

  python -m losa_scenic.sweep --config=projects/losa/tune.py:DIR --workdir=WORK --slots=2
  python -m losa_scenic.bench_lib.tables WORK/results.jsonl --value=valid_accuracy --scale=100 \
      --rows=dataset --columns=config.lr_configs.base_learning_rate --where=method=linear

A second sweep, `tune.py:DIR,regularise`, looks for what keeps LoSA from overfitting sets that are
close to the pretraining data: weight decay towards the identity, and a smaller alpha.
"""

from types import SimpleNamespace
from typing import Any

from losa_scenic.common_lib import config as config_lib
from losa_scenic.common_lib.types import Config

packs = config_lib.load_file(__file__, 'packs.py')

RATE = 'config.lr_configs.base_learning_rate'
RANK = 'config.method_configs.losa.rank'
ALPHA = 'config.method_configs.losa.alpha_init'
DECAY = 'config.optimizer_configs.weight_decay'


def get_config(argument: str = '.') -> Config:
  """As packs.py, trained on the train split only and judged on the val split."""
  config = packs.get_config(argument.partition(',')[0])
  config.dataset_configs.train_split = 'train'
  config.evaluate_test = False
  config.method_configs.losa.rank = 16
  config.optimizer_configs.weight_decay = 1e-4
  return config


def get_hyper(hyper: SimpleNamespace, argument: str = '.') -> list[dict[str, Any]]:
  """Learning rates of every method and two ranks of LoSA; or decay and alpha of LoSA."""
  directory, _, stage = argument.partition(',')

  def recipe(method: str, **options: tuple[float, ...]) -> list[dict[str, Any]]:
    return hyper.product(
      [
        hyper.fixed('config.method', method),
        hyper.fixed('config.num_training_epochs', packs.METHODS[method]),
        *(hyper.sweep(key, values) for key, values in options.items()),
      ]
    )

  if stage == 'regularise':
    names = ('tin40', 'cifar10', 'signdigits', 'omniglot_alphabet')
    recipes = hyper.chainit(
      [
        recipe('losa', **{RATE: (3e-3,), RANK: (64,), DECAY: (1e-4, 1.0, 5.0)}),
        recipe('losa', **{RATE: (3e-3,), RANK: (64,), ALPHA: (0.1,)}),
        recipe('losa', **{RATE: (3e-3,), RANK: (64,), DECAY: (5.0,), ALPHA: (0.1,)}),
        recipe('losa', **{RATE: (3e-3,), RANK: (64,), DECAY: (15.0,)}),
      ]
    )
  else:
    names = ('clothing10', 'elpv_solar', 'signdigits', 'omniglot_strokes')
    recipes = hyper.chainit(
      [
        recipe('losa', **{RATE: (1e-3, 3e-3, 1e-2)}),
        recipe('losa', **{RATE: (3e-3,), RANK: (64,)}),
        recipe('linear', **{RATE: (3e-3, 1e-2, 3e-2)}),
        recipe('full', **{RATE: (3e-4, 1e-3)}),
      ]
    )
  return hyper.product([packs.packs(hyper, directory, names), recipes])
