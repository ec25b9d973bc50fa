"""Many side networks on one pass of the frozen backbone: the fixed parts and the steps of a run.

The encoder runs once a batch, and collects whatever some member reads. Each member then makes its
own loss, gradient, update and random numbers from that, by the very step of a run of its own. A
population's `TrainState` is that of a run with a dict {member: value} in the place of each value,
but for `global_step`, which all have in common.
"""

import copy
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from losa_scenic.adapt_lib.method import Method, combine
from losa_scenic.common_lib import errors, trees
from losa_scenic.common_lib.types import Array, Batch, Config, Params
from losa_scenic.dataset_lib import dataset_utils
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.classification_model import ClassificationModel
from losa_scenic.model_lib.encoder import Encoded
from losa_scenic.train_lib import (
  feature_layout,
  feature_trace,
  lr_schedules,
  members,
  optimizers,
  program,
  run_config,
  sharding,
  steps,
)
from losa_scenic.train_lib.state import TrainState
from losa_scenic.train_lib.stopping import ASKED

# A member's own value is named like this in metrics: 'rank=8/loss'.
BETWEEN = '/'


@dataclasses.dataclass(frozen=True)
class Member:
  """One of a population.

  Attributes:
    name: of `members.names`.
    overrides: what it changes in the config of the run, by keys without 'config.'.
    config: resolved, as if it were trained alone.
    model: the model class's instance; the backbone is that of all.
    learning_rate: step -> learning rate.
  """

  name: str
  overrides: Mapping[str, Any]
  config: Config
  model: ClassificationModel
  learning_rate: lr_schedules.Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Population(program.Program):
  """All that stays fixed in a run of a population; `model` and `learning_rate` are the first's.

  Attributes:
    members: by name, in the order of the config.
    trunk: see `trunk`.
  """

  members: Mapping[str, Member]
  trunk: Adapted

  @property
  def encoder(self) -> Adapted:
    """See `Program`."""
    return self.trunk

  def identity(self) -> dict[str, Any]:
    """What a checkpoint of all must agree with."""
    method = {name: one.model.identity()['method'] for name, one in self.members.items()}
    return self.model.identity() | {'method': method}


def build_program(
  *,
  rng: Array,
  config: Config,
  model_cls: type[ClassificationModel],
  dataset: dataset_utils.Dataset,
) -> tuple[Population, TrainState]:
  """As `program.build_program`, for a config with a population.

  Raises:
    errors.UserError: for members that cannot share a pass of the backbone.
  """
  mesh = program.make_mesh(config)
  total_steps, steps_per_epoch = run_config.number_of_steps(
    config, dataset.meta_data['num_train_examples']
  )
  made = _members(config, model_cls, dataset, total_steps)
  first = next(iter(made.values()))
  model = first.model
  program.check_inputs(config, dataset, model.backbone.spec)
  _check(made, config)
  everywhere = sharding.replicated(mesh)
  trained, frozen = model.param_shapes()
  frozen_shardings = sharding.frozen_shardings(frozen, mesh)
  shardings = (jax.tree.map(lambda _: everywhere, trained), frozen_shardings)
  init_rng, _ = jax.random.split(_rng(rng, config, first))
  _, frozen = model.init_params(init_rng, shardings)
  model.release_weights()
  gather = sharding.gather(frozen_shardings, mesh)
  states, inits, train_steps, eval_steps = {}, {}, {}, {}
  for name, member in made.items():
    member.model.flax_model.method.check_devices(mesh.size)
    member.model.backbone = model.backbone
    tx = optimizers.get_optimizer(member.config, member.learning_rate)
    states[name] = _first_state(member, tx, _rng(rng, config, member), everywhere, inits)
    member.model.flax_model = member.model.flax_model.clone(gather=gather)
    train_steps[name] = functools.partial(
      steps.train_step,
      flax_model=member.model.flax_model,
      loss_fn=member.model.loss_function,
      metrics_fn=member.model.get_metrics_fn_jit('train'),
      tx=tx,
      max_bad_steps=config.max_bad_steps,
    )
    eval_steps[name] = (member.model.flax_model, member.model.get_metrics_fn_jit('validation'))
  models = [member.model.flax_model for member in made.values()]
  shared, layout = trunk(models), None
  if config.feature_cache.dir:
    layout = feature_trace.of_models(shared, models, config.feature_cache.dtype)
  train, evaluate = program.jitted(
    functools.partial(train_step, trunk=shared, members=train_steps, layout=layout),
    functools.partial(eval_step, trunk=shared, members=eval_steps, layout=layout),
    model,
    mesh,
    frozen_shardings,
  )
  return Population(
    model=model,
    mesh=mesh,
    frozen=frozen,
    train_step=train,
    eval_step=evaluate,
    learning_rate=first.learning_rate,
    total_steps=total_steps,
    steps_per_epoch=steps_per_epoch,
    epochs_per_step=config.batch_size / dataset.meta_data['num_train_examples'],
    layout=layout,
    members=made,
    trunk=shared,
  ), joined(states)


