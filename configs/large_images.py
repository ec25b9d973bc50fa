"""The recipe of the LoSA paper for large image sets (Table 12), which its four configs share.

Momentum SGD (0.9), batches of 512, 20,000 steps: linear warm-up over 500, then cosine; learning
rate 0.05, rank 64, 224 pixels. The methods have the options of Table 7 (see `methods.py`). The
paper prints this recipe for LoSA alone; with --config.method=lora or another it is used as it is.

The paper's ViT-g/14, pre-trained on JFT, is not public, so its numbers cannot be expected to the
tenth. `config.backbone` takes public files in its place (names of timm):

  vit_giant_patch14_clip_224.laion2b       the same geometry: 40 layers of 1,408 channels
  eva_giant_patch14_clip_224               the same geometry
  vit_giant_patch16_gap_224                I-JEPA: the same but for patches of 16 pixels
  vit_giant_patch14_dinov2, .._reg4_dinov2 40 layers of 1,536; positions are resampled to 224 pixels
  vit_giantopt_patch16_siglip_256          40 layers of 1,536; pools by 'map' as the paper's does

The count of trained parameters in Table 7 agrees with a LoRA of rank 32 on the pooling head beside
LoSA. Where the backbone has no such head (of those above all but SigLIP), leave it out as the
commands do, --config.method_configs.losa.map_head_lora_rank=0: 4.3 M parameters instead of 4.7 M.

What the paper does not say is ours:

  training      Random resized crops of 8 to 100 % of the area, and flips: what ImageNet classifiers
                are usually trained with. 20,000 steps are 4 to 23 epochs, too few to need more.
  evaluation    The central square of 87.5 % of the shorter side, as with 224 of 256 pixels.
  weight decay  None.
  precision     Frozen weights are stored, and everything is computed, in bfloat16; trained weights
                are stored in float32. The backbone then takes 2 GB, and a batch of 512 keeps about
                15 GB of activations for LoSA, all devices together. Where bfloat16 is slow, give
                --config.frozen_dtype_str=float32 --config.model_dtype_str=float32.

Methods that differentiate through the backbone (full, lora) need --config.remat=True or many
devices at this batch size; LoSA does not.
"""

from losa_scenic.common_lib import config as config_lib
from losa_scenic.common_lib.types import Config
from losa_scenic.train_lib import run_config

METHODS = config_lib.load_file(__file__, 'methods.py')


def recipe(dataset_name: str, **options: str | float | None) -> Config:
  """A run of the recipe.

  Args:
    dataset_name: a data set.
    **options: its options.
  """
  config = run_config.default_config()
  config.dataset_name = dataset_name
  for name, value in options.items():
    config.dataset_configs[name] = value
  config.dataset_configs.central_crop = 0.875
  config.augment.min_crop_area = 0.08
  config.augment.flip = True

  config.backbone = 'g/14'
  config.backbone_configs.image_size = 224
  config.method = 'losa'
  for name, entry in METHODS.PUBLISHED.items():
    METHODS.set_options(config, name, {**entry.options, **entry.large})
  config.frozen_dtype_str = 'bfloat16'
  config.model_dtype_str = 'bfloat16'

  config.optimizer = 'momentum'
  config.optimizer_configs.momentum = 0.9
  config.lr_configs.base_learning_rate = 0.05
  config.lr_configs.warmup_steps = 500
  config.batch_size = 512
  config.num_training_steps = 20_000
  config.checkpoint_steps = 500
  return config
