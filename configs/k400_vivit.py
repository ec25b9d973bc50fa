"""Kinetics-400 with a frozen ViViT, as in Table 2 of the LoSA paper: the recipe of Table 13.

  python -m losa_scenic.main --config=configs/k400_vivit_e.py --config.dataset_configs.root=DIR \
      --config.backbone=FILE_OR_DIR

The four configs k400_vivit_{h,g,G,e}.py differ in the size alone; `k400_vivit.py:G` is the same as
k400_vivit_G.py where file names do not tell g from G. Published: top-1 accuracy on the validation
clips, with the paper's backbones, and trained parameters.

              H               g               G               e
  LoSA        80.0 %  3.6 M   84.0 %  4.8 M   84.4 %  6.5 M   86.2 %  8.0 M
  linear      75.0 %          80.7 %          81.1 %          83.1 %
  ST-Adapter  80.9 %  127 M   83.9 %  175 M   out of memory   out of memory
  full        84.9 %  635 M   out of memory   out of memory   out of memory

The paper: momentum SGD (0.9), batches of 64, learning rate 0.04, 30 epochs with 2.5 of warm-up,
then cosine, rank 64, 224 pixels. The methods have the options of Table 2 (see `methods.py`). It
prints this recipe for LoSA alone; with --config.method=linear or another it is used as it is.

The paper's backbones, pre-trained on JFT, are not public. `config.backbone` takes image checkpoints
of the same geometry, which are inflated to clips (`backbone_configs.inflation`); names of timm, of
open_clip for G:

  H   vit_huge_patch14_clip_224.laion2b, vit_huge_patch14_224.mae      32 layers of 1,280
  g   vit_giant_patch14_clip_224.laion2b, eva_giant_patch14_clip_224   40 layers of 1,408
  G   laion/CLIP-ViT-bigG-14-laion2B-39B-b160k                         48 layers of 1,664
  e   none that is exactly it; eva02_enormous_patch14_clip_224         64 layers of 1,792

They have a class token and no pooling head: --config.method_configs.losa.map_head_lora_rank=0.
4,097 tokens are odd in number, which the fused attention of GPUs does not take (docs/video.md).
With --config.random_backbone=True and no file, the preset's random weights are frozen: no accuracy
can be expected of them, but speed and memory are those of the paper's model.

What the paper does not say is ours, after ViViT (Arnab et al. 2021, Table 7 and section 4.1):

  frames         32, every second one; 4 x 3 views in testing, one in validation.
  training       Squares of 87.5 % of the shorter side, scaled by 0.9 to 1.33, anywhere; flips;
                 brightness, contrast and saturation by up to 40 %.
  warm-up        2.5 epochs of the 240,000 clips that Kinetics-400 has about: 9,375 steps.
  weight decay   None.
  precision      Frozen weights are stored, and everything is computed, in bfloat16; trained weights
                 are stored in float32.

DIR holds the annotations of Kinetics-400 and the clips (`dataset_lib/kinetics.py`); clips that are
missing are counted. Another set of clips: --config.dataset_name=clip_folder, for example.
"""

from losa_scenic.common_lib import config as config_lib
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Config
from losa_scenic.train_lib import run_config

METHODS = config_lib.load_file(__file__, 'methods.py')
SIZES = ('H', 'g', 'G', 'e')
_CLIPS = 240_000


def get_config(size: str = 'e') -> Config:
  """The run.

  Args:
    size: of the backbone: 'H', 'g', 'G' or 'e'.
  """
  config = run_config.default_config()
  config.dataset_name = 'kinetics'
  config.dataset_configs.frame_stride = 2
  config.dataset_configs.num_test_clips = 4
  config.dataset_configs.num_test_crops = 3
  config.dataset_configs.central_crop = 0.875
  config.augment.square_crops = True
  config.augment.min_scale = 0.9
  config.augment.max_scale = 1.33
  config.augment.flip = True
  config.augment.color_jitter = 0.4

  config.backbone = f'vivit-{errors.one_of("size", size, SIZES)}/14x2'
  config.backbone_configs.image_size = 224
  config.backbone_configs.frames = 32
  config.backbone_configs.tubelet = 2
  config.method = 'losa'
  for name, entry in METHODS.PUBLISHED.items():
    METHODS.set_options(config, name, {**entry.options, **entry.large})
  config.frozen_dtype_str = 'bfloat16'
  config.model_dtype_str = 'bfloat16'

  config.optimizer = 'momentum'
  config.optimizer_configs.momentum = 0.9
  config.lr_configs.base_learning_rate = 0.04
  config.batch_size = 64
  config.eval_batch_size = 16  # Of 12 views each: a batch of 64 clips would be 3.7 GB.
  config.num_training_epochs = 30.0
  config.lr_configs.warmup_steps = round(2.5 * _CLIPS / config.batch_size)
  config.checkpoint_steps = 1000
  return config
