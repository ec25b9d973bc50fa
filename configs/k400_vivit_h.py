"""Kinetics-400 with a frozen ViViT-H; the recipe and what is published stand in `k400_vivit.py`.

  python -m losa_scenic.main --config=configs/k400_vivit_h.py --config.dataset_configs.root=DIR \
      --config.backbone=FILE_OR_DIR
"""

from losa_scenic.common_lib import config as config_lib
from losa_scenic.common_lib.types import Config

K400 = config_lib.load_file(__file__, 'k400_vivit.py')


def get_config() -> Config:
  """The run."""
  return K400.get_config('H')
