"""A run from its config to its summary, behind Scenic's trainer contract; the loop is `loop`'s."""

import contextlib
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from losa_scenic.adapt_lib.method import split_head
from losa_scenic.common_lib import errors, hosts, trees
from losa_scenic.common_lib.types import Array, Config
from losa_scenic.dataset_lib import dataset_utils
from losa_scenic.model_lib.classification_model import ClassificationModel
from losa_scenic.train_lib import (
  checkpoints,
  device_speed,
  evaluate,
  feature_cache,
  profile,
  progress,
  run_config,
  run_record,
  sharding,
  stopping,
  summary,
  watchdog,
  writers,
)
from losa_scenic.train_lib import workdir as workdir_lib
from losa_scenic.train_lib.bad_steps import BadSteps
from losa_scenic.train_lib.loop import Loop, Surroundings
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

  In a run of several processes all call it; only the first one touches the workdir.

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
    errors.UserError: for bad input, a workdir in use or of another run, checkpoints that do not fit
      or are all damaged, or, as `bad_steps.Diverged`, for too many steps that are not finite.
    stopping.Stopped: after SIGTERM or Ctrl-C, when everything is saved.
  """
  workdir = pathlib.Path(workdir)
  config = run_config.resolve(config)
  if dataset.train_ds is None:
    raise ValueError('The data set has no train_ds: its batches cannot be positioned by step.')
  if dataset.valid_ds is None and not config.evaluate_test:
    raise errors.UserError(
      'Nothing would be evaluated: there is no validation split, and evaluate_test is False.'
    )
  if not hosts.is_first():
    writer = writers.MultiWriter()
  kind = Run
  if config.population is not None:
    from losa_scenic.train_lib import population_run  # It rests on this module.

    kind = population_run.PopulationRun
  with workdir_lib.locked(workdir), contextlib.closing(writer):
    return kind(config, dataset, workdir, writer).run(rng, model_cls)


class Run:
  """What a run is made of, put together and taken apart again."""

  def __init__(
    self,
    config: Config,
    dataset: dataset_utils.Dataset,
    workdir: pathlib.Path,
    writer: Writer,
  ):
    self._config, self._plain = config, config.to_dict()
    self._dataset, self._workdir, self._writer = dataset, workdir, writer
    self._data = {key: dataset.meta_data[key] for key in _DATA_IDENTITY}
    self._loop: Loop | None = None
    self._features: feature_cache.Cache | None = None

  def run(
    self, rng: Array, model_cls: type[ClassificationModel]
  ) -> tuple[TrainState, dict[str, float], dict[str, Any]]:
    config, workdir = self._config, self._workdir
    hosts.on_first(lambda: workdir_lib.check_same_run(workdir, self._plain, run_config.MAY_CHANGE))
    versions = run_record.versions()
    del versions['platform']  # Machines of a cluster may have other kernels.
    hosts.check_equal(
      {
        **{f'config.{key}': value for key, value in self._plain.items()},
        **{f'data: {key}': value for key, value in self._data.items()},
        **{f'version of {key}': value for key, value in versions.items()},
      }
    )
    program, state = self._built(rng, model_cls)
    if program.layout is not None:
      self._features = feature_cache.open_cache(config, program, self._dataset)
      self._dataset = self._features.dataset
    identity = program.identity() | {'data': self._data}
    with contextlib.closing(
      checkpoints.Checkpoints(workdir, identity, config.max_checkpoint_keep)
    ) as saver:
      start, notes = saver.latest_step(), {}
      if start is not None:
        state, notes = saver.restore(state)
        start = int(state.global_step)
        state = self._restarted(program, state, notes)
      self._prepare(start, notes)
      record = run_record.RunRecord(workdir)
      hosts.on_first(lambda: record.start(self._plain, program.mesh.shape, start))
      how = 'finished'
      try:
        with contextlib.ExitStack() as stack:
          loop = self._trained(program, state, start, notes, saver, stack)
          content = self._finish(program, loop, start, notes)
        if config.export_backbone:  # Last: should it fail, everything else is there.
          summary.export_backbone(program, loop.state, config, self._name, loop.eval_summary)
      except stopping.Stopped as e:
        how = f'stopped by {e.signal_name}'
        raise
      except BaseException as e:
        how = f'error: {type(e).__name__}: {e}'
        raise
      finally:
        record.end(how, self._loop and self._loop.step)
    return loop.state, loop.train_summary, content

  def _built(self, rng: Array, model_cls: type[ClassificationModel]) -> tuple[Program, TrainState]:
    return build_program(rng=rng, config=self._config, model_cls=model_cls, dataset=self._dataset)

  def _restarted(self, program: Program, state: TrainState, notes: Mapping[str, Any]) -> TrainState:
    """A restored state, to go on from."""
    del notes
    # Bad steps are counted from here: whoever starts a run again wants them to be tried.
    return state.replace(bad_steps=sharding.replicate(np.zeros((), np.int32), program.mesh))

  @property
  def _name(self) -> str:
    return self._dataset.meta_data.get('name') or self._config.dataset_name

  def _prepare(self, start: int | None, notes: Mapping[str, Any]) -> None:
    """Makes the workdir that of a run which goes on from step `start`, or begins."""
    workdir, writer = self._workdir, self._writer
    bad_files = self._dataset.train_ds.bad_files

    def prepare() -> None:
      workdir_lib.write_json(workdir / 'config.json', self._plain)
      if start is None:
        (workdir / 'bad_files.csv').unlink(missing_ok=True)
      if hasattr(writer, 'rewind'):
        writer.rewind(-1 if start is None else start, notes.get('evaluated', True))
      if start is None:
        writer.write_texts(0, {'config': f'```\n{json.dumps(self._plain, indent=1)}\n```'})

    hosts.on_first(prepare)
    if hosts.is_first():
      bad_files.keep_in(workdir / 'bad_files.csv')
    bad_files.share(hosts.gather)

  def _trained(
    self,
    program: Program,
    state: TrainState,
    start: int | None,
    notes: Mapping[str, Any],
    saver: checkpoints.Checkpoints,
    stack: contextlib.ExitStack,
  ) -> Loop:
    """Runs the loop to its end; what must be closed after the run is added to `stack`."""
    config, dataset, first = self._config, self._dataset, start or 0
    bar = progress.Progress(
      first,
      program.total_steps,
      config.batch_size,
      unit='clips' if dataset.meta_data.get('clips') else 'images',
      devices=program.mesh.size,
      peak=device_speed.peak(jax.devices()[0].device_kind, config.model_dtype_str),
      quiet=not hosts.is_first(),
    )
    self._bar = bar
    for line in (
      self._headline(program, state, start),
      *summary.data_lines(dataset.meta_data, program.model.backbone.spec),
      summary.guesses(config.backbone, program.model.backbone),
      self._features and self._features.line,
    ):
      if line:
        bar.say(line)
    watching = watchdog.Watchdog(
      bar.say,
      config.watchdog_seconds or math.inf,
      config.hang_limit_seconds,
      self._reading,
    )
    minutes = config.checkpoint_minutes if config.checkpoint else 0
    requests = stopping.Requests(60 * minutes or None)
    profiler = profile.Profiler(self._workdir, config.profile_steps, bar.say)
    self._bad_steps = BadSteps(self._workdir / 'bad_steps.jsonl', first, config.max_bad_steps)
    around = Surroundings(self._writer, saver, bar, watching, requests, profiler, self._bad_steps)
    self._loop = loop = self._made_loop(program, state, around, notes)
    for one in (self._features, bar, watching):
      if one is not None:
        stack.callback(one.close)
    with contextlib.closing(requests), contextlib.closing(profiler):
      loop.run()
    bar.close()
    watching.doing('finishing')
    return loop

  def _made_loop(
    self, program: Program, state: TrainState, around: Surroundings, notes: Mapping[str, Any]
  ) -> Loop:
    return Loop(program, state, self._config, self._dataset, around, notes)

  def _headline(self, program: Program, state: TrainState, start: int | None) -> str:
    """What begins."""
    rest, head = split_head(state.trainable)
    what = f'{trees.count(rest):,} trainable + {trees.count(head):,} in the head'
    return f'{self._config.method} on {self._where(program, what, start)}'

  def _where(self, program: Program, what: str, start: int | None) -> str:
    """'BACKBONE, DATASET: WHAT, ... frozen; ... steps of ... on ...; starting'."""
    config = self._config
    devices = f'{program.mesh.size} x {jax.devices()[0].device_kind}'
    if jax.process_count() > 1:
      devices += f' in {jax.process_count()} processes'
    origin = 'starting' if start is None else f'continuing from step {start}'
    return (
      f'{config.backbone}, {self._name}: {what}, {trees.count(program.frozen):,} frozen; '
      f'{program.total_steps} steps of {config.batch_size} on {devices}; {origin}'
    )

  def _reading(self) -> list[str]:
    """What the data set's threads and processes read now."""
    parts = (self._dataset.train_ds, self._dataset.valid_ds, self._dataset.test_ds)
    return list(
      dict.fromkeys(line for part in parts if part is not None for line in part.reading())
    )

  def _finish(
    self, program: Program, loop: Loop, start: int | None, notes: Mapping[str, Any]
  ) -> dict[str, Any]:
    """Writes the summary, on the first process."""
    config, dataset, workdir = self._config, self._dataset, self._workdir
    had_ended = start is not None and start >= program.total_steps
    if had_ended and notes.get('evaluated', True):
      loop.eval_summary = _evaluate_finished(program, loop.state, config, dataset)
      dataset.train_ds.bad_files.share(hosts.gather)
    self._writer.flush()
    content = summary.content(
      program.model,
      loop.state,
      program.frozen,
      config,
      dataset,
      start,
      self._bar,
      loop.eval_summary,
      bad_steps=self._bad_steps.count,
    )

    def finish() -> None:
      former = summary.of_training(workdir) if had_ended else {}
      content.update(former)
      workdir_lib.write_json(workdir / 'summary.json', content)
      print(summary.as_table(content, workdir))

    hosts.on_first(finish)
    return content


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
      values |= evaluate.evaluate(program, state, dataset, split).values
  return values


TRAINERS = {'classification': train}


def get_trainer(name: str) -> Callable[..., tuple[TrainState, dict[str, float], dict[str, Any]]]:
  """The train function of that name. Raises `UserError` for an unknown one."""
  return TRAINERS[errors.one_of('trainer_name', name, TRAINERS)]
