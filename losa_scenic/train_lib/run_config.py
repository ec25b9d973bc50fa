"""Every field of a run's config, with its default: the schema that a config file fills in.

A config file does `config = run_config.default_config()`, sets fields and returns it. The config is
locked, so a misspelt field is an error at once. None means 'not given'.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from losa_scenic.adapt_lib import methods
from losa_scenic.common_lib import config as config_lib
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Config
from losa_scenic.dataset_lib import datasets
from losa_scenic.dataset_lib.augment import Augment
from losa_scenic.model_lib import spec
from losa_scenic.train_lib import feature_config, lr_schedules, members, optimizers


def _options(**types: type) -> Config:
  return ml_collections.ConfigDict({k: config_dict.placeholder(t) for k, t in types.items()})


def default_config() -> Config:
  """The schema; field names are Scenic's where Scenic has the field."""
  c = ml_collections.ConfigDict()
  c.rng_seed = 0  # seeds the parameters
  # Seeds the order of the data and the augmentation; rng_seed if None.
  c.shuffle_seed = config_dict.placeholder(int)

  # Data. The options of all sets (`datasets`); one that the chosen set does not take is an error.
  c.dataset_name = 'digits'  # 'auto': whatever is found at dataset_configs.root
  c.data_dtype_str = 'uint8'  # or 'float32': scaled to [-1, 1] on the host
  c.dataset_configs = _options(**datasets.option_types())
  c.num_workers = 0  # loader processes; 0: threads, which pay where decoding is most of the work
  c.batch_size = 64  # of all devices together
  c.grad_accum_steps = 1  # parts of a batch that are computed one after the other
  c.eval_batch_size = config_dict.placeholder(int)  # batch_size if None

  # What is drawn at random in training: fields of `augment.Augment`, all off.
  c.augment = ml_collections.ConfigDict(dataclasses.asdict(Augment()))

  # Model.
  c.model_name = 'classification'
  c.backbone = 'vit_mi8_tin120'  # packaged name, NAME.json or .safetensors, or a preset 'S/16'
  # Fields of the backbone (`model_lib.spec`): all for a preset; for stored weights the pooling,
  # the preprocessing, and frames, tubelet, factorised and inflation: image backbones for clips;
  # for a public checkpoint also what it does not say.
  c.backbone_configs = _options(
    **{field: kind for field, kind in spec.field_types().items() if field != 'name'}
  )
  c.random_backbone = False  # allow freezing a preset's random weights
  c.method = 'losa'  # or several: 'lora+ssf'
  c.method_configs = ml_collections.ConfigDict(
    {name: config_lib.placeholders(build) for name, build in methods.METHODS.items()}
  )
  c.model_dtype_str = 'float32'  # compute: float32, bfloat16, float16
  c.frozen_dtype_str = 'float32'  # storage of the frozen weights
  # Of the linear layers of the encoder's blocks, which must be frozen: int8, w8a8, float8 or int4.
  c.backbone_quantisation = config_dict.placeholder(str)
  # 'host': the encoder's frozen layers stay in the host's memory, and each visits the device when
  # its turn comes (see `streaming`); for methods that only run the encoder forward.
  c.frozen_memory = 'device'
  # With 'host': parts of the batch that pass a layer one after the other, in each of its visits.
  c.stream_microbatches = 1
  c.layer_loop = 'auto'  # 'scan' or 'unroll' the encoder's layers
  c.remat = False  # recompute layers in the backward pass

  # Several methods, ranks, learning rates, seeds ... at once, over one pass of the backbone, e.g.
  # 'method_configs.losa.rank=4|8 rng_seed=0|1': see `members`. None: the run is one.
  c.population = config_dict.placeholder(object)

  # What a frozen encoder makes of an image is computed once: see `feature_cache`.
  c.feature_cache = feature_config.default()

  # Devices: a batch is split over both axes; the frozen weights of layers over 'fsdp', each device
  # gathering a layer when it comes to it. -1: all that are left.
  c.mesh = ml_collections.ConfigDict({'data': -1, 'fsdp': 1})

  # Optimisation. The learning rate is lr_configs.base_learning_rate if given, else the method's.
  c.trainer_name = 'classification'
  c.num_training_steps = config_dict.placeholder(int)  # goes before num_training_epochs
  c.num_training_epochs = config_dict.placeholder(float)
  c.label_smoothing = 0.0
  c.max_grad_norm = config_dict.placeholder(float)
  # Updates that are not finite are never applied; so many such steps in a row end the run.
  c.max_bad_steps = 3
  c.optimizer = 'adamw'
  c.optimizer_configs = _options(
    weight_decay=float, momentum=float, nesterov=bool, beta1=float, beta2=float, epsilon=float
  )
  c.method_learning_rates = ml_collections.ConfigDict(
    {name: config_dict.placeholder(float) for name in methods.METHODS}
  )
  c.lr_configs = _options(
    learning_rate_schedule=str,
    factors=str,
    base_learning_rate=float,
    total_steps=int,
    warmup_steps=int,
    warmup_alpha=float,
    steps_per_cycle=int,
    alpha=float,
    end_learning_rate=float,
    decay_events=tuple,
    decay_factors=tuple,
  )

  # Logging, evaluation, checkpoints: in steps; None = once an epoch.
  c.log_summary_steps = 50
  c.log_eval_steps = config_dict.placeholder(int)
  c.evaluate_test = True  # False while choosing hyper-parameters: the test split stays unseen
  c.checkpoint = True
  c.checkpoint_steps = config_dict.placeholder(int)
  c.checkpoint_minutes = 10.0  # and whenever the last one is so old; 0: never
  c.max_checkpoint_keep = 2
  c.watchdog_seconds = 120.0  # say what the run waits for if it takes longer; 0: never
  c.hang_limit_seconds = config_dict.placeholder(float)  # end the run if it takes longer
  c.profile_steps = 0  # trace so many steps of this process for TensorBoard
  # Write the tuned backbone, what was inserted merged into it, in float16, as this
  # NAME.safetensors. Not every method can be merged.
  c.export_backbone = ''
  return c.lock()


