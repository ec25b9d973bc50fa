"""Adapts a backbone to your own images with LoSA.

  python -m losa_scenic.main --config=configs/finetune.py --config.dataset_configs.root=FOLDER

FOLDER may hold one folder of images for each class, lists of files, a table or more; what it is, is
found out. `python -m losa_scenic.data check FOLDER` tells what is found, and what is wrong with it.
Validation and test images are split off where there are none.

The backbone is the packaged one, small and for 64 pixels, so that this runs everywhere. A larger
one does much better: --config.backbone=FILE_OR_DIR takes public checkpoints (docs/backbones.md),
and images are then made as it wants them. Other settings worth a try: --config.method=linear, lora
or any other; --config.num_training_epochs; --config.lr_configs.base_learning_rate.

Nothing is augmented: with this backbone, random crops (--config.augment.min_crop_area=0.5) and
flips (--config.augment.flip=True) did worse than without on four of six small sets. They are worth
a try with a larger one, and with many images.
"""

from losa_scenic.common_lib import config as config_lib
from losa_scenic.common_lib.types import Config

QUICKSTART = config_lib.load_file(__file__, 'quickstart.py')


def get_config() -> Config:
  """The run: the quickstart's, with learning rates for all methods, on other data."""
  config = QUICKSTART.get_config()
  config.dataset_name = 'auto'
  config.num_training_epochs = 20.0
  return config
