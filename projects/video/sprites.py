"""LoSA with and without temporal mixers, and a linear probe, on moving sprites.

  python -m losa_scenic.sweep --config=projects/video/sprites.py --workdir=WORK --slots=2

Three labels that only motion tells (see `dataset_lib/moving_sprites.py`); the run is that of
`configs/video_quickstart.py`. See README.md here.
"""

from types import SimpleNamespace
from typing import Any

from losa_scenic.common_lib import config as config_lib
from losa_scenic.common_lib.types import Config

QUICKSTART = config_lib.load_file(__file__, '../../configs/video_quickstart.py')
LABELS = ('direction', 'order', 'speed')
SEEDS = (0, 1, 2)


def get_config() -> Config:
  """One run: LoSA on the direction of motion."""
  config = QUICKSTART.get_config()
  config.log_eval_steps = 10_000
  config.checkpoint_steps = 10_000
  return config


def get_hyper(hyper: SimpleNamespace) -> list[dict[str, Any]]:
  """Seeds x labels x methods."""
  methods = [
    hyper.fixed('config.method', 'losa'),
    hyper.product(
      [
        hyper.fixed('config.method', 'losa'),
        hyper.fixed('config.method_configs.losa.mix_time', False),
      ]
    ),
    hyper.fixed('config.method', 'linear'),
  ]
  return hyper.product(
    [
      hyper.sweep('config.rng_seed', SEEDS),
      hyper.sweep('config.dataset_configs.label', LABELS),
      hyper.chainit(methods),
    ]
  )