# Fields that may differ when a run is continued: they do not change what is computed.
MAY_CHANGE = (
  'dataset_configs.cache_gigabytes',
  'dataset_configs.max_bad_fraction',
  'checkpoint',
  'checkpoint_minutes',
  'checkpoint_steps',
  'eval_batch_size',
  'export_backbone',
  'frozen_memory',
  'hang_limit_seconds',
  'max_bad_steps',
  'max_checkpoint_keep',
  'mesh',
  'num_workers',
  'profile_steps',
  'stream_microbatches',
  'watchdog_seconds',
)


def check(config: Config) -> None:
  """Raises `UserError` for a key nobody knows or a value no run can have.

  Names of functions and their options are looked up here, so that a misspelt one is an error before
  any data is read.
  """
  schema = default_config()
  config_lib.check_keys(config, schema)
  config_lib.check_types(config, schema)
  names, given = methods.parts(config.method), methods.options(config)
  for name in names:
    _check_options('method', methods.METHODS, name, given if len(names) == 1 else given[name])
  _check_options(
    'optimizer',
    optimizers.OPTIMIZERS,
    config.optimizer,
    config_lib.to_dict(config.optimizer_configs),
  )
  lr_schedules.check(config_lib.to_dict(config.lr_configs))
  _at_least('num_workers', config.num_workers, 0)
  for field in (
    'batch_size',
    'grad_accum_steps',
    'log_summary_steps',
    'max_bad_steps',
    'max_checkpoint_keep',
  ):
    _at_least(field, config[field], 1)
  for field in ('checkpoint_minutes', 'watchdog_seconds', 'profile_steps'):
    _at_least(field, config[field], 0)
  if config.hang_limit_seconds is not None:
    _above('hang_limit_seconds', config.hang_limit_seconds, 0)
  for field in ('eval_batch_size', 'log_eval_steps', 'checkpoint_steps', 'num_training_steps'):
    if config[field] is not None:
      _at_least(field, config[field], 1)
  if config.num_training_steps is None:
    if config.num_training_epochs is None:
      raise errors.UserError('Give num_training_steps or num_training_epochs.')
    _above('num_training_epochs', config.num_training_epochs, 0)
  if config.max_grad_norm is not None:
    _above('max_grad_norm', config.max_grad_norm, 0)
  if config.shuffle_seed is not None:
    _at_least('shuffle_seed', config.shuffle_seed, 0)
  _at_least('rng_seed', config.rng_seed, 0)
  Augment(**config.augment)
  feature_config.check(config)
  if config.export_backbone and config.frozen_memory == 'host':
    raise errors.UserError(
      "export_backbone needs the backbone whole, and with frozen_memory 'host' it is packed: leave "
      "one of the two out. The finished run may be continued with frozen_memory 'device'."
    )
  _check_population(config, schema)
  if not 0 <= config.label_smoothing < 1:
    raise errors.UserError(f'label_smoothing must be in [0, 1): {config.label_smoothing}.')


def _check_population(config: Config, schema: Config) -> None:
  """Raises `UserError` for members that no run can have, and for what they cannot share."""
  if members.parse(config.population, schema) is None:
    return
  if config.grad_accum_steps > 1:
    raise errors.UserError(
      'grad_accum_steps: the members of a population share a pass over the whole batch, which is '
      'not computed in parts. Use a smaller batch_size, or leave population out.'
    )
  if config.export_backbone:
    raise errors.UserError('export_backbone is not for a population: leave one of the two out.')


