"""VTAB-1K with LoSA on ViT-B/16: one task, or a sweep over all 19.

  python -m losa_scenic.main --config=configs/vtab.py:clevr_count --workdir=DIR \
      --config.backbone=ViT-B_16.npz --config.dataset_configs.root=VTAB
  python -m losa_scenic.sweep --config=configs/vtab.py --workdir=DIR \
      --config.backbone=ViT-B_16.npz --config.dataset_configs.root=VTAB
  python -m losa_scenic.bench_lib.tables DIR/results.jsonl --value=test_accuracy --scale=100 \
      --rows=dataset_configs.task --columns=method

By hand: the backbone's weights, ViT-B/16 pretrained on ImageNet-21k (ViT-B_16.npz or the AugReg
one; never compare across the two), and the images. VTAB is the folder of images exported as JPEG
with lists, which NOAH and the papers after it link to: one folder a task with train800.txt,
val200.txt and test.txt. Or --config.dataset_configs.data_path=tfds, where VTAB is a TFDS data
folder with the sets prepared as array_record; there, too, Resisc45 and Diabetic Retinopathy
(btgraham-300) want files downloaded by hand. See `dataset_lib.vtab` for what of this decides which
published numbers are comparable: most need --config.dataset_configs.normalisation=imagenet, those
of VPT and TOAST also data_path=tfds and interpolation=bilinear_tf. Without `normalisation` the
backbone's own is used.

Each run trains on the 800 + 200 images of its task and reports the test accuracy of the last epoch.
Other seeds: --config.rng_seed=1 and another --workdir; three or more for a comparison. To choose
settings: --config.dataset_configs.train_split=train --config.evaluate_test=False.

In Table 1 and Table 11 of the paper (Mercea et al. 2024), LoSA has, as means over natural,
specialized and structured tasks and as the mean of these three:

  rank  parameters  natural  specialized  structured  average
    16      0.19 M     82.8         86.9        65.5     78.4
     8      0.10 M     82.6         87.0        65.3     78.3
     4      0.05 M     82.5         86.5        64.4     77.8

The values of each task are in `PAPER`. The paper does not say with which optimizer, learning rate,
schedule, normalisation, checkpoint and number of seeds. The recipe here is that of NOAH, FacT and
others (AdamW, weight decay 1e-4, batches of 64, 100 epochs, 10 of them of warm-up, cosine) with our
learning rate, see methods.py. It has not been tried on VTAB-1K.
"""

from types import SimpleNamespace
from typing import Any

from losa_scenic.common_lib import config as config_lib
from losa_scenic.common_lib.types import Config
from losa_scenic.dataset_lib import vtab_tasks

methods = config_lib.load_file(__file__, 'methods.py')

# rank -> test accuracy in percent, in the order of `vtab_tasks.TASKS`: Tables 1 and 11.
PAPER = {
  16: (82.5, 92.8, 76.1, 99.7, 90.5, 82.0, 55.8, 86.6, 97.1, 87.0, 76.7)
  + (81.5, 62.3, 48.6, 82.1, 94.2, 61.7, 47.9, 45.6),
  8: (82.2, 92.7, 76.7, 99.7, 90.7, 81.0, 55.4, 86.9, 97.1, 87.4, 76.5)
  + (79.9, 61.8, 48.6, 82.4, 92.3, 61.1, 48.7, 47.3),
  4: (82.7, 93.0, 76.2, 99.7, 89.8, 80.0, 56.1, 86.3, 96.7, 86.7, 76.3)
  + (78.8, 61.4, 48.0, 82.6, 91.7, 58.4, 46.9, 47.6),
}


def get_config(task: str = 'cifar100') -> Config:
  """One task.

  Args:
    task: a key of `vtab_tasks.TASKS` or an alias.
  """
  config = methods.get_config('losa')
  config.dataset_name = 'vtab'
  config.dataset_configs.task = vtab_tasks.find(task).name
  config.dataset_configs.data_path = 'lists'
  config.dataset_configs.interpolation = 'bicubic'
  config.dataset_configs.train_split = 'trainval'
  # Stands for the file that has to be given: training on random weights is refused.
  config.backbone = 'B/16'
  config.checkpoint_steps = 500
  return config


def get_hyper(hyper: SimpleNamespace, task: str = '') -> list[dict[str, Any]]:
  """All tasks; or the one that the config's argument names."""
  names = [vtab_tasks.find(task).name] if task else list(vtab_tasks.TASKS)
  return hyper.sweep('config.dataset_configs.task', names)
