"""Adapts the packaged backbone to handwritten digits with LoSA: a first run, without any download.

  python -m losa_scenic.main --config=configs/quickstart.py

Try also --config.method=linear or any other, --config.method=lora+ssf,
--config.dataset_name=sprites.
"""

from losa_scenic.adapt_lib import methods
from losa_scenic.common_lib.types import Config
from losa_scenic.train_lib import run_config

# With AdamW. Less for what changes the backbone's own matrices, more for what trains few numbers.
LEARNING_RATE = 3e-3
_OWN_MATRICES = ('full', 'last_k', 'mlp_only', 'attention_only')
_FEW_NUMBERS = ('linear', 'head2toe', 'vera', 'dtl')
LEARNING_RATES: dict[str, float] = {
  **dict.fromkeys(_OWN_MATRICES, 1e-3),
  **dict.fromkeys(_FEW_NUMBERS, 1e-2),
}


def get_config() -> Config:
  """The run."""
  config = run_config.default_config()
  config.dataset_name = 'digits'
  config.backbone = 'vit_mi8_tin120'
  config.method = 'losa'
  for method in methods.METHODS:
    config.method_learning_rates[method] = LEARNING_RATES.get(method, LEARNING_RATE)
  config.num_training_epochs = 15.0
  config.batch_size = 32
  config.lr_configs.warmup_steps = 10
  config.optimizer_configs.weight_decay = 1e-4
  config.log_summary_steps = 25
  return config
