"""The train loop: steps, and what falls due between them.

Order within a step (do not change it: exact resume rests on it): train, log, evaluate, save best,
flush what was logged, save last. What was not logged yet travels in the checkpoint, and so does the
fact that an evaluation was cut short, so a run that is continued from any checkpoint logs exactly
what it would have logged uninterrupted.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np

from losa_scenic.common_lib import errors, hosts
from losa_scenic.common_lib.types import Batch, Config
from losa_scenic.dataset_lib import dataset_utils
from losa_scenic.train_lib import device_speed, evaluate, sharding, stopping
from losa_scenic.train_lib.bad_steps import BadSteps
from losa_scenic.train_lib.checkpoints import Checkpoints
from losa_scenic.train_lib.profile import Profiler
from losa_scenic.train_lib.program import Program
from losa_scenic.train_lib.progress import Progress
from losa_scenic.train_lib.state import TrainState
from losa_scenic.train_lib.tally import Tally
from losa_scenic.train_lib.watchdog import Watchdog
from losa_scenic.train_lib.writers import Writer

# Batches on their way through the devices while the next one is made ready.
_IN_FLIGHT = 2


@dataclasses.dataclass(frozen=True)
class Surroundings:
  """What a loop talks to; on all processes, but only the first one's writes and speaks."""

  writer: Writer
  saver: Checkpoints
  bar: Progress
  watchdog: Watchdog
  requests: stopping.Requests
  profiler: Profiler
  bad_steps: BadSteps


@dataclasses.dataclass(frozen=True)
class _Step:
  """A step that was handed to the devices."""

  number: int
  metrics: Mapping[str, Any]
  positions: np.ndarray


