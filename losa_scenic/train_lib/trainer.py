"""The one train loop, behind Scenic's trainer contract.

Order within a step (do not change it: exact resume rests on it): train, log, evaluate, save best,
flush what was logged, save last. Logged values are means since the last log or checkpoint, so a run
that is continued from any checkpoint logs exactly what it would have logged uninterrupted.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from losa_scenic.adapt_lib.method import split_head
from losa_scenic.common_lib import errors, trees
from losa_scenic.common_lib.types import Array, Config
from losa_scenic.dataset_lib import dataset_utils
from losa_scenic.model_lib.classification_model import ClassificationModel
from losa_scenic.train_lib import (
  checkpoints,
  evaluate,
  metrics,
  progress,
  run_config,
  sharding,
  summary,
  writers,
)
from losa_scenic.train_lib import workdir as workdir_lib
from losa_scenic.train_lib.program import Program, build_program
from losa_scenic.train_lib.state import TrainState
from losa_scenic.train_lib.writers import Writer

# A run cannot continue on data that has become more or less.
_DATA_IDENTITY = (
  'num_classes',
  'class_names',
  'num_train_examples',
  'num_eval_examples',
  'num_test_examples',
  'fingerprints',
)


def train(
  *,
  rng: Array,
  config: Config,
  model_cls: type[ClassificationModel],
  dataset: dataset_utils.Dataset,
  workdir: str | pathlib.Path,
  writer: Writer,
) -> tuple[TrainState, dict[str, float], dict[str, Any]]:
  """Trains, evaluates, saves; continues from the workdir's last checkpoint if there is one.

  Args:
    rng: a key: parameters, dropout.
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
  if dataset.train_ds is None:
    raise ValueError('The data set has no train_ds: its batches cannot be positioned by step.')
  if dataset.valid_ds is None and not config.evaluate_test:
    raise errors.UserError(
      'Nothing would be evaluated: there is no validation split, and evaluate_test is False.'
    )
  with workdir_lib.locked(workdir):
    plain = config.to_dict()
    workdir_lib.check_same_run(workdir, plain, run_config.MAY_CHANGE)
    program, state = build_program(rng=rng, config=config, model_cls=model_cls, dataset=dataset)
    data = {key: dataset.meta_data[key] for key in _DATA_IDENTITY}
    identity = program.model.identity() | {'data': data}
    saver = checkpoints.Checkpoints(workdir, identity, config.max_checkpoint_keep)
    try:
      start = saver.latest_step()
      if start is not None:
        state = saver.restore(state)
      workdir_lib.write_json(workdir / 'config.json', plain)
      if start is None:
        (workdir / 'bad_files.csv').unlink(missing_ok=True)
      dataset.train_ds.bad_files.keep_in(workdir / 'bad_files.csv')
      if hasattr(writer, 'rewind'):
        writer.rewind(-1 if start is None else start)
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
  config: Config,
  dataset: dataset_utils.Dataset,
  workdir: pathlib.Path,
  writer: Writer,
  saver: checkpoints.Checkpoints,
) -> tuple[TrainState, dict[str, float], dict[str, Any]]:
  """The loop from step `start` on, and what follows it."""
  total, first = program.total_steps, start or 0
  eval_every = config.log_eval_steps or program.steps_per_epoch
  save_every = config.checkpoint_steps or program.steps_per_epoch
  bar = progress.Progress(
    first, total, config.batch_size, unit='clips' if dataset.meta_data.get('clips') else 'images'
  )
  name = dataset.meta_data.get('name') or config.dataset_name
  bar.say(_headline(program, state, config, start, name))
  for line in (
    *summary.data_lines(dataset.meta_data, program.model.backbone.spec),
    summary.guesses(config.backbone, program.model.backbone),
  ):
    if line:
      bar.say(line)
  pending, train_summary, eval_summary = [], {}, {}
  batches = bar.timed(dataset_utils.iterate(dataset.train_ds, first, total))
  for step, batch in enumerate(batches, start=first + 1):
    batch = sharding.put(batch, program.mesh)
    state, step_metrics = program.train_step(state, program.frozen, batch)
    pending.append(step_metrics)
    if step == first + 1:
      jax.block_until_ready(step_metrics)  # The clock starts after compilation.
    elif len(pending) > 2:
      jax.block_until_ready(pending[-3])  # Keeps at most two batches in flight.
    bar.step()
    bar.run()
    saves = config.checkpoint and (step % save_every == 0 or step == total)
    if step % config.log_summary_steps == 0 or saves or step == total:
      train_summary = _log_training(program, pending, step, bar, writer)
    bar.show(step)
    if dataset.valid_ds is not None and (step % eval_every == 0 or step == total):
      metrics.check_finite(jax.device_get(pending), step)
      bar.pause()
      eval_summary = evaluate.evaluate(program, state, dataset, 'valid', step, writer)
      bar.say(f'step {step}/{total}  valid accuracy {eval_summary["valid_accuracy"]:.4f}')
      if config.checkpoint:
        saver.save_best(state, eval_summary['valid_accuracy'])
      bar.run()
    if step == total and config.evaluate_test:
      bar.pause()
      eval_summary |= evaluate.evaluate(program, state, dataset, 'test', step, writer)
    if saves:
      writer.flush()  # What a checkpoint stands for is on disk before it.
      saver.save(state)
  bar.close()
  if first >= total:
    eval_summary = _evaluate_finished(program, state, config, dataset)
  writer.flush()
  saver.close()
  content = summary.content(
    program.model, state, program.frozen, config, dataset, start, bar, eval_summary
  )
  if first >= total:
    content |= summary.of_training(workdir)
  workdir_lib.write_json(workdir / 'summary.json', content)
  print(summary.as_table(content, workdir))
  if config.export_backbone:  # Last: should it fail, everything else is there.
    summary.export_backbone(program, state, config, name, eval_summary)
  return state, train_summary, content


