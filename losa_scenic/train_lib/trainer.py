"""The one train loop, behind Scenic's trainer contract.

Order within a step (do not change it: exact resume rests on it): train, log, evaluate, save best,
save last. Logged values are means since the last log or checkpoint, so a run that is continued from
any checkpoint logs exactly what it would have logged without the interruption.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np

from losa_scenic.adapt_lib.method import split_head
from losa_scenic.common_lib import errors, trees
from losa_scenic.common_lib.types import Array, Params
from losa_scenic.dataset_lib import dataset_utils
from losa_scenic.model_lib.classification_model import ClassificationModel
from losa_scenic.train_lib import (
  augment,
  checkpoints,
  evaluate,
  lr_schedules,
  metrics,
  optimizers,
  progress,
  run_config,
  sharding,
  steps,
  summary,
)
from losa_scenic.train_lib import (
  workdir as workdir_lib,
)
from losa_scenic.train_lib.state import TrainState
from losa_scenic.train_lib.writers import Writer


@dataclasses.dataclass(frozen=True)
class Program:
  """All that stays fixed during a run.

  Attributes:
    model: the model class's instance.
    mesh: the devices.
    frozen: frozen parameters, on the devices.
    train_step: (state, frozen, batch) -> (state, metrics).
    eval_step: (trainable, frozen, batch) -> (metrics, predictions).
    learning_rate: step -> learning rate.
    total_steps: length of the whole training.
    steps_per_epoch: steps of one pass over the training split.
  """

  model: ClassificationModel
  mesh: jax.sharding.Mesh
  frozen: Params
  train_step: Callable[..., tuple[TrainState, dict[str, Any]]]
  eval_step: Callable[..., tuple[dict[str, Any], Array]]
  learning_rate: lr_schedules.Schedule
  total_steps: int
  steps_per_epoch: int


def build_program(
  *,
  rng: Array,
  config: ml_collections.ConfigDict,
  model_cls: type[ClassificationModel],
  dataset: dataset_utils.Dataset,
) -> tuple[Program, TrainState]:
  """Makes the model, loads the backbone, prepares the steps; returns them with the first state."""
  mesh = sharding.make_mesh()
  sharding.check_batch_size('batch_size', config.batch_size, mesh)
  sharding.check_batch_size('eval_batch_size', config.eval_batch_size, mesh)
  model = model_cls(config, dataset.meta_data)
  image_size = dataset.meta_data['input_shape'][1]
  if image_size != model.backbone.spec.image_size:
    raise errors.UserError(
      f'Images are {image_size} pixels, but the position embedding of backbone '
      f"'{config.backbone}' is for {model.backbone.spec.image_size}."
    )
  total_steps, steps_per_epoch = run_config.number_of_steps(
    config, dataset.meta_data['num_train_examples']
  )
  learning_rate = lr_schedules.get_learning_rate_fn(config, total_steps)
  tx = optimizers.get_optimizer(config, learning_rate)
  init_rng, state_rng = jax.random.split(rng)
  trainable, frozen = model.init_params(init_rng)
  state = sharding.replicate(TrainState.create(trainable, tx, state_rng), mesh)
  everywhere, split = sharding.replicated(mesh), sharding.batched(mesh)
  train_step = functools.partial(
    steps.train_step,
    flax_model=model.flax_model,
    loss_fn=model.loss_function,
    metrics_fn=model.get_metrics_fn_jit('train'),
    tx=tx,
    augment=augment.make_augment(
      config.augment, model.backbone.spec, dataset.meta_data['num_classes']
    ),
  )
  eval_step = functools.partial(
    steps.eval_step,
    flax_model=model.flax_model,
    metrics_fn=model.get_metrics_fn_jit('validation'),
  )
  return Program(
    model=model,
    mesh=mesh,
    frozen=sharding.replicate(frozen, mesh),
    train_step=jax.jit(
      train_step,
      in_shardings=(everywhere, everywhere, split),
      out_shardings=everywhere,
      donate_argnums=0,
    ),
    eval_step=jax.jit(
      eval_step, in_shardings=(everywhere, everywhere, split), out_shardings=everywhere
    ),
    learning_rate=learning_rate,
    total_steps=total_steps,
    steps_per_epoch=steps_per_epoch,
  ), state


def train(
  *,
  rng: Array,
  config: ml_collections.ConfigDict,
  model_cls: type[ClassificationModel],
  dataset: dataset_utils.Dataset,
  workdir: str | pathlib.Path,
  writer: Writer,
) -> tuple[TrainState, dict[str, float], dict[str, Any]]:
  """Trains, evaluates, saves; continues from the workdir's last checkpoint if there is one.

  Args:
    rng: a key: parameters, augmentation.
    config: fields of `run_config.default_config`.
    model_cls: builds the model from (config, meta_data).
    dataset: with `train_ds`, `valid_ds` (may be None), `test_ds` and `meta_data`.
    workdir: outputs; locked while this runs.
    writer: measurements; see `writers.Writer`.

  Returns:
    (final state, last logged training metrics, the content of summary.json).

  Raises:
    errors.UserError: for bad input, a workdir in use or of another run, a checkpoint that does not
      fit, or a loss that is not finite.
  """
  workdir = pathlib.Path(workdir)
  config = run_config.resolve(config)
  with workdir_lib.locked(workdir):
    plain = config.to_dict()
    workdir_lib.check_same_run(workdir, plain, run_config.MAY_CHANGE)
    program, state = build_program(rng=rng, config=config, model_cls=model_cls, dataset=dataset)
    identity = {
      'backbone': program.model.backbone.identity(),
      'method': {config.method: run_config.method_options(config)},
    }
    saver = checkpoints.Checkpoints(workdir, identity, config.max_checkpoint_keep)
    try:
      start = saver.latest_step()
      if start is not None:
        state = saver.restore(state)
      workdir_lib.write_json(workdir / 'config.json', plain)
      if hasattr(writer, 'rewind'):
        writer.rewind(start or 0)
      if start is None:
        writer.write_texts(0, {'config': f'```\n{json.dumps(plain, indent=1)}\n```'})
      return _run(program, state, start, config, dataset, workdir, writer, saver)
    finally:
      saver.close()
      writer.close()


def _run(
  program: Program,
  state: TrainState,
  start: int | None,
  config: ml_collections.ConfigDict,
  dataset: dataset_utils.Dataset,
  workdir: pathlib.Path,
  writer: Writer,
  saver: checkpoints.Checkpoints,
) -> tuple[TrainState, dict[str, float], dict[str, Any]]:
  """The loop from step `start` on, and what follows it."""
  total, first = program.total_steps, start or 0
  log_every = config.log_summary_steps
  eval_every = config.log_eval_steps or program.steps_per_epoch
  save_every = config.checkpoint_steps or program.steps_per_epoch
  bar = progress.Progress(first, total, config.batch_size)
  bar.say(_headline(program, state, config, start))
  pending: list[dict[str, Any]] = []
  train_summary: dict[str, float] = {}
  eval_summary: dict[str, float] = {}
  batches = dataset_utils.iterate(dataset.train_ds, first, total)
  for step, batch in enumerate(batches, start=first + 1):
    state, step_metrics = program.train_step(
      state, program.frozen, sharding.put(batch, program.mesh)
    )
    pending.append(step_metrics)
    if step == first + 1:
      jax.block_until_ready(step_metrics)  # The clock starts after compilation.
    elif len(pending) > 2:
      jax.block_until_ready(pending[-3])  # Keeps at most two batches in flight.
    bar.step(step)
    bar.run()
    saves = config.checkpoint and (step % save_every == 0 or step == total)
    if step % log_every == 0 or saves or step == total:
      train_summary = _flush(pending, step)
      bar.loss(train_summary['train_loss'])
      extra = {
        'learning_rate': float(program.learning_rate(step - 1)),
        'epoch': step / program.steps_per_epoch,
        'img/sec': bar.images_per_second,
      }
      writer.write_scalars(step, train_summary | extra)
    if dataset.valid_ds is not None and (step % eval_every == 0 or step == total):
      bar.pause()
      eval_summary = evaluate.evaluate(program, state, dataset, 'valid', step, writer)
      bar.say(f'step {step}/{total}  valid accuracy {eval_summary["valid_accuracy"]:.4f}')
      if config.checkpoint:
        saver.save_best(state, eval_summary['valid_accuracy'])
      bar.run()
    if saves:
      saver.save(state)
  bar.pause()
  eval_summary |= evaluate.evaluate(program, state, dataset, 'test', total, writer)
  bar.close()
  if config.export_backbone:
    summary.export_backbone(program, state, config, eval_summary)
  content = summary.content(
    program.model, state, program.frozen, config, dataset.meta_data, start, bar, eval_summary
  )
  writer.flush()
  saver.close()
  workdir_lib.write_json(workdir / 'summary.json', content)
  print(summary.as_table(content, workdir))
  return state, train_summary, content


def _flush(pending: list[dict[str, Any]], step: int) -> dict[str, float]:
  """Means of the pending metrics, which it empties.

  Raises:
    errors.UserError: if a loss or a gradient is not finite, naming the first such step.
  """
  values = jax.device_get(pending)
  pending.clear()
  for i, one in enumerate(values):
    for name in ('loss', 'l2_grads', 'l2_params'):
      if not np.isfinite(one[name][0]):
        raise errors.UserError(
          f'{name} is {one[name][0]} at step {step - len(values) + 1 + i}: training has diverged. '
          'The checkpoints before it are kept. Lower the learning rate, clip gradients '
          '(max_grad_norm), or check the data; then use another --workdir.'
        )
  return {f'train_{k}': v for k, v in metrics.normalize(metrics.accumulate(values)).items()}


def _headline(
  program: Program, state: TrainState, config: ml_collections.ConfigDict, start: int | None
) -> str:
  rest, head = split_head(state.trainable)
  devices = f'{program.mesh.size} x {jax.devices()[0].device_kind}'
  origin = 'starting' if start is None else f'continuing from step {start}'
  return (
    f'{config.method} on {config.backbone}, {config.dataset_name}: {trees.count(rest):,} '
    f'trainable + {trees.count(head):,} in the head, {trees.count(program.frozen):,} frozen; '
    f'{program.total_steps} steps of {config.batch_size} on {devices}; {origin}'
  )


TRAINERS = {'classification': train}


def get_trainer(name: str) -> Callable[..., tuple[TrainState, dict[str, float], dict[str, Any]]]:
  """The train function of that name. Raises `UserError` for an unknown one."""
  return TRAINERS[errors.one_of('trainer_name', name, TRAINERS)]
