"""Every method for images with its published options on three packs of 1,000 training images each.

  python -m losa_scenic.sweep --config=projects/losa/all_methods.py:DIR --workdir=WORK --slots=2

DIR holds the packs named in `PACKS`: one natural, one specialised, one structured. Options are
those of configs/methods.py; optimizer and length of training are the same for all, so that the
methods differ in nothing else, except where `LEARNING_RATES` says so. See README.md here.
"""

from types import SimpleNamespace
from typing import Any

from losa_scenic.adapt_lib import methods
from losa_scenic.common_lib import config as config_lib
from losa_scenic.common_lib.types import Config
from losa_scenic.train_lib import run_config

published = config_lib.load_file(__file__, '../../configs/methods.py')

# `temporal` is for clips.
METHODS = sorted(methods.METHODS.keys() - {'temporal'})
# pack -> metric; elpv_solar's test split is 82 % of one class.
PACKS = {'clothing10': 'accuracy', 'elpv_solar': 'per_class', 'signdigits': 'accuracy'}
LEARNING_RATE = 3e-3
# Methods that change the backbone's own matrices take a smaller one.
LEARNING_RATES: dict[str, float] = dict.fromkeys(
  ('full', 'last_k', 'mlp_only', 'attention_only'), 1e-3
)
SEEDS = (0, 1, 2)


def get_config(directory: str = '.') -> Config:
  """One run: LoSA on the first pack.

  Args:
    directory: where the packs are.
  """
  config = run_config.default_config()
  for name in methods.METHODS:
    published.set_options(config, name, published.PUBLISHED[name].options)
    config.method_learning_rates[name] = LEARNING_RATES.get(name, LEARNING_RATE)
  config.dataset_name = 'image_pack'
  config.dataset_configs.root = f'{directory}/{next(iter(PACKS))}.npz'
  config.dataset_configs.train_split = 'trainval'
  config.backbone = 'vit_mi8_tin120'
  config.method = 'losa'
  config.layer_loop = 'unroll'
  config.batch_size = 8
  config.eval_batch_size = 250
  config.num_training_epochs = 3.0
  config.lr_configs.warmup_steps = 30
  config.optimizer_configs.weight_decay = 1e-4
  config.log_summary_steps = 100
  config.checkpoint_steps = 100000
  return config


def get_hyper(hyper: SimpleNamespace, directory: str = '.') -> list[dict[str, Any]]:
  """Seeds x methods x packs: an unfinished sweep has all methods with one seed."""
  path, metric = 'config.dataset_configs.root', 'config.dataset_configs.metric'
  packs = hyper.zipit(
    [
      hyper.sweep(path, [f'{directory}/{name}.npz' for name in PACKS]),
      hyper.sweep(metric, list(PACKS.values())),
    ]
  )
  return hyper.product(
    [
      hyper.sweep('config.rng_seed', SEEDS),
      hyper.sweep('config.method', METHODS),
      packs,
    ]
  )