def state_of(state: TrainState, name: str) -> TrainState:
  """The state of a member as that of a run of its own."""
  own = {field: getattr(state, field)[name] for field in _fields()}
  return TrainState(global_step=state.global_step, **own)


def joined(states: Mapping[str, TrainState]) -> TrainState:
  """The state of a population from those of its members; the inverse of `state_of`."""
  step = functools.reduce(jnp.maximum, (state.global_step for state in states.values()))
  tables: dict[str, Any] = {
    field: {name: getattr(state, field) for name, state in states.items()} for field in _fields()
  }
  return TrainState(global_step=step, **tables)


def train_step(
  state: TrainState,
  frozen: Params,
  batch: Batch,
  *,
  trunk: Adapted,
  members: Mapping[str, Callable[..., tuple[TrainState, dict[str, Any]]]],
  layout: feature_layout.Layout | None = None,
) -> tuple[TrainState, dict[str, Any]]:
  """One step of each member.

  A member that has had too many steps that are not finite moves no more, and the others go on;
  `global_step` stops when none moves.

  Args:
    state: of all, before the step.
    frozen: the parameters that never change.
    batch: as for `steps.train_step`.
    trunk: from `trunk`.
    members: `steps.train_step` of each, with all but state, frozen, batch and `encoded` given.
    layout: of 'inputs' that are rows of a feature cache.

  Returns:
    The state after the step, and the metrics of all, by 'member/name'.
  """
  metrics = {name: (value.max(),) for name, value in batch.items() if name == ASKED}
  metrics = {name: (*value, jnp.ones((), jnp.float32)) for name, value in metrics.items()}
  batch = {name: value for name, value in batch.items() if name != ASKED}
  encoded, after = _encode(trunk, frozen, batch['inputs'], layout), {}
  for name, step in members.items():
    own = feature_layout.read_by(encoded, step.keywords['flax_model'].method)
    after[name], found = step(state_of(state, name), frozen, batch, encoded=own)
    # One after the other: else the compiler may keep what all of them need for their backward pass.
    after[name], found, encoded = jax.lax.optimization_barrier((after[name], found, encoded))
    metrics |= {f'{name}{BETWEEN}{key}': value for key, value in found.items()}
  return joined(after), metrics


def eval_step(
  state: TrainState,
  frozen: Params,
  batch: Batch,
  *,
  trunk: Adapted,
  members: Mapping[str, tuple[Adapted, steps.MetricsFn]],
  layout: feature_layout.Layout | None = None,
) -> tuple[dict[str, Any], dict[str, Array]]:
  """As `steps.eval_step`, of all members at once.

  Args:
    state: of all.
    frozen: the parameters that never change.
    batch: as for `steps.eval_step`.
    trunk: from `trunk`.
    members: the model and the metrics of each.
    layout: as for `train_step`.

  Returns:
    Metrics by 'member/name', and of each member the predicted classes [b].
  """

  def logits(inputs: Array) -> dict[str, Any]:
    encoded = _encode(trunk, frozen, inputs, layout)
    found = {}
    for name, (model, _) in members.items():
      own = state_of(state, name)
      variables = {'params': combine(own.trainable, frozen), **own.model_state}
      read = feature_layout.read_by(encoded, model.method)
      found[name] = model.apply(variables, None, encoded=read)
    return found

  found = steps.over_views(logits, batch['inputs'], len(trunk.spec.input_shape))
  metrics: dict[str, Any] = {}
  for name, (_, metrics_fn) in members.items():
    own = metrics_fn(found[name], batch)
    metrics |= {f'{name}{BETWEEN}{key}': value for key, value in own.items()}
  if ASKED in batch:
    metrics[ASKED] = (batch[ASKED].max(), jnp.ones((), jnp.float32))
  return metrics, {name: value.argmax(-1) for name, value in found.items()}


