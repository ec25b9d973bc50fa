"""The table of data sets and the one function that builds them from a config."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from losa_scenic.common_lib import config as config_lib
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Config
from losa_scenic.dataset_lib import dataset_utils, sources
from losa_scenic.model_lib.spec import BackboneSpec

# name -> 'module:function'; the module is imported when the set is asked for. The function takes
# `image_size` and its own options by keyword and returns `sources.Splits`.
DATASETS = {
  'digits': 'losa_scenic.dataset_lib.digits:splits',
  'image_folder': 'losa_scenic.dataset_lib.image_folder:splits',
  'image_pack': 'losa_scenic.dataset_lib.image_pack:splits',
  'sprites': 'losa_scenic.dataset_lib.sprites:splits',
}
TRAIN_SPLITS = ('train', 'trainval')
# Options of `dataset_configs` that every set takes.
COMMON_OPTIONS = ('image_size', 'metric', 'train_split')


def get_dataset(name: str) -> Callable[..., sources.Splits]:
  """Looks a data set up.

  Args:
    name: a key of `DATASETS`.

  Returns:
    Its function `splits(*, image_size, ...) -> sources.Splits`.

  Raises:
    errors.UserError: for an unknown name, naming the nearest one.
  """
  module, function = DATASETS[errors.one_of('dataset', name, DATASETS)].split(':')
  return getattr(importlib.import_module(module), function)


def build_dataset(
  name: str,
  *,
  batch_size: int,
  eval_batch_size: int,
  num_shards: int = 1,
  dtype_str: str = 'uint8',
  shuffle_seed: int = 0,
  image_size: int,
  interpolation: str = 'bicubic',
  dataset_configs: Mapping[str, Any] | None = None,
) -> dataset_utils.Dataset:
  """Builds a data set by name.

  Args:
    name: a key of `DATASETS`.
    batch_size: training images per batch.
    eval_batch_size: validation and test images per batch.
    num_shards: number of devices that share a batch; it must divide both batch sizes.
    dtype_str: 'uint8' or 'float32', see `dataset_utils.make_dataset`.
    shuffle_seed: seed of the training order, at least 0.
    image_size: side of the images in pixels.
    interpolation: how sets of images resize them, unless `dataset_configs` says another: a key of
      `decode.INTERPOLATIONS`.
    dataset_configs: options; None values count as not given. For every set: `train_split` ('train',
      or 'trainval' to train on the training and validation images, with no validation left),
      `metric` ('accuracy' or 'per_class') and `image_size` (in place of the argument). All others
      are options of the set's own function.

  Returns:
    The data set; its fields and `meta_data` are described in `dataset_utils`.

  Raises:
    errors.UserError: for unknown names and options and for values out of range.
  """
  splits_fn = get_dataset(name)
  what = f"dataset '{name}'"
  own = config_lib.to_dict(dataset_configs)
  known = config_lib.options(splits_fn) | set(COMMON_OPTIONS)
  for key in own:
    if key not in known:
      raise errors.unknown(f'option of {what}', key, known)
  image_size = own.pop('image_size', image_size)
  metric = errors.one_of('metric', own.pop('metric', 'accuracy'), dataset_utils.METRICS)
  train_split = errors.one_of('train_split', own.pop('train_split', 'train'), TRAIN_SPLITS)
  dataset_utils.check_at_least('image_size', image_size, 1)
  dataset_utils.check_at_least('num_shards', num_shards, 1)
  _check_divisible('batch_size', batch_size, num_shards)
  _check_divisible('eval_batch_size', eval_batch_size, num_shards)

  if 'interpolation' in known:  # Sprites are drawn in the size they have.
    own.setdefault('interpolation', interpolation)
  splits = config_lib.build(splits_fn, block=own, what=what, image_size=image_size)
  if train_split == 'trainval':
    splits = _train_on_valid(splits, what)
  return dataset_utils.make_dataset(
    splits,
    batch_size=batch_size,
    eval_batch_size=eval_batch_size,
    shuffle_seed=shuffle_seed,
    dtype_str=dtype_str,
    image_size=image_size,
    metric=metric,
    name=name,
    interpolation=own.get('interpolation', ''),
  )


def _train_on_valid(splits: sources.Splits, what: str) -> sources.Splits:
  if splits.valid is None:
    raise errors.UserError(
      f"train_split 'trainval': {what} has no validation images to add; use 'train'."
    )
  train = sources.concat([splits.train, splits.valid])
  return sources.Splits(train, None, splits.test, splits.class_names)


def _check_divisible(option: str, batch_size: int, num_shards: int) -> None:
  dataset_utils.check_at_least(option, batch_size, 1)
  if batch_size % num_shards:
    raise errors.UserError(
      f'{option} {batch_size} cannot be shared by {num_shards} devices: use a multiple of '
      f'{num_shards}.'
    )


def of_run(config: Config, spec: BackboneSpec) -> dataset_utils.Dataset:
  """The dataset that a resolved config (see `run_config`) describes.

  Args:
    config: a run's config.
    spec: the backbone's, whose image size and interpolation are taken unless
      `config.dataset_configs` says others.

  Raises:
    errors.UserError: as `build_dataset`.
  """
  return build_dataset(
    config.dataset_name,
    batch_size=config.batch_size,
    eval_batch_size=config.eval_batch_size,
    dtype_str=config.data_dtype_str,
    shuffle_seed=config.shuffle_seed,
    image_size=spec.image_size,
    interpolation=spec.interpolation,
    dataset_configs=config.dataset_configs,
  )
