"""What the table of training speed has rows of: this package's own steps, as runs compile them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from losa_scenic.adapt_lib.method import combine
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Array, Config
from losa_scenic.dataset_lib import dataset_utils
from losa_scenic.model_lib.classification_model import ClassificationModel
from losa_scenic.model_lib.spec import BackboneSpec
from losa_scenic.train_lib import population, program, run_config
from losa_scenic.weights_lib import backbones

DTYPES = ('float32', 'bfloat16')
DEVICES = ('cpu', 'gpu')
# Fields of a run's config by dotted names.
Fields = Mapping[str, Any]
# Does so many steps and waits for the end of the last one.
Run = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Setting:
  """What all rows have in common.

  Attributes:
    backbone: a preset, packaged backbone or backbone file of images.
    batch_size: images of a step.
    num_classes: width of the classifier.
    dtype: of compute, of frozen weights, and of all weights of the peers; one of `DTYPES`.
    device: one of `DEVICES`.
    threads: of the peers, on a CPU.
    torch_compile: see `peers.COMPILE`.
  """

  backbone: str = 'B/16'
  batch_size: int = 8
  num_classes: int = 100
  dtype: str = 'float32'
  device: str = 'cpu'
  threads: int = 1
  torch_compile: str = 'off'

  @functools.cached_property
  def spec(self) -> BackboneSpec:
    """The backbone's geometry."""
    return backbones.find(self.backbone, {}).spec

  def images(self) -> np.ndarray:
    """The batch: uint8 [batch_size h w 3]."""
    shape = (self.batch_size, *self.spec.input_shape)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

  def labels(self) -> np.ndarray:
    """Its classes: int32 [batch_size]."""
    return np.arange(self.batch_size, dtype=np.int32) % self.num_classes


class Row(NamedTuple):
  """A row of the table.

  Attributes:
    title: what it is, for people.
    make: prepares it; what it returns is timed.
    library: what it needs beside this package, or ''.
    default: whether it is measured if no rows are named.
    fields: of a train step of this package, what its config sets.
  """

  title: str
  make: Callable[[Setting], Run]
  library: str = ''
  default: bool = True
  fields: Fields | None = None


def config_of(setting: Setting, fields: Fields) -> Config:
  """The config of a run that trains with momentum, as `run_config.resolve` returns it.

  Args:
    setting: what all rows have in common.
    fields: what else is set, by dotted names.

  Raises:
    errors.UserError: for a field that configs do not have, and a value that no run can have.
  """
  config = run_config.default_config()
  common = {
    'backbone': setting.backbone,
    'random_backbone': True,
    'batch_size': setting.batch_size,
    'model_dtype_str': setting.dtype,
    'frozen_dtype_str': setting.dtype,
    'optimizer': 'momentum',
    'lr_configs.base_learning_rate': 1e-3,
    'num_training_steps': 1_000_000,
  }
  try:
    config.update_from_flattened_dict({**common, **fields})
  except (KeyError, TypeError) as e:
    raise errors.UserError(f'Configs do not have one of {sorted(fields)}, or not so.') from e
  return run_config.resolve(config)


def step(fields: Fields, setting: Setting) -> Run:
  """The train step of a run, its state donated from step to step; the batch stays on the device.

  With a feature cache the batch is what the cache keeps of the images.
  """
  spec, config = setting.spec, config_of(setting, fields)
  dataset = dataset_utils.Dataset(
    meta_data={
      'input_shape': (-1, *spec.input_shape),
      'num_classes': setting.num_classes,
      'num_train_examples': setting.batch_size,
    }
  )
  build = program.build_program if config.population is None else population.build_program
  made, state = build(
    rng=jax.random.key(0), config=config, model_cls=ClassificationModel, dataset=dataset
  )
  images: Any = setting.images()
  if made.layout is not None:
    images = jax.jit(functools.partial(made.layout.encode, made.model.flax_model))(
      made.frozen, images
    )
  mask = np.ones(setting.batch_size, np.float32)
  batch = jax.device_put({'inputs': images, 'label': setting.labels(), 'batch_mask': mask})

  def run(steps: int) -> None:
    nonlocal state
    metrics: dict[str, Any] = {}
    for _ in range(steps):
      state, metrics = made.train_step(state, made.frozen, batch)
    jax.block_until_ready(metrics)

  return run


