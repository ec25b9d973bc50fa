"""Places365 with a frozen ViT-g, as in Table 7 of the LoSA paper.

  python -m losa_scenic.main --config=configs/places365_vitg.py --config.dataset_configs.root=DIR \
      --config.backbone=FILE_OR_DIR --config.method_configs.losa.map_head_lora_rank=0

Published: top-1 accuracy on the 36,500 validation images, with the paper's backbone.

  LoSA              61.3 %   4.8 M trained parameters
  linear probing    57.8 %   --config.method=linear
  full fine-tuning  61.1 %   --config.method=full
  LoRA              61.5 %   --config.method=lora, 18 M

The command's last flag is for backbones that do not pool by 'map', and for LoSA alone (with LoRA:
--config.method_configs.lora.map_head=False). Which ones are public, and what of the recipe is not
from the paper, stands in `large_images.py`.

Download by hand the small images of Places365-Standard (1,803,460 training images of 256 x 256
pixels, 365 classes, about 26 GB) and its file lists, and unpack all of them into DIR; then, in it:

  sed 's#^/#data_256/#' places365_train_standard.txt > train.txt
  sed 's#^#val_256/#' places365_val.txt > test.txt
  cut -d ' ' -f 1 categories_places365.txt > classes.txt

  DIR/data_256/a/airfield/00000001.jpg ...
  DIR/val_256/Places365_val_00000001.jpg ...
  DIR/train.txt, test.txt, classes.txt

Or --config=configs/places365_vitg.py:tfds, for TFDS's places365_small prepared in array_record
format: the root is then the TFDS data folder, and not needed for the default one.
"""

from losa_scenic.common_lib import config as config_lib
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Config

LARGE_IMAGES = config_lib.load_file(__file__, 'large_images.py')


def get_config(dataset_name: str = 'image_list') -> Config:
  """The run.

  Args:
    dataset_name: 'image_list' or 'tfds'.
  """
  if errors.one_of('data set', dataset_name, ('image_list', 'tfds')) == 'tfds':
    # The labels of its own test images are secret.
    return LARGE_IMAGES.recipe('tfds', name='places365_small', test='validation')
  return LARGE_IMAGES.recipe('image_list')
