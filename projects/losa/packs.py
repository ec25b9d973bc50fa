"""LoSA, linear probing and full fine-tuning on nine image packs of 1,000 training images each.

  python -m losa_scenic.sweep --config=projects/losa/packs.py:DIR --workdir=WORK --slots=2

DIR holds the packs named in `PACKS`. Every run trains on train + val and reports the test split,
three seeds each; the recipes were chosen on the val splits with `tune.py`. No augmentation: the
images are only resized. See README.md here for the results and the time it takes.
"""

from types import SimpleNamespace
from typing import Any

from losa_scenic.common_lib.types import Config
from losa_scenic.train_lib import run_config

# pack -> metric; elpv_solar's test split is 82 % of one class.
PACKS = {
  'cifar10': 'accuracy',
  'clothing10': 'accuracy',
  'tin40': 'accuracy',
  'bccd_cells': 'accuracy',
  'elpv_solar': 'per_class',
  'pneumoniamnist': 'accuracy',
  'signdigits': 'accuracy',
  'omniglot_strokes': 'accuracy',
  'omniglot_alphabet': 'accuracy',
}
# method -> epochs. A step of full fine-tuning costs five times as much.
METHODS = {'linear': 20.0, 'losa': 20.0, 'full': 10.0}
SEEDS = (0, 1, 2)


def get_config(directory: str = '.') -> Config:
  """One run: LoSA on the first pack.

  Args:
    directory: where the packs are.
  """
  config = run_config.default_config()
  config.dataset_name = 'image_pack'
  config.dataset_configs.root = f'{directory}/{next(iter(PACKS))}.npz'
  config.dataset_configs.train_split = 'trainval'
  config.backbone = 'vit_mi8_tin120'
  config.method = 'losa'
  config.method_configs.losa.rank = 64
  config.method_learning_rates.losa = 3e-3
  config.method_learning_rates.linear = 3e-3
  config.method_learning_rates.full = 1e-3
  config.batch_size = 32
  config.eval_batch_size = 250
  config.num_training_epochs = METHODS['losa']
  config.lr_configs.warmup_steps = 50
  config.optimizer_configs.weight_decay = 1e-4
  config.log_summary_steps = 100
  config.checkpoint_steps = 250
  return config


def packs(hyper: SimpleNamespace, directory: str, names: tuple[str, ...]) -> list[dict[str, Any]]:
  """The packs with their metrics, as a sweep."""
  path, metric = 'config.dataset_configs.root', 'config.dataset_configs.metric'
  return hyper.zipit(
    [
      hyper.sweep(path, [f'{directory}/{name}.npz' for name in names]),
      hyper.sweep(metric, [PACKS[name] for name in names]),
    ]
  )


def methods(hyper: SimpleNamespace) -> list[dict[str, Any]]:
  """The methods with what is theirs alone, as a sweep."""
  return hyper.chainit(
    [
      hyper.product(
        [
          hyper.fixed('config.method', method),
          hyper.fixed('config.num_training_epochs', epochs),
          # Pulls the side network towards the identity it starts from.
          *(
            [hyper.fixed('config.optimizer_configs.weight_decay', 5.0)] if method == 'losa' else []
          ),
        ]
      )
      for method, epochs in METHODS.items()
    ]
  )


def get_hyper(hyper: SimpleNamespace, directory: str = '.') -> list[dict[str, Any]]:
  """Packs x methods x seeds."""
  return hyper.product(
    [
      packs(hyper, directory, tuple(PACKS)),
      methods(hyper),
      hyper.sweep('config.rng_seed', SEEDS),
    ]
  )
