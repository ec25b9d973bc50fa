"""ImageNet with a frozen ViT-g, as in Table 7 of the LoSA paper.

  python -m losa_scenic.main --config=configs/imagenet_vitg.py --config.dataset_configs.root=DIR \
      --config.backbone=FILE_OR_DIR --config.method_configs.losa.map_head_lora_rank=0

Published: top-1 accuracy on the 50,000 validation images, with the paper's backbone.

  LoSA              89.0 %   4.8 M trained parameters
  linear probing    88.4 %   --config.method=linear
  full fine-tuning  89.0 %   --config.method=full
  LoRA              88.6 %   --config.method=lora, 18 M

The command's last flag is for backbones that do not pool by 'map', and for LoSA alone (with LoRA:
--config.method_configs.lora.map_head=False). Which ones are public, and what of the recipe is not
from the paper, stands in `large_images.py`.

Download by hand, after registration, the images of ILSVRC 2012 (1,281,167 training images, 1,000
classes, about 145 GB), and sort both parts into one folder a class. The validation images are the
test images of this run, so their folder must be called `test`; links do:

  mkdir DIR && ln -s /data/imagenet/train DIR/train && ln -s /data/imagenet/val DIR/test

  DIR/train/n01440764/n01440764_10026.JPEG ...
  DIR/test/n01440764/ILSVRC2012_val_00000293.JPEG ...

Or --config=configs/imagenet_vitg.py:tfds, for TFDS's imagenet2012 prepared in array_record
format: the root is then the TFDS data folder, and not needed for the default one.
"""

from losa_scenic.common_lib import config as config_lib
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Config

LARGE_IMAGES = config_lib.load_file(__file__, 'large_images.py')


def get_config(dataset_name: str = 'image_folder') -> Config:
  """The run.

  Args:
    dataset_name: 'image_folder' or 'tfds'.
  """
  if errors.one_of('data set', dataset_name, ('image_folder', 'tfds')) == 'tfds':
    # The labels of its own test images are secret.
    return LARGE_IMAGES.recipe('tfds', name='imagenet2012', test='validation')
  return LARGE_IMAGES.recipe('image_folder', val_fraction=0.0)
