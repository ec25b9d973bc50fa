"""Makes the packaged backbone: a small ViT at 64 pixels, from scratch on Tiny ImageNet classes.

  XLA_FLAGS=--xla_force_host_platform_device_count=2 python -m losa_scenic.main \
      --config=configs/pretrain_tiny.py --config.dataset_configs.root=tin120_pretrain.npz \
      --workdir=DIR

Expected: 27.9 % of the 6,000 test images, after half an hour on two CPU cores.
Training sees 30 % of the patch tokens of every image (PatchDropout), which is what
makes it affordable on a CPU; evaluation sees all of them.
"""

from losa_scenic.common_lib.types import Config
from losa_scenic.train_lib import run_config


def get_config() -> Config:
  """The run."""
  config = run_config.default_config()
  config.dataset_name = 'image_pack'
  config.backbone = 'Mi/8'
  config.method = 'full'
  config.method_configs.full.token_keep = 0.3
  config.layer_loop = 'unroll'
  config.export_backbone = 'vit_mi8_tin120.safetensors'

  config.batch_size = 256
  config.eval_batch_size = 512
  config.num_training_epochs = 16.0
  config.lr_configs.base_learning_rate = 2e-3
  config.lr_configs.warmup_steps = 300
  config.optimizer_configs.weight_decay = 0.05
  config.max_grad_norm = 1.0
  config.label_smoothing = 0.1
  config.augment.min_crop_area = 0.35
  config.augment.flip = True
  config.augment.color_jitter = 0.2

  config.log_summary_steps = 50
  config.checkpoint_steps = 500
  return config
