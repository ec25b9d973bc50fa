"""Every method with its published settings, as a config and as a table.

  python -m losa_scenic.main --config=configs/methods.py:lora --config.dataset_name=image_folder \
      --config.dataset_configs.root=DIR --config.backbone=FILE

The argument is a method, or several joined by '+'; the recipe is the first one's, also if another
method is then chosen with --config.method. Where a paper prints nothing, the entry says so. The
recipes are those of VTAB-1K, for 1,000 training images: 100 epochs, 10 of them of warm-up, may be
too many on other data. Stochastic depth in the backbone, which some of them have, is left out.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from losa_scenic.adapt_lib import methods
from losa_scenic.common_lib.types import Config
from losa_scenic.train_lib import run_config


@dataclasses.dataclass(frozen=True)
class Recipe:
  """An optimizer and its schedule: cosine after a linear warm-up.

  Attributes:
    optimizer: 'adamw' or 'momentum'.
    learning_rate: at the end of the warm-up.
    weight_decay: decoupled with AdamW, added to the gradient with momentum.
    batch_size: images of a step.
    epochs: length of the training.
    warmup_steps: steps of linear warm-up.
    source: where it is from.
  """

  optimizer: str
  learning_rate: float
  weight_decay: float
  batch_size: int
  epochs: float
  warmup_steps: int
  source: str


RECIPES = {
  'noah': Recipe('adamw', 1e-3, 1e-4, 64, 100.0, 150, 'NOAH, Zhang et al. 2022: its scripts'),
  'vpt': Recipe('momentum', 0.25, 1e-3, 64, 100.0, 150, 'VPT, Jia et al. 2022: appendix, grids'),
  'ssf': Recipe('adamw', 5e-3, 5e-5, 64, 100.0, 150, 'SSF, Lian et al. 2022: its scripts'),
  'dtl': Recipe('adamw', 1e-3, 0.05, 32, 110.0, 310, 'DTL, Fu et al. 2024: its scripts'),
  'adapter_plus': Recipe('adamw', 1e-3, 1e-4, 64, 100.0, 150, 'Steitz and Roth 2024: its configs'),
  'toast': Recipe('momentum', 0.1, 1e-3, 32, 100.0, 310, 'TOAST, Shi et al. 2023: its grids'),
  'head2toe': Recipe('adamw', 0.01, 0.0, 128, 64.0, 0, 'Head2Toe, Evci et al. 2022: README'),
  'vivit': Recipe('momentum', 0.05, 0.0, 64, 30.0, 40, 'ViViT-B FE, Arnab et al. 2021: its config'),
}


@dataclasses.dataclass(frozen=True)
class Published:
  """What is published about one method.

  Attributes:
    source: paper, with what of it is not published.
    recipe: a key of `RECIPES`.
    options: the method's options.
    learning_rate: if another than the recipe's.
    large: options of the LoSA paper's large-scale tables, where it says them.
  """

  source: str
  recipe: str
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  learning_rate: float | None = None
  large: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_FIVE = 'query,key,value,out,mlp'
_LADDER = {'width': 48, 'mlp_dim': 'backbone'}
_NO_RECIPE = 'no settings for images are public; the recipe is ours'

PUBLISHED: dict[str, Published] = {
  'adapter': Published(
    'Pfeiffer et al. 2021, as in NOAH (Zhang et al. 2022)',
    'noah',
    {'bottleneck': 8, 'dropout': 0.1},
  ),
  'adapter_plus': Published('Steitz and Roth 2024', 'adapter_plus', {'drop_path': 0.1}),
  'adaptformer': Published(
    'Chen et al. 2022; width and recipe of the VTAB row by Convpass (Jie and Deng 2022)',
    'noah',
    {'bottleneck': 8, 'scale': 0.1, 'dropout': 0.1},
  ),
  'attention_only': Published(
    'Touvron et al. 2022; the LoSA paper prints no recipe', 'vpt', learning_rate=1e-3
  ),
  'bitfit': Published('Ben Zaken et al. 2022; VTAB row by VPT', 'vpt', learning_rate=0.01),
  'convpass': Published(
    'Jie and Deng 2022; scale and initialisation per task, here the middle of its grid',
    'noah',
    {'bottleneck': 8, 'scale': 1.0, 'dropout': 0.1},
  ),
  'convpass_attn': Published(
    'Jie and Deng 2022; scale per task, here the middle of its grid',
    'noah',
    {'bottleneck': 8, 'scale': 1.0, 'dropout': 0.1},
  ),
  'dora': Published(
    f'Liu et al. 2024; {_NO_RECIPE}, rank and targets as LoRA here',
    'noah',
    {'rank': 8, 'dropout': 0.1},
  ),
  'dtl': Published(
    'Fu et al. 2024; learning rate and drop path per task', 'dtl', {'rank': 2, 'pool': 'mean'}
  ),
  'express': Published(f'Das et al. 2023; {_NO_RECIPE}', 'vpt', {'prompts': 10}),
  'fact_tk': Published(
    'Jie and Deng 2023; rank (16 or 32) and scale per task', 'noah', {'rank': 32, 'dropout': 0.1}
  ),
  'fact_tt': Published(
    'Jie and Deng 2023; rank (4, 8 or 16) and scale per task',
    'noah',
    {'rank': 16, 'dropout': 0.1},
  ),
  'full': Published('VTAB row by VPT (Jia et al. 2022)', 'vpt', learning_rate=1e-3),
  'head2toe': Published(
    'Evci et al. 2022; target size, kept share and coefficient by cross-validation per task',
    'head2toe',
    {'target_size': 512},
  ),
  'hst': Published(
    'Lin et al. 2024; learning rate and weight decay per task',
    'ssf',
    {'meta_tokens': 1},
    learning_rate=1e-3,
  ),
  'last': Published(f'Tang et al. 2024; {_NO_RECIPE}', 'noah', {'rank': 16}),
  'last_k': Published(
    'Partial-k of VPT (Jia et al. 2022), which trains the final norm too; LoSA paper, Table 7',
    'vpt',
    {'k': 1},
    learning_rate=1e-3,
    large={'k': 2},
  ),
  'linear': Published('VTAB row by VPT (Jia et al. 2022)', 'vpt'),
  'lora': Published(
    'Hu et al. 2022; rank and recipe of NOAH (Zhang et al. 2022), which shares A among q, k, v',
    'noah',
    {'rank': 8, 'targets': 'qkv', 'shared_down': True, 'dropout': 0.1},
    large={'rank': 32, 'targets': _FIVE, 'shared_down': False, 'map_head': True},
  ),
  'losa': Published(
    'Mercea et al. 2024, Table 1; no optimizer settings for VTAB are public, the recipe is ours',
    'noah',
    {'rank': 16},
    learning_rate=3e-3,
    large={'rank': 64, 'map_head_lora_rank': 32},
  ),
  'lst': Published(f'Sung et al. 2022; {_NO_RECIPE}', 'noah', learning_rate=3e-3, large=_LADDER),
  'mlp_only': Published('LoSA paper, Table 7, which prints no recipe', 'vpt', learning_rate=1e-3),
  'noah': Published(
    'Zhang et al. 2022; widths by search per task (option `architecture`), here 5 everywhere',
    'noah',
    {'dropout': 0.1},
  ),
  'prefix': Published(
    f'Li and Liang 2021; length as in Res-Tuning (Jiang et al. 2023); {_NO_RECIPE}',
    'noah',
    {'length': 10},
  ),
  'prompt_accumulate': Published(
    'LoSA paper, Tables 7 and 10; the recipe is that of VPT',
    'vpt',
    {'prompts': 16},
    large={'prompts': 16, 'layers': 24},
  ),
  'repadapter': Published(
    'Luo et al. 2023; scale per task, here the middle of its grid',
    'noah',
    {'bottleneck': 8, 'groups': 2, 'scale': 1.0, 'dropout': 0.1},
  ),
  'res_tuning': Published(f'Jiang et al. 2023; {_NO_RECIPE}', 'noah', {'length': 10}),
  'res_tuning_bypass': Published(f'Jiang et al. 2023; {_NO_RECIPE}', 'noah', {'bottleneck': 10}),
  'ssf': Published('Lian et al. 2022; learning rate and weight decay per task', 'ssf'),
  'st_adapter': Published(
    'Pan et al. 2022: d/2 channels as released, where the kernel is 3,1,1; 3,3,3 as in the LoSA '
    'paper, where there are 768 channels. Its video recipe is AdamW 1e-3 at 256 clips',
    'noah',
    {'kernel': '3,3,3'},
    large={'bottleneck': 768, 'kernel': '3,3,3'},
  ),
  'temporal': Published(
    'Arnab et al. 2021 (ViViT, factorised encoder): for Kinetics-400, with the whole model trained '
    'and gradients clipped at norm 1; warm-up is its 2.5 epochs, of 1,000 clips. Beside a frozen '
    'backbone no settings are public, and the residual form is ours',
    'vivit',
    {'depth': 4},
  ),
  'toast': Published(
    'Shi et al. 2023; its feedback module is pre-tuned on ImageNet, here it starts from zero',
    'toast',
  ),
  'toast_lite': Published(
    'Shi et al. 2023; its feedback module is pre-tuned on ImageNet, here it starts from zero',
    'toast',
    {'rank': 4},
  ),
  'vera': Published(
    "Kopiczko et al. 2024; learning rate recalled as about ten times LoRA's",
    'noah',
    {'rank': 256},
    learning_rate=1e-2,
  ),
  'vpt_deep': Published(
    'Jia et al. 2022; prompts (1 to 200) and learning rate per task',
    'vpt',
    {'prompts': 10, 'dropout': 0.1},
  ),
  'vpt_shallow': Published(
    'Jia et al. 2022; prompts (1 to 200) and learning rate per task', 'vpt', {'prompts': 100}
  ),
}


def get_config(method: str = 'losa') -> Config:
  """One run with a method's published options and recipe, on the built-in digits.

  Args:
    method: a method, or several joined by '+'.
  """
  config = run_config.default_config()
  names = methods.parts(method)
  for name, entry in PUBLISHED.items():
    set_options(config, name, entry.options)
    rate = entry.learning_rate or RECIPES[entry.recipe].learning_rate
    config.method_learning_rates[name] = rate
  recipe = RECIPES[PUBLISHED[names[0]].recipe]
  config.method = method
  config.optimizer = recipe.optimizer
  config.optimizer_configs.weight_decay = recipe.weight_decay
  config.lr_configs.warmup_steps = recipe.warmup_steps
  config.batch_size = recipe.batch_size
  config.num_training_epochs = recipe.epochs
  return config


def set_options(config: Config, method: str, options: Mapping[str, Any]) -> None:
  """Writes options into the config's block of the method."""
  for name, value in options.items():
    config.method_configs[method][name] = value