def _evaluate_finished(
  program: Program,
  state: TrainState,
  config: Config,
  dataset: dataset_utils.Dataset,
) -> dict[str, float]:
  """Evaluates a run that had its last checkpoint already; its measurements were written then."""
  values: dict[str, float] = {}
  for split in ('valid', 'test') if config.evaluate_test else ('valid',):
    if getattr(dataset, f'{split}_ds') is not None:
      nowhere = writers.MultiWriter()
      values |= evaluate.evaluate(program, state, dataset, split, program.total_steps, nowhere)
  return values


def _log_training(
  program: Program,
  pending: list[dict[str, Any]],
  step: int,
  bar: progress.Progress,
  writer: Writer,
) -> dict[str, float]:
  """Writes the means of the pending metrics, which it empties, and returns them.

  Raises:
    errors.UserError: if a loss or a gradient is not finite.
  """
  values = jax.device_get(pending)
  pending.clear()
  metrics.check_finite(values, step)
  means = metrics.normalize(metrics.accumulate(values))
  train_summary = {f'train_{name}': value for name, value in means.items()}
  bar.loss(train_summary['train_loss'])
  extra = {
    'learning_rate': float(program.learning_rate(step - 1)),
    'epoch': step * program.epochs_per_step,
    'img/sec': bar.images_per_second,
    'input_wait': bar.input_wait,
  }
  writer.write_scalars(step, train_summary | extra)
  return train_summary


def _headline(
  program: Program, state: TrainState, config: Config, start: int | None, name: str
) -> str:
  rest, head = split_head(state.trainable)
  devices = f'{program.mesh.size} x {jax.devices()[0].device_kind}'
  origin = 'starting' if start is None else f'continuing from step {start}'
  return (
    f'{config.method} on {config.backbone}, {name}: {trees.count(rest):,} '
    f'trainable + {trees.count(head):,} in the head, {trees.count(program.frozen):,} frozen; '
    f'{program.total_steps} steps of {config.batch_size} on {devices}; {origin}'
  )


TRAINERS = {'classification': train}


def get_trainer(name: str) -> Callable[..., tuple[TrainState, dict[str, float], dict[str, Any]]]:
  """The train function of that name. Raises `UserError` for an unknown one."""
  return TRAINERS[errors.one_of('trainer_name', name, TRAINERS)]
