"""iNaturalist 2021 with a frozen ViT-g, as in Table 7 of the LoSA paper.

  python -m losa_scenic.main --config=configs/inat21_vitg.py --config.dataset_configs.root=DIR \
      --config.backbone=FILE_OR_DIR --config.method_configs.losa.map_head_lora_rank=0

Published: top-1 accuracy on the 100,000 validation images, with the paper's backbone.

  LoSA              83.8 %   4.8 M trained parameters
  linear probing    70.1 %   --config.method=linear
  full fine-tuning  82.5 %   --config.method=full
  LoRA              83.3 %   --config.method=lora, 18 M

The command's last flag is for backbones that do not pool by 'map', and for LoSA alone (with LoRA:
--config.method_configs.lora.map_head=False). Which ones are public, and what of the recipe is not
from the paper, stands in `large_images.py`.

Download by hand from the iNaturalist 2021 competition (2,686,843 training images, 10,000 classes,
about 230 GB): the images and the annotations of both parts.

  DIR/train.json
  DIR/val.json             the test images of this run
  DIR/train/...
  DIR/val/...

With train_mini.json and train_mini/, --config.dataset_configs.train_json=train_mini.json trains on
its 500,000 images.
"""

from losa_scenic.common_lib import config as config_lib
from losa_scenic.common_lib.types import Config

LARGE_IMAGES = config_lib.load_file(__file__, 'large_images.py')


def get_config() -> Config:
  """The run."""
  return LARGE_IMAGES.recipe('coco')
