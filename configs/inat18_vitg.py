"""iNaturalist 2018 with a frozen ViT-g, as in Table 7 of the LoSA paper.

  python -m losa_scenic.main --config=configs/inat18_vitg.py --config.dataset_configs.root=DIR \
      --config.backbone=FILE_OR_DIR --config.method_configs.losa.map_head_lora_rank=0

Published: top-1 accuracy on the 24,426 validation images, with the paper's backbone.

  LoSA              81.3 %   4.8 M trained parameters
  linear probing    73.3 %   --config.method=linear
  full fine-tuning  79.8 %   --config.method=full
  LoRA              80.9 %   --config.method=lora, 18 M

The command's last flag is for backbones that do not pool by 'map', and for LoSA alone (with LoRA:
--config.method_configs.lora.map_head=False). Which ones are public, and what of the recipe is not
from the paper, stands in `large_images.py`.

Download by hand from the iNaturalist 2018 competition (437,513 training images, 8,142 classes,
about 120 GB): the images and the annotations of both parts.

  DIR/train2018.json
  DIR/val2018.json         the test images of this run
  DIR/train_val2018/...
  DIR/categories.json      the names of the species, if wanted
"""

from losa_scenic.common_lib import config as config_lib
from losa_scenic.common_lib.types import Config

LARGE_IMAGES = config_lib.load_file(__file__, 'large_images.py')


def get_config() -> Config:
  """The run."""
  return LARGE_IMAGES.recipe('coco')