def trunk(models: list[Adapted]) -> Adapted:
  """What runs the encoder for all of these models: it collects what some of them reads."""
  sites = dict.fromkeys(site for model in models for site in model.method.collect)
  return models[0].clone(method=Method(collect=tuple(sites)))


def _encode(
  trunk: Adapted, frozen: Params, inputs: Array, layout: feature_layout.Layout | None
) -> Encoded:
  if layout is not None and feature_layout.are_rows(inputs):
    return layout.decode(inputs)
  encoded: Any = trunk.apply({'params': frozen}, inputs, method='encode')
  return encoded


def _fields() -> list[str]:
  """Fields of a state that each member has for itself."""
  return [f.name for f in dataclasses.fields(TrainState) if f.name != 'global_step']


def _rng(rng: Array, config: Config, member: Member) -> Array:
  """The key that a run of this member alone begins with; `rng` is that of `config`."""
  seed = member.config.rng_seed
  return rng if seed == config.rng_seed else jax.random.key(seed, impl=jax.random.key_impl(rng))


def _members(
  config: Config,
  model_cls: type[ClassificationModel],
  dataset: dataset_utils.Dataset,
  total_steps: int,
) -> dict[str, Member]:
  overrides = members.parse(config.population, run_config.default_config()) or []
  made: dict[str, Member] = {}
  model: ClassificationModel | None = None
  for (name, own), given in zip(run_config.of_members(config).items(), overrides, strict=True):
    if model is None:
      model = model_cls(own, dataset.meta_data)
    else:  # The backbone is opened once.
      model = copy.copy(model)
      model.config = own
      model.flax_model = model.build_flax_model()
    schedule = lr_schedules.get_learning_rate_fn(own, total_steps)
    made[name] = Member(name, given, own, model, schedule)
  return made


def _check(made: Mapping[str, Member], config: Config) -> None:
  """Raises `UserError` for members that cannot share a pass of the backbone."""
  first, *others = made
  for name, member in made.items():
    model = member.model.flax_model
    if not model.method.spares_backbone:
      raise errors.UserError(
        f"population, member {name}: method '{member.config.method}' changes what the backbone "
        'computes, so it needs a pass of its own. Members are methods that only read it (memory '
        'class A), such as losa, lst, linear: train this one alone.'
      )
    if model.scan != made[first].model.flax_model.scan:
      raise errors.UserError(
        f"population: member {name} and member {first} run the backbone's layers in different "
        "ways: say --config.layer_loop='unroll'."
      )
    if member.model.backbone.weights is None and member.config.rng_seed != config.rng_seed:
      raise errors.UserError(
        f"population, member {name}: backbone '{config.backbone}' has random weights, and "
        'rng_seed would draw others for each member. Use a stored backbone, or one seed.'
      )
  frozen = {name: trees.describe(member.model.param_shapes()[1]) for name, member in made.items()}
  for name in others:
    if lines := trees.differences(frozen[first], frozen[name]):
      raise errors.UserError(
        f'population: members {first} and {name} have other frozen weights: {"; ".join(lines)}.'
      )


def _first_state(
  member: Member, tx: Any, rng: Array, where: Any, inits: dict[str, Callable[..., Any]]
) -> TrainState:
  """As a run of the member alone begins. `inits` keeps what was compiled, by method."""
  init_rng, state_rng = jax.random.split(rng)
  model, kind = member.model.flax_model, jax.random.key_impl(rng)

  def init(data: Array) -> Params:
    return model.init_trainable(jax.random.wrap_key_data(data, impl=kind))

  method = json.dumps(member.model.identity()['method'], sort_keys=True)
  # Through the host: a key on a device of this process could not go to those of others.
  key = np.asarray(jax.random.key_data(init_rng))
  trainable = inits.setdefault(method, jax.jit(init, out_shardings=where))(key)
  return program.first_state(model, trainable, tx, state_rng, where)