def forward(fields: Fields, setting: Setting) -> Run:
  """Logits of the batch, and nothing that only training needs."""
  model = ClassificationModel(config_of(setting, fields), {'num_classes': setting.num_classes})
  encoder = model.flax_model
  trainable, frozen = model.init_params(jax.random.key(0))
  images = jax.device_put(setting.images())

  def logits(trainable: Any, frozen: Any, images: Array) -> Array:
    result: Any = encoder.apply({'params': combine(trainable, frozen)}, images)
    return result

  compiled = jax.jit(logits, compiler_options=encoder.compiler_options())

  def run(steps: int) -> None:
    result = jnp.zeros(())
    for _ in range(steps):
      result = compiled(trainable, frozen, images)
    result.block_until_ready()

  return run


def trained(title: str, fields: Fields, default: bool = True) -> Row:
  """A row of a train step.

  Args:
    title: what it is, for people.
    fields: what its config sets.
    default: whether it is measured if no rows are named.
  """
  return Row(title, functools.partial(step, fields), default=default, fields=fields)


def _losa(rank: int, **fields: Any) -> Fields:
  return {'method': 'losa', 'method_configs.losa.rank': rank, **fields}


def _option(name: str, value: str) -> Fields:
  return {f'method_configs.losa.{name}': value}


_LORA = {'rank': 32, 'targets': 'qkv,out,fc1,fc2'}
# Side networks that differ in something, as members of a population must.
_EIGHT = 'lr_configs.base_learning_rate=' + '|'.join(f'{i}e-3' for i in range(1, 9))

OWN: dict[str, Row] = {
  'forward': Row('forward only', functools.partial(forward, {'method': 'linear'})),
  'forward_int8': Row(
    'forward only, int8 backbone',
    functools.partial(forward, {'method': 'linear', 'backbone_quantisation': 'w8a8'}),
  ),
  'linear': trained('linear probe', {'method': 'linear'}),
  'losa16': trained('LoSA r=16', _losa(16)),
  'losa64': trained('LoSA r=64', _losa(64)),
  'losa16_int8': trained('LoSA r=16, int8 backbone', _losa(16, backbone_quantisation='w8a8')),
  # The folder is not touched: what would be read from it is computed once.
  'losa16_cached': trained('LoSA r=16, cached features', _losa(16, **{'feature_cache.dir': 'no'})),
  'losa16_x8': trained('eight LoSA r=16 at once', _losa(16, population=_EIGHT)),
  'losa64_fused': trained(
    'LoSA r=64, one kernel for y', _losa(64, **_option('kernel', 'pallas')), default=False
  ),
  'losa64_balanced': trained(
    'LoSA r=64, memory=balanced', _losa(64, **_option('memory', 'balanced')), default=False
  ),
  'losa64_smallest': trained(
    'LoSA r=64, memory=smallest', _losa(64, **_option('memory', 'smallest')), default=False
  ),
  'losa64_int8': trained(
    'LoSA r=64, int8 backbone', _losa(64, backbone_quantisation='w8a8'), default=False
  ),
  'losa64_host': trained(
    'LoSA r=64, backbone in host memory', _losa(64, frozen_memory='host'), default=False
  ),
  'lora32': trained(
    'LoRA r=32',
    {'method': 'lora', **{f'method_configs.lora.{k}': v for k, v in _LORA.items()}},
    default=False,
  ),
  'full': trained('full fine-tuning', {'method': 'full'}, default=False),
}
