"""Linear probing, LoSA, ST-Adapter and full fine-tuning on a set of real clips, five seeds each.

  python -m losa_scenic.sweep --config=projects/video/fight.py:DIR --workdir=WORK --slots=2

DIR is a set of clips, such as one folder for each class. Two kinds of labels: those of the set, and
how a clip is played (forward, backward, shuffled), which is exact. No setting was tuned on these
clips; every run reports the test split once, from its last step. See README.md here.
"""

from types import SimpleNamespace
from typing import Any

from losa_scenic.common_lib import config as config_lib
from losa_scenic.common_lib.types import Config

QUICKSTART = config_lib.load_file(__file__, '../../configs/video_quickstart.py')
METHODS = ('linear', 'losa', 'st_adapter', 'full')
# Data set -> method -> epochs: 'auto' has the set's own labels, 'playback' shows every clip three
# times. The mean over single frames is the same however a clip is played: one epoch will do.
SETS = {
  'auto': dict.fromkeys(METHODS, 12.0),
  'playback': {'linear': 1.0, 'losa': 5.0, 'st_adapter': 5.0, 'full': 1.0},
}
SEEDS = (0, 1, 2, 3, 4)


def get_config(directory: str = '.') -> Config:
  """One run: LoSA on the set's own labels.

  Args:
    directory: the clips.
  """
  config = QUICKSTART.get_config(directory)
  config.batch_size = 16
  config.eval_batch_size = 32
  config.num_training_epochs = SETS['auto']['losa']
  config.log_eval_steps = 10_000
  config.checkpoint_steps = 10_000
  return config


def get_hyper(hyper: SimpleNamespace, directory: str = '.') -> list[dict[str, Any]]:
  """Sets x methods x seeds."""
  del directory
  runs = [
    hyper.product(
      [
        hyper.fixed('config.dataset_name', name),
        hyper.fixed('config.method', method),
        hyper.fixed('config.num_training_epochs', number),
      ]
    )
    for name, epochs in SETS.items()
    for method, number in epochs.items()
  ]
  return hyper.product([hyper.sweep('config.rng_seed', SEEDS), hyper.chainit(runs)])
