"""Makes the packaged backbone: a small ViT at 64 pixels, from scratch on 120 classes of Tiny ImageNet.

Two phases: most of the training sees 30 % of the patch tokens (PatchDropout), which makes a step
three times as fast on a CPU; the end sees all of them.

  XLA_FLAGS=--xla_force_host_platform_device_count=2 python -m losa_scenic.main \
      --config=configs/pretrain_tiny.py --config.dataset_configs.path=tin120_pretrain.npz \
      --workdir=DIR
  ... --config=configs/pretrain_tiny.py:finish --config.backbone=vit_mi8_start.safetensors

On a CPU, one process with as many devices as cores is twice as fast as one device with all cores.
"""

import ml_collections

from losa_scenic.train_lib import run_config


def get_config(phase: str = 'start') -> ml_collections.ConfigDict:
  """The run.

  Args:
    phase: 'start', or 'finish' for the second phase.
  """
  config = run_config.default_config()
  config.dataset_name = 'image_pack'
  config.method = 'full'
  config.batch_size = 256
  config.eval_batch_size = 512
  config.optimizer_configs.weight_decay = 0.05
  config.max_grad_norm = 1.0
  config.label_smoothing = 0.1
  config.augment.min_crop_area = 0.35
  config.augment.flip = True
  config.augment.color_jitter = 0.2
  config.log_summary_steps = 50
  config.checkpoint_steps = 500
  config.layer_loop = 'unroll'
  if phase == 'start':
    config.backbone = 'Mi/8'
    config.method_configs.full.token_keep = 0.3
    config.num_training_epochs = 16.0
    config.lr_configs.base_learning_rate = 2e-3
    config.lr_configs.warmup_steps = 300
    config.export_backbone = 'vit_mi8_start.safetensors'
  else:
    config.backbone = 'vit_mi8_start.safetensors'
    config.num_training_epochs = 2.0
    config.lr_configs.base_learning_rate = 3e-4
    config.lr_configs.warmup_steps = 50
    config.export_backbone = 'vit_mi8_tin120.safetensors'
  return config
