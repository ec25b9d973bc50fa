"""The table of data sets and the one function that builds them from a config."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from losa_scenic.common_lib import config as config_lib
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Config
from losa_scenic.dataset_lib import dataset_utils, detect, resize, sources
from losa_scenic.dataset_lib.augment import Augment
from losa_scenic.dataset_lib.clip_reader import Sampling
from losa_scenic.dataset_lib.pipeline import Pipeline
from losa_scenic.model_lib.spec import BackboneSpec

# name -> 'module:function'; the module is imported when it is asked for. The function takes its
# options by keyword (`image_size` too, if it draws its images) and returns `sources.Splits`.
_HERE = 'losa_scenic.dataset_lib'
DATASETS = {
  'clip_folder': f'{_HERE}.clip_folder:splits',
  'clip_list': f'{_HERE}.clip_list:splits',
  'coco': f'{_HERE}.coco:splits',
  'digits': f'{_HERE}.digits:splits',
  'hugging_face': f'{_HERE}.hugging_face:splits',
  'image_folder': f'{_HERE}.image_folder:splits',
  'image_list': f'{_HERE}.image_list:splits',
  'image_pack': f'{_HERE}.image_pack:splits',
  'kinetics': f'{_HERE}.kinetics:splits',
  'moving_sprites': f'{_HERE}.moving_sprites:splits',
  'playback': f'{_HERE}.playback:splits',
  'something_v2': f'{_HERE}.something_v2:splits',
  'sprites': f'{_HERE}.sprites:splits',
  'tar_shards': f'{_HERE}.tar_shards:splits',
  'tfds': f'{_HERE}.tfds_sets:splits',
  'tfds_tfrecord': f'{_HERE}.tfds_tfrecord:splits',
  'vtab': f'{_HERE}.vtab:splits',
}
# Finds out what `root` is, see `detect`.
AUTO = 'auto'
TRAIN_SPLITS = ('train', 'trainval')
# Options of `dataset_configs` that every set takes, and their types.
COMMON_OPTIONS: dict[str, type] = {
  'cache_gigabytes': float,
  'central_crop': float,
  'frame_stride': int,
  'frames_per_second': float,
  'image_size': int,
  'interpolation': str,
  'max_bad_fraction': float,
  'metric': str,
  'normalisation': str,
  'num_test_clips': int,
  'num_test_crops': int,
  'short_clips': str,
  'train_split': str,
}
# What a set that draws its clips is told of the backbone, and no option.
DRAWN = {'frames'}
# Those options that are about frames: only for clips.
CLIP_OPTIONS = tuple(
  field.name for field in dataclasses.fields(Sampling) if field.default is not dataclasses.MISSING
)
# The option `normalisation`: (mean, std) in the place of the backbone's own.
NORMALISATIONS = {
  'imagenet': ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
  'inception': ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
  'unit': ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


def get_dataset(name: str) -> Callable[..., sources.Splits]:
  """Looks a data set up.

  Args:
    name: a key of `DATASETS`.

  Returns:
    Its function `splits(*, ...) -> sources.Splits`.

  Raises:
    errors.UserError: for an unknown name, naming the nearest one.
  """
  module, function = DATASETS[errors.one_of('dataset', name, DATASETS)].split(':')
  return getattr(importlib.import_module(module), function)


def option_types() -> dict[str, type]:
  """Every option of every set and its type (int, float, bool or str).

  Raises:
    TypeError: if two sets have options of one name and different types.
  """
  types = dict(COMMON_OPTIONS)
  for name in DATASETS:
    block = config_lib.placeholders(get_dataset(name))
    for option in set(block) - DRAWN:
      kind = block.get_type(option)
      if types.setdefault(option, kind) is not kind:
        raise TypeError(f"Option {option} of dataset '{name}' has another type elsewhere.")
  return types


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
  frames: int = 0,
  dataset_configs: Mapping[str, Any] | None = None,
  augment: Mapping[str, Any] | None = None,
  workers: int = 0,
  views: int | None = None,
  host: int = 0,
  hosts: int = 1,
) -> dataset_utils.Dataset:
  """Builds a data set by name.

  Args:
    name: a key of `DATASETS`, or 'auto' for whatever is found at the option `root`.
    batch_size: training images per batch, of all hosts together.
    eval_batch_size: validation and test images per batch, of all hosts together.
    num_shards: number of devices that share a batch; it must divide both batch sizes.
    dtype_str: 'uint8' or 'float32', see `Pipeline`.
    shuffle_seed: seed of the training order and of the augmentation, at least 0.
    image_size: side of the images in pixels.
    interpolation: how they are resized, unless `dataset_configs` says another: one of
      `resize.INTERPOLATIONS`.
    frames: frames of a clip; 0 for images.
    dataset_configs: options; None values count as not given. For every set `COMMON_OPTIONS`:
      `train_split` ('train', or 'trainval' to train on the training and validation images, with no
      validation left), `metric` ('accuracy' or 'per_class'), `image_size` and `interpolation` (in
      the place of the arguments), `central_crop` (see `resize.View`), `max_bad_fraction` and
      `cache_gigabytes` (see `Pipeline`), for clips those of `CLIP_OPTIONS` (see
      `clip_reader.Sampling`), and `normalisation`, which is the model's affair (see
      `run_config.resolve`). All others are options of the set's own function.
    augment: fields of `augment.Augment`.
    workers: number of loader processes; 0 for threads.
    views: see `Pipeline`.
    host: number of this host.
    hosts: number of hosts.

  Returns:
    The data set; its fields and `meta_data` are described in `dataset_utils`.

  Raises:
    errors.UserError: for unknown names and options and for values out of range.
  """
  given = config_lib.to_dict(dataset_configs)
  errors.check_at_least('num_shards', num_shards, 1)
  _check_divisible('batch_size', batch_size, num_shards)
  _check_divisible('eval_batch_size', eval_batch_size, num_shards)
  pipeline = make_pipeline(
    given,
    batch_size=batch_size,
    eval_batch_size=eval_batch_size,
    image_size=image_size,
    interpolation=interpolation,
    frames=frames,
    dtype_str=dtype_str,
    shuffle_seed=shuffle_seed,
    augment=augment,
    workers=workers,
    views=views,
    host=host,
    hosts=hosts,
  )
  name, splits = open_splits(name, pipeline.view.image_size, given, frames=frames)
  return dataset_utils.make_dataset(splits, pipeline, name)


def make_pipeline(
  dataset_configs: Mapping[str, Any] | None = None,
  *,
  batch_size: int,
  eval_batch_size: int,
  image_size: int,
  interpolation: str = 'bicubic',
  frames: int = 0,
  dtype_str: str = 'uint8',
  shuffle_seed: int = 0,
  augment: Mapping[str, Any] | None = None,
  workers: int = 0,
  views: int | None = None,
  host: int = 0,
  hosts: int = 1,
) -> Pipeline:
  """What `COMMON_OPTIONS` and the other settings make of any set's images, checked.

  The arguments are those of `build_dataset`; other options than the common ones are not looked at.

  Raises:
    errors.UserError: for a value of a wrong type or out of range.
  """
  common = {k: v for k, v in config_lib.to_dict(dataset_configs).items() if k in COMMON_OPTIONS}
  for key, value in common.items():
    kind = COMMON_OPTIONS[key]
    if type(value) is not kind and not (kind is float and type(value) is int):
      raise errors.UserError(f'{key} must be of type {kind.__name__}, not {value!r}.')
  if 'normalisation' in common:
    errors.one_of('normalisation', common['normalisation'], NORMALISATIONS)
  errors.one_of('train_split', common.get('train_split', 'train'), TRAIN_SPLITS)
  if workers and common.get('cache_gigabytes'):
    raise errors.UserError(
      f'cache_gigabytes {common["cache_gigabytes"]:g} has no effect with {workers} loader '
      'processes, which keep nothing: leave it out, or use threads (num_workers 0).'
    )
  return Pipeline(
    batch_size=batch_size,
    eval_batch_size=eval_batch_size,
    shuffle_seed=shuffle_seed,
    dtype_str=dtype_str,
    view=resize.View(
      common.get('image_size', image_size),
      common.get('interpolation', interpolation),
      common.get('central_crop'),
    ),
    sampling=_sampling(frames, common),
    augment=config_lib.build(Augment, block=augment, what='augment'),
    workers=workers,
    views=views,
    host=host,
    hosts=hosts,
    **{k: common[k] for k in ('metric', 'max_bad_fraction', 'cache_gigabytes') if k in common},
  )


def _sampling(frames: int, options: Mapping[str, Any]) -> Sampling | None:
  given = {name: options[name] for name in CLIP_OPTIONS if name in options}
  if frames:
    return Sampling(frames, **given)
  if given:
    raise errors.UserError(
      f'dataset_configs.{min(given)} is for clips, but the backbone is for images: give '
      '--config.backbone_configs.frames=N.'
    )
  return None


def open_splits(
  name: str, image_size: int, dataset_configs: Mapping[str, Any] | None = None, *, frames: int = 0
) -> tuple[str, sources.Splits]:
  """Opens the images of a data set as they are stored.

  Args:
    name: a key of `DATASETS`, or 'auto' for whatever is found at the option `root`.
    image_size: for sets that draw their images.
    dataset_configs: options as for `build_dataset`.
    frames: for sets that draw clips; 0 for a backbone of images.

  Returns:
    Name of the set, and its images; `train_split` is applied.

  Raises:
    errors.UserError: for unknown names and options and for values out of range.
  """
  own = config_lib.to_dict(dataset_configs)
  if name == AUTO:
    name = detect.detect(own.get('root'))
  splits_fn, what = get_dataset(name), f"dataset '{name}'"
  known = config_lib.options(splits_fn)
  allowed = known - DRAWN | set(COMMON_OPTIONS)
  for key in own:
    if key not in allowed:
      raise errors.unknown(f'option of {what}', key, allowed)
  if 'frames' in known and not frames:
    raise errors.UserError(
      f"Dataset '{name}' draws clips, but the backbone is for images: give "
      '--config.backbone_configs.frames=8.'
    )
  train_split = errors.one_of('train_split', own.get('train_split', 'train'), TRAIN_SPLITS)
  drawn = {
    key: value for key, value in (('image_size', image_size), ('frames', frames)) if key in known
  }
  block = {key: value for key, value in own.items() if key not in COMMON_OPTIONS}
  splits = config_lib.build(splits_fn, block=block, what=what, **drawn)
  return name, _train_on_valid(splits, what) if train_split == 'trainval' else splits


def _train_on_valid(splits: sources.Splits, what: str) -> sources.Splits:
  if splits.valid is None:
    raise errors.UserError(
      f"train_split 'trainval': {what} has no validation images to add; use 'train'."
    )
  train = sources.Concat([splits.train, splits.valid])
  return dataclasses.replace(splits, train=train, valid=None)


def _check_divisible(option: str, batch_size: int, num_shards: int) -> None:
  errors.check_at_least(option, batch_size, 1)
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
    frames=spec.frames,
    dataset_configs=config.dataset_configs,
    augment=config.augment,
    workers=config.num_workers,
    views=config.feature_cache.views,
    host=jax.process_index(),
    hosts=jax.process_count(),
  )