def check_overrides(config: Config, overrides: dict[str, Any]) -> None:
  """Raises `UserError` for command-line options of a method that is not the chosen one."""
  mine = _methods(config)
  chosen = config.method if config.population is None else ', '.join(mine)
  for key in overrides:
    block, _, rest = key.partition('.')
    other = rest.split('.')[0]
    if block in ('method_configs', 'method_learning_rates') and other not in mine:
      raise errors.UserError(
        f"--config.{key} would have no effect: it is for method '{other}', and the method is "
        f"'{chosen}'."
      )


def _methods(config: Config) -> tuple[str, ...]:
  """The methods that a run trains: of a population those of its members."""
  own = methods.parts(config.method)
  found = members.parse(config.population, default_config())
  if found is None:
    return own
  named = [methods.parts(m['method']) if 'method' in m else own for m in found]
  return tuple(dict.fromkeys(name for names in named for name in names))


def of_members(config: Config) -> dict[str, Config]:
  """The resolved config of each member of a population, as if it were trained alone, by name.

  Raises:
    errors.UserError: as `resolve`, naming the member.
  """
  population = members.parse(config.population, default_config()) or []
  found = {}
  for name, overrides in zip(members.names(population), population, strict=True):
    try:
      found[name] = resolve(ml_collections.ConfigDict(members.apply(config.to_dict(), overrides)))
      check_overrides(found[name], overrides)
    except errors.UserError as e:
      raise errors.UserError(f'population, member {name}: {e}') from None
  return found


def resolve(config: Config) -> Config:
  """A copy with the learning rate, seeds and batch sizes filled in.

  Of a population the learning rates are filled in by `of_members`.

  Raises:
    errors.UserError: as `check`, or if no learning rate is given.
  """
  check(config)
  population = members.parse(config.population, default_config())
  config = ml_collections.ConfigDict(config.to_dict() | {'population': population})
  if config.shuffle_seed is None:
    config.shuffle_seed = config.rng_seed
  if config.eval_batch_size is None:
    config.eval_batch_size = config.batch_size
  names = _methods(config)
  if population is None:
    config.lr_configs.base_learning_rate = _learning_rate(config, names)
  config.backbone_configs = config_lib.to_dict(config.backbone_configs)
  _apply_normalisation(config)
  # What belongs to other methods is not part of this run.
  config.method_configs = {name: config.method_configs.get(name) or {} for name in names}
  rates = {name: config.method_learning_rates.get(name) for name in names}
  config.method_learning_rates = {} if population is None else rates
  if population is not None:
    of_members(config)
  return config.lock()


def _learning_rate(config: Config, names: tuple[str, ...]) -> float:
  """That of the config, or else of its methods."""
  rates = [config.lr_configs.get('base_learning_rate')]
  if rates == [None]:
    rates = [config.method_learning_rates.get(name) for name in names]
  given = [rate for rate in rates if rate is not None]
  if not given:
    raise errors.UserError(
      f'Give lr_configs.base_learning_rate or method_learning_rates.{names[0]}.'
    )
  return min(given)  # Of several the most cautious: what suits one may be too much for the other.


def _apply_normalisation(config: Config) -> None:
  """Writes what `dataset_configs.normalisation` means into `backbone_configs`."""
  name = config.dataset_configs.get('normalisation')
  if name is None:
    return
  values = datasets.NORMALISATIONS[
    errors.one_of('dataset_configs.normalisation', name, datasets.NORMALISATIONS)
  ]
  for field, value in zip(('mean', 'std'), values, strict=True):
    if tuple(config.backbone_configs.get(field) or value) != value:
      raise errors.UserError(
        f"dataset_configs.normalisation '{name}' and backbone_configs.{field} "
        f'{config.backbone_configs[field]} contradict each other: give one of them.'
      )
    config.backbone_configs[field] = value


def number_of_steps(config: Config, num_train_examples: int) -> tuple[int, int]:
  """(steps of the whole training, steps of an epoch), both at least 1."""
  per_epoch = max(1, num_train_examples // config.batch_size)
  if config.num_training_steps is not None:
    return config.num_training_steps, per_epoch
  return max(1, math.ceil(config.num_training_epochs * num_train_examples / config.batch_size)), (
    per_epoch
  )


def _at_least(field: str, value: float, low: float) -> None:
  if value < low:
    raise errors.UserError(f'{field} must be at least {low}, got {value}.')


def _above(field: str, value: float, low: float) -> None:
  if not value > low:
    raise errors.UserError(f'{field} must be above {low}, got {value}.')


def _check_options(
  kind: str, table: Mapping[str, Callable[..., Any]], name: str, given: Mapping[str, Any]
) -> None:
  known = config_lib.options(table[errors.one_of(kind, name, table)])
  for key in given:
    if key not in known:
      raise errors.unknown(f"option of {kind} '{name}'", key, known)
