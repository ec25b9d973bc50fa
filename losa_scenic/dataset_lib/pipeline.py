"""How images or clips become batches: every setting of it but the images."""

import dataclasses
import math

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import resize
from losa_scenic.dataset_lib.augment import Augment
from losa_scenic.dataset_lib.clip_reader import Sampling

DTYPES = ('uint8', 'float32')
METRICS = ('accuracy', 'per_class')


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """How images become batches; all but the images.

  Attributes:
    batch_size: training images per batch, of all hosts together.
    eval_batch_size: validation and test images per batch, of all hosts together.
    shuffle_seed: seed of the training order and of the augmentation, at least 0.
    dtype_str: 'uint8' (0..255 as stored) or 'float32' (scaled to [-1, 1]).
    view: what of an image is shown where nothing is augmented.
    sampling: which frames of clips are shown; None for images.
    augment: what is drawn at random in training.
    metric: 'accuracy' (over images) or 'per_class' (mean of the classes' accuracies).
    max_bad_fraction: more unreadable images than this share of a split end the run; in [0, 1).
    cache_gigabytes: a split whose decoded images fit into this much memory is decoded once.
    workers: number of loader processes for training; 0 for threads alone. Images are then not kept:
      each process would keep its own.
    views: of what is drawn at random so many draws, the same for every seed, one an epoch in turn;
      None for a fresh one in every epoch.
    host: number of this host.
    hosts: number of hosts.
  """

  batch_size: int
  eval_batch_size: int
  shuffle_seed: int
  dtype_str: str
  view: resize.View
  sampling: Sampling | None = None
  augment: Augment = dataclasses.field(default_factory=Augment)
  metric: str = 'accuracy'
  max_bad_fraction: float = 0.01
  cache_gigabytes: float = 4.0
  workers: int = 0
  views: int | None = None
  host: int = 0
  hosts: int = 1

  def __post_init__(self):
    """Raises `UserError` for values out of range."""
    errors.one_of('dtype_str', self.dtype_str, DTYPES)
    errors.one_of('metric', self.metric, METRICS)
    errors.check_at_least('batch_size', self.batch_size, 1)
    errors.check_at_least('eval_batch_size', self.eval_batch_size, 1)
    errors.check_at_least('shuffle_seed', self.shuffle_seed, 0)
    errors.check_at_least('workers', self.workers, 0)
    if self.views is not None:
      errors.check_at_least('views', self.views, 1)
    errors.check_at_least('image_size', self.view.image_size, 1)
    if not 0 <= self.max_bad_fraction < 1:
      raise errors.UserError(f'max_bad_fraction must be in [0, 1), not {self.max_bad_fraction}.')
    if not 0 <= self.cache_gigabytes < math.inf:
      raise errors.UserError(f'cache_gigabytes must be at least 0, not {self.cache_gigabytes}.')
    sampling = self.sampling
    if sampling is not None and sampling.num_test_crops > 1 and self.view.central_crop is None:
      raise errors.UserError(
        f'num_test_crops {sampling.num_test_crops} needs central_crop, the side of the squares as '
        'a share of the shorter one: without it a frame is squashed to one square.'
      )
    for name in ('batch_size', 'eval_batch_size'):
      if getattr(self, name) % self.hosts:
        raise errors.UserError(
          f'{name} {getattr(self, name)} cannot be shared by {self.hosts} hosts: use a multiple.'
        )
    if self.augment.mixes and self.batch_size // self.hosts % 2 and self.hosts > 1:
      raise errors.UserError(
        f'Images are mixed in pairs: batch_size {self.batch_size} gives each of {self.hosts} '
        'hosts an odd number of them.'
      )

  def batch_bytes(self, split: str) -> int:
    """Bytes of a batch of one host, labels left out; `split` is 'train', 'valid' or 'test'."""
    count = self.batch_size if split == 'train' else self.eval_batch_size
    views = 1 if self.sampling is None else self.sampling.views(split)
    each = math.prod(self.input_shape) * (4 if self.dtype_str == 'float32' else 1)
    return count // self.hosts * views * each

  @property
  def input_shape(self) -> tuple[int, ...]:
    """Shape of one input of the model: (s, s, 3), or (t, s, s, 3) of clips."""
    image = (self.view.image_size, self.view.image_size, 3)
    return image if self.sampling is None else (self.sampling.num_frames, *image)
