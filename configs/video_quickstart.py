"""Adapts the packaged image backbone to clips with LoSA, on a CPU.

  python -m losa_scenic.main --config=configs/video_quickstart.py

draws sprites that move, without any download: only the order of the frames tells the class
(`--config.dataset_configs.label=direction`, order or speed). Of your own clips,

  python -m losa_scenic.main --config=configs/video_quickstart.py:FOLDER

shows 8 frames over 2 seconds. FOLDER may hold one folder of clips for each class, a table or the
annotations of Kinetics or Something-Something; see docs/video.md.

The backbone's patches are inflated to clips, and it sees each frame by itself
(`backbone_configs.factorised`): what frames have to do with each other, LoSA's temporal mixers
learn. Compare --config.method_configs.losa.mix_time=False, --config.method=linear, st_adapter,
full or full+temporal.
"""

from losa_scenic.common_lib import config as config_lib
from losa_scenic.common_lib.types import Config

QUICKSTART = config_lib.load_file(__file__, 'quickstart.py')


def get_config(root: str = '') -> Config:
  """The run.

  Args:
    root: a set of clips; moving sprites when not given.
  """
  config = QUICKSTART.get_config()
  config.backbone_configs.frames = 8
  config.backbone_configs.factorised = True
  config.batch_size = 32
  config.lr_configs.warmup_steps = 20
  config.log_summary_steps = 10
  if root:
    config.dataset_name = 'auto'
    config.dataset_configs.root = root
    config.dataset_configs.frames_per_second = 4.0
    config.num_training_epochs = 20.0
  else:
    config.dataset_name = 'moving_sprites'
    config.dataset_configs.num_train = 1500
    config.num_training_epochs = 4.0
  return config