class Loop:
  """One run, from a step on to its end.

  Attributes:
    state: of the training, after the last step.
    step: number of the last step that was handed to the devices.
    train_summary: the last logged means.
    eval_summary: the last evaluation.
  """

  def __init__(
    self,
    program: Program,
    state: TrainState,
    config: Config,
    dataset: dataset_utils.Dataset,
    around: Surroundings,
    notes: Mapping[str, Any],
  ):
    """Nothing is run yet.

    Args:
      program: the run's fixed parts.
      state: at the beginning, or restored.
      config: resolved.
      dataset: the run's.
      around: what the loop talks to.
      notes: those of the checkpoint that the state is from; {} at the beginning.
    """
    self.state, self.train_summary, self.eval_summary = state, {}, {}
    self._program, self._config, self._dataset = program, config, dataset
    self._around = around
    self._total = program.total_steps
    self.step = self._first = int(state.global_step)
    self._eval_every = config.log_eval_steps or program.steps_per_epoch
    self._save_every = config.checkpoint_steps or program.steps_per_epoch
    self._tally = Tally(notes.get('tally'))
    self._evaluated = notes.get('evaluated', True)
    self._flying: collections.deque[_Step] = collections.deque()
    # The tally before the bad steps that came last in a row.
    self._before_bad = self._tally.saved()

  def run(self) -> None:
    """Trains to the end.

    Raises:
      stopping.Stopped: after a request to stop, when everything is saved.
      bad_steps.Diverged: after too many steps that were not finite.
      errors.UserError: for a checkpoint that cannot be written, or too many unreadable images.
    """
    around = self._around
    if self._first and not self._evaluated:  # A request to stop had cut it short.
      self._evaluate(self._first)
    batches = dataset_utils.iterate(self._dataset.train_ds, self._first, self._total)
    timed = around.bar.timed(batches)
    for step in range(self._first + 1, self._total + 1):
      self._train(step, self._next(timed, step))
      if step == self._first + 1:
        self._land(0)  # The clock starts after compilation.
        around.requests.listen()
      around.bar.step()
      around.bar.run()
      self._after(step)
      around.bar.run()
      around.bar.show(step)
    around.watchdog.doing('writing the last checkpoint')
    around.saver.wait()

  def _next(self, batches: Iterator[Batch], step: int) -> Batch:
    self._around.watchdog.doing(f'waiting for the batch of step {step}')
    try:
      with self._around.requests.interruptible():
        return next(batches)
    except stopping.Interrupted:
      self._stop(step - 1, evaluated=True)

  def _train(self, step: int, batch: Batch) -> None:
    """Hands a step to the devices, and waits for one that they were given before."""
    around, program = self._around, self._program
    first = ' with its compilation' if step == self._first + 1 else ''
    around.watchdog.doing(f'step {step}{first}')
    placed = sharding.put(around.requests.mark(batch), program.mesh)
    if step == self._first + 1 and jax.default_backend() != 'cpu':
      # Of use only beside a peak, and nobody knows that of a CPU.
      around.bar.flops_per_step = device_speed.step_flops(
        program.train_step, self.state, program.frozen, placed
      )
    with around.profiler.annotate(step):
      self.state, values = program.train_step(self.state, program.frozen, placed)
    self.step = step
    self._flying.append(_Step(step, values, batch['index']))
    self._land(_IN_FLIGHT)
    around.profiler.step(step, values)

  def _land(self, flying: int) -> None:
    """Takes in what steps have measured, until only so many are under way."""
    while len(self._flying) > flying:
      one = self._flying.popleft()
      with self._around.bar.device():
        values = jax.device_get(one.metrics)
      self._around.requests.hear(values.pop(stopping.ASKED, (stopping.NOTHING,))[0])
      self._take(one, values)

  def _take(self, one: _Step, values: dict[str, Any]) -> None:
    """Counts what a step has measured."""
    in_a_row = int(values.pop('bad_steps')[0])
    if in_a_row:
      self._drop(one, values, in_a_row)
    else:
      self._tally.add(values)

  def _drop(self, one: _Step, values: Mapping[str, Any], in_a_row: int) -> None:
    """Notes a step whose numbers were not finite; ends the run after too many of them."""
    around, limit = self._around, self._config.max_bad_steps
    if in_a_row == 1:
      self._before_bad = self._tally.saved()
    names = self._dataset.train_ds.names(one.positions)
    around.bar.say(around.bad_steps.add(one.number, values, one.positions.tolist(), names))
    if in_a_row < limit:
      return
    # Nothing moved since the limit was reached: the state is that before these bad steps.
    raise around.bad_steps.end(one.number, self._keep(one.number - in_a_row))

  def _keep(self, good: int) -> str:
    """Saves the state as that of step `good`, unless it is there; says what is kept."""
    saver = self._around.saver
    if not self._config.checkpoint:
      return 'Nothing is saved.'
    try:
      saver.wait()  # What is on its way counts too.
      newest = saver.latest_step() or 0
      if newest < good:
        step, none = (np.asarray(n, np.int32) for n in (good, 0))
        step, none = sharding.replicate((step, none), self._program.mesh)
        self.state = self.state.replace(global_step=step, bad_steps=none)
        self._tally = Tally(self._before_bad)
        self._save(good)
        saver.wait()
    except errors.UserError as e:
      return f'{e}'
    kept = max(newest, good)
    return f'The state of step {kept} is saved.' if kept else 'No step was good.'

  def _after(self, step: int) -> None:
    """What falls due after a step."""
    config, around = self._config, self._around
    last = step == self._total
    around.saver.check()
    asked = around.requests.agreed
    saves = last or step % self._save_every == 0 or asked >= stopping.SAVE
    logs = last or step % config.log_summary_steps == 0
    evaluates = bool(self._splits(step))
    if logs or saves or evaluates:
      self._land(0)
      self._dataset.train_ds.bad_files.share(hosts.gather)
    if logs:
      self._log(step)
    if asked == stopping.STOP:
      self._stop(step, evaluated=not evaluates)
    if evaluates:
      self._evaluate(step)
    if saves and config.checkpoint:
      self._save(step)

  def _log(self, step: int) -> None:
    """Writes the means since the last row."""
    around = self._around
    means = self._tally.row()
    self.train_summary = {f'train_{name}': value for name, value in means.items()}
    if 'train_loss' in self.train_summary:
      around.bar.loss(self.train_summary['train_loss'])
    extra = {
      # Of the optimizer: dropped steps are none of its updates.
      'learning_rate': float(self._program.learning_rate(step - 1 - around.bad_steps.count)),
      'epoch': step * self._program.epochs_per_step,
      **around.bar.interval(),
    }
    around.writer.write_scalars(step, self.train_summary | extra)

  def _splits(self, step: int) -> list[str]:
    """The splits that are evaluated after a step."""
    last = step == self._total
    valid = self._dataset.valid_ds is not None and (last or step % self._eval_every == 0)
    return ['valid'] * valid + ['test'] * (last and self._config.evaluate_test)

  def _watched(self, split: str) -> evaluate.Watch:
    """What an evaluation reports its batches to; raises `Interrupted` on a request to stop."""
    around = self._around

    def watch(done: int, total: int) -> None:
      around.watchdog.doing(f'evaluating {split}, batch {min(done + 1, total)} of {total}')
      around.bar.evaluating(split, done, total)
      if around.requests.agreed == stopping.STOP:
        raise stopping.Interrupted

    return evaluate.Watch(watch, around.requests)

  def _evaluate(self, step: int) -> None:
    around, done = self._around, {}
    around.bar.pause()
    for split in self._splits(step):
      try:
        done[split] = self._measured(split)
      except stopping.Interrupted:
        self._stop(step, evaluated=False)
    # Nothing is written before all is known: an evaluation that was cut short leaves no trace.
    for found in done.values():
      self._write(step, found)
    self._dataset.train_ds.bad_files.share(hosts.gather)
    if 'valid' in done:
      self._compare(step)

  def _measured(self, split: str) -> Any:
    """What an evaluation finds."""
    return evaluate.evaluate(self._program, self.state, self._dataset, split, self._watched(split))

  def _write(self, step: int, found: Any) -> None:
    """Writes and keeps what `_measured` found."""
    found.write(step, self._around.writer)
    self.eval_summary |= found.values

  def _compare(self, step: int) -> None:
    """Says how good the state is, and saves it if it is the best."""
    accuracy = self.eval_summary['valid_accuracy']
    self._around.bar.say(f'step {step}/{self._total}  valid accuracy {accuracy:.4f}')
    if self._config.checkpoint:
      self._around.saver.save_best(self.state, accuracy)

  def _save(self, step: int, evaluated: bool = True) -> None:
    """Saves the state as it is after a step; what it stands for is on disk before it."""
    around = self._around
    around.watchdog.doing(f'saving step {step}')
    around.writer.flush()
    around.saver.save(self.state, self._notes() | {'evaluated': evaluated})
    around.requests.saved()

  def _notes(self) -> dict[str, Any]:
    """What a checkpoint holds beside the state."""
    return {'tally': self._tally.saved()}

  def _stop(self, step: int, evaluated: bool) -> NoReturn:
    """Saves and ends, because somebody asked for it; `evaluated`: nothing of `step` is left out."""
    around = self._around
    self._land(0)
    if self._config.checkpoint:
      self._save(step, evaluated)
      around.saver.wait()
    raise stopping.Stopped(around.requests.signal_number, step, self._config.checkpoint)
