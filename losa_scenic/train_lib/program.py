"""All that stays fixed during a run: the model, the devices, the frozen weights, compiled steps."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from losa_scenic.adapt_lib import fold
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Array, Config, Params
from losa_scenic.dataset_lib import dataset_utils
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.classification_model import ClassificationModel
from losa_scenic.model_lib.spec import BackboneSpec
from losa_scenic.train_lib import (
  feature_layout,
  feature_trace,
  lr_schedules,
  optimizers,
  run_config,
  sharding,
  steps,
)
from losa_scenic.train_lib.state import TrainState


@dataclasses.dataclass(frozen=True)
class Program:
  """All that stays fixed during a run.

  Attributes:
    model: the model class's instance.
    mesh: the devices.
    frozen: frozen parameters, on the devices; where several share them, each has its part.
    train_step: (state, frozen, batch) -> (state, metrics).
    eval_step: (state, frozen, batch) -> (metrics, predictions).
    learning_rate: step -> learning rate.
    total_steps: length of the whole training.
    steps_per_epoch: whole batches in the training split, at least 1.
    epochs_per_step: share of the training split that a batch is.
    layout: of the rows of a feature cache, which both steps then take for inputs too; else None.
  """

  model: ClassificationModel
  mesh: jax.sharding.Mesh
  frozen: Params
  train_step: Callable[..., tuple[TrainState, dict[str, Any]]]
  eval_step: Callable[..., tuple[dict[str, Any], Array]]
  learning_rate: lr_schedules.Schedule
  total_steps: int
  steps_per_epoch: int
  epochs_per_step: float
  layout: feature_layout.Layout | None = None

  @property
  def encoder(self) -> Adapted:
    """The model whose pass through the frozen encoder `layout` keeps."""
    return self.model.flax_model

  def identity(self) -> dict[str, Any]:
    """What a checkpoint must agree with: the backbone and what is trained over it."""
    return self.model.identity()


def build_program(
  *,
  rng: Array,
  config: Config,
  model_cls: type[ClassificationModel],
  dataset: dataset_utils.Dataset,
) -> tuple[Program, TrainState]:
  """Makes the model, loads the backbone, prepares the steps; returns them with the first state."""
  mesh = make_mesh(config)
  model = model_cls(config, dataset.meta_data)
  if config.export_backbone:
    fold.check_model(model.flax_model)
  check_inputs(config, dataset, model.backbone.spec)
  model.flax_model.method.check_devices(mesh.size)
  layout = None
  if config.feature_cache.dir:
    layout = feature_trace.of_model(model.flax_model, config.feature_cache.dtype)
  total_steps, steps_per_epoch = run_config.number_of_steps(
    config, dataset.meta_data['num_train_examples']
  )
  learning_rate = lr_schedules.get_learning_rate_fn(config, total_steps)
  tx = optimizers.get_optimizer(config, learning_rate)
  everywhere = sharding.replicated(mesh)
  trained, frozen = model.param_shapes()
  frozen_shardings = sharding.frozen_shardings(frozen, mesh)
  shardings = (jax.tree.map(lambda _: everywhere, trained), frozen_shardings)
  init_rng, state_rng = jax.random.split(rng)
  trainable, frozen = model.init_params(init_rng, shardings)
  model.release_weights()
  state = first_state(model.flax_model, trainable, tx, state_rng, everywhere)
  model.flax_model = model.flax_model.clone(gather=sharding.gather(frozen_shardings, mesh))
  adapted: Any = model.flax_model
  if layout is not None:
    adapted = feature_layout.RowModel(adapted, layout)
  train_step = functools.partial(
    steps.train_step,
    flax_model=adapted,
    loss_fn=model.loss_function,
    metrics_fn=model.get_metrics_fn_jit('train'),
    tx=tx,
    accumulate=config.grad_accum_steps,
    max_bad_steps=config.max_bad_steps,
  )
  eval_step = functools.partial(
    steps.eval_step,
    flax_model=adapted,
    metrics_fn=model.get_metrics_fn_jit('validation'),
  )
  train_step, eval_step = jitted(train_step, eval_step, model, mesh, frozen_shardings)
  return Program(
    model=model,
    mesh=mesh,
    frozen=frozen,
    train_step=train_step,
    eval_step=eval_step,
    learning_rate=learning_rate,
    total_steps=total_steps,
    steps_per_epoch=steps_per_epoch,
    epochs_per_step=config.batch_size / dataset.meta_data['num_train_examples'],
    layout=layout,
  ), state


def make_mesh(config: Config) -> jax.sharding.Mesh:
  """The devices of a run; raises `UserError` for batches that they cannot share."""
  mesh, visits = sharding.make_mesh(config.mesh), config.stream_microbatches
  sharding.check_batch_size('batch_size', config.batch_size, mesh, config.grad_accum_steps, visits)
  sharding.check_batch_size('eval_batch_size', config.eval_batch_size, mesh, microbatches=visits)
  return mesh


def jitted(
  train_step: Callable[..., Any],
  eval_step: Callable[..., Any],
  model: ClassificationModel,
  mesh: jax.sharding.Mesh,
  frozen_shardings: Params,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """Both steps under `jax.jit`, for (state, frozen, batch) where a run has them."""
  everywhere = sharding.replicated(mesh)
  encoder = model.flax_model

  def jit(step: Callable[..., Any], *donated: int) -> Callable[..., Any]:
    of_inputs, of_rows = (
      jax.jit(
        step,
        in_shardings=(everywhere, frozen_shardings, sharding.batched(mesh)),
        out_shardings=everywhere,
        donate_argnums=donated,
        compiler_options=encoder.compiler_options(encodes=encodes),
      )
      for encodes in (True, False)
    )

    @functools.wraps(step)
    def call(state: TrainState, frozen: Params, batch: dict[str, Any]) -> Any:
      rows = feature_layout.are_rows(batch['inputs'])
      return (of_rows if rows else of_inputs)(state, frozen, batch)

    return call

  return jit(train_step, 0), jit(eval_step)


def first_state(
  model: Adapted, trainable: Params, tx: optax.GradientTransformation, rng: Array, where: Any
) -> TrainState:
  """The state before the first step, made where it will live. `trainable` is used up."""

  def create(trainable: Params, key: Array, model_state: Any) -> TrainState:
    return TrainState.create(trainable, tx, jax.random.wrap_key_data(key), model_state)

  key, model_state = jax.device_get((jax.random.key_data(rng), model.init_model_state()))
  return jax.jit(create, out_shardings=where, donate_argnums=0)(trainable, key, model_state)


def check_inputs(config: Config, dataset: dataset_utils.Dataset, spec: BackboneSpec) -> None:
  """Raises `UserError` if the data's shape or scale is not the backbone's."""
  inputs, wanted = tuple(dataset.meta_data['input_shape'][1:]), spec.input_shape
  if inputs != wanted:
    raise errors.UserError(
      f"Inputs are {list(inputs)}, but backbone '{config.backbone}' is for {list(wanted)}: leave "
      'dataset_configs.image_size out, or give backbone_configs.image_size the same value.'
    )
  if config.data_dtype_str != 'uint8' and (*spec.mean, *spec.std) != (0.5,) * 6:
    raise errors.UserError(
      f"data_dtype_str '{config.data_dtype_str}' scales images to [-1, 1], but backbone "
      f"'{config.backbone}' takes mean {spec.mean} and std {spec.std}: use 'uint8'."
    )
