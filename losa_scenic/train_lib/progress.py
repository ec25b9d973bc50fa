"""What a person sees while a run goes on: a bar on a terminal, a line now and then elsewhere."""

import datetime
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import tqdm

from losa_scenic.train_lib import heartbeat, memory, step_times

T = TypeVar('T')

# What `Progress.interval` may hold: these differ between two runs that are otherwise the same.
MEASUREMENTS = (
  'img/sec',
  'img/sec/device',
  'input_wait',
  'device_wait',
  'host',
  'step_seconds',
  'tflops_per_device',
  'mfu',
  'host_memory_gb',
  'device_memory_gb',
)

_LINE = 120  # columns of a line in a log, at most
_BAR = 50  # columns of a terminal that the bar itself takes
_REDRAW = 0.1  # seconds between two pictures of the bar in an evaluation


class Progress:
  """Step, loss, speed, where the time goes, memory, utilization of the devices, and time left.

  Speeds leave out the first step of the process, which compiles, and pauses for evaluation. Lines
  tell of the time since the line before; time left rests on the mean of the whole run.

  Attributes:
    flops_per_step: floating-point operations of a step on all devices, see `device_speed`; None if
      not known. It may be set later.
  """

  def __init__(
    self,
    start: int,
    total: int,
    batch_size: int,
    seconds_between_lines: float = 5.0,
    unit: str = 'images',
    *,
    devices: int = 1,
    flops_per_step: float | None = None,
    peak: float | None = None,
    quiet: bool = False,
  ):
    """Starts at step `start` of `total`.

    Args:
      start: steps that are done.
      total: steps of the whole training.
      batch_size: of all devices together.
      seconds_between_lines: without a terminal.
      unit: what a batch holds.
      devices: of all processes.
      flops_per_step: see above.
      peak: operations a second of one device, None if not known.
      quiet: shows nothing, and only measures: for processes other than the first.
    """
    self.flops_per_step = flops_per_step
    self._peak, self._devices, self._quiet = peak, devices, quiet
    self._unit = unit
    self._total, self._batch_size, self._every = total, batch_size, seconds_between_lines
    self._loss: float | None = None
    self._of = ''
    self._clock = step_times.Clock()
    self._at_interval = self._at_line = step_times.Times()
    self._last_line = self._last_redraw = time.monotonic()
    self._bar = None
    if sys.stderr.isatty() and not quiet:
      self._bar = tqdm.tqdm(
        total=total, initial=start, unit='step', dynamic_ncols=True, file=sys.stderr
      )

  def timed(self, batches: Iterator[T]) -> Iterator[T]:
    """Hands batches on, and counts how long the run waits for them."""
    while True:
      with self._clock.input():
        try:
          batch = next(batches)
        except StopIteration:
          return
      yield batch

  def device(self) -> AbstractContextManager[None]:
    """A context around what waits for the device: `jax.block_until_ready`, `jax.device_get`."""
    return self._clock.device()

  def step(self) -> None:
    """One more step is done."""
    self._clock.step()
    if self._bar is not None:
      self._bar.update(1)

  def run(self) -> None:
    """Training goes on: the clock of the speed runs. Called after the compiling step too."""
    if not self._clock.times().steps:
      self._last_line = time.monotonic()
    self._clock.run()

  def pause(self) -> None:
    """Something else than training begins."""
    self._clock.stop()

  def show(self, step: int) -> None:
    """Without a terminal: prints a line if the last is old, or `step` the end."""
    times = self._clock.times()
    if self._due(bool(times.steps) or step == self._total, at_once=step == self._total):
      self.say(self._line(step, times - self._at_line))
      self._at_line = times

  def evaluating(self, split: str, done: int, total: int) -> None:
    """How far an evaluation is: a line if the last is old, or a word in the bar.

    Args:
      split: what is evaluated.
      done: batches.
      total: batches.
    """
    text = f'evaluating {split} {done}/{total}'
    if self._bar is None:
      if self._due(done < total):
        self.say(text)
    elif done == total:
      self._write_postfix(step_times.Times())
    elif time.monotonic() - self._last_redraw >= _REDRAW:
      self._last_redraw = time.monotonic()
      self._bar.set_postfix_str(text)

  def loss(self, value: float, of: str = '') -> None:
    """The latest loss that was logged; `of` whom, if there are several."""
    self._loss, self._of = value, of
    times = self._clock.times()
    self._write_postfix(times - self._at_line)
    if self._bar is not None and times.seconds - self._at_line.seconds >= self._every:
      self._at_line = times

  def say(self, text: str) -> None:
    """Prints a line without spoiling the bar."""
    if self._bar is not None:
      self._bar.write(text, file=sys.stderr)
    elif not self._quiet:
      print(text, file=sys.stderr, flush=True)

  def interval(self) -> dict[str, float]:
    """Measurements of the steps since the last call, for the log; see `measurements`.

    Memory is there always where it can be read, the rest if a step was timed since.
    """
    times = self._clock.times()
    values = self.measurements(times - self._at_interval)
    self._at_interval = times
    held = {'host_memory_gb': memory.host_gb(), 'device_memory_gb': memory.peak_device_gb()}
    return values | {name: value for name, value in held.items() if value is not None}

  def measurements(self, times: step_times.Times | None = None) -> dict[str, float]:
    """Speeds of some steps; of all so far if no times are given. {} if none was timed.

    Returns:
      'img/sec' and 'img/sec/device'; 'input_wait', 'device_wait' and 'host', shares of the time, in
      [0, 1], whose sum is 1; 'step_seconds'; where the operations of a step are known,
      'tflops_per_device' (10**12 of them a second), and where the device's peak is known too,
      'mfu', the share of it, in [0, 1].
    """
    times = self._clock.times() if times is None else times
    if not times.known:
      return {}
    rate = times.steps_per_second * self._batch_size
    values = {'img/sec': rate, 'img/sec/device': rate / self._devices}
    values |= times.shares() | {'step_seconds': 1 / times.steps_per_second}
    if self.flops_per_step is not None:
      flops = self.flops_per_step * times.steps_per_second / self._devices
      values['tflops_per_device'] = flops / 1e12
      if self._peak is not None:
        values['mfu'] = flops / self._peak
    return values

  @property
  def steps_per_second(self) -> float:
    """Mean speed of training so far; 0 before it is known."""
    return self._clock.times().steps_per_second

  @property
  def images_per_second(self) -> float:
    """Mean speed of training so far, all devices together; 0 before it is known."""
    return self.steps_per_second * self._batch_size

  @property
  def input_wait(self) -> float:
    """Share of the training time so far that was spent waiting for batches; in [0, 1]."""
    return self.measurements().get('input_wait', 0.0)

  def _due(self, something: bool, at_once: bool = False) -> bool:
    """Whether it is time for a line in the log, which is then the last one."""
    now = time.monotonic()
    due = something and self._bar is None and (at_once or now - self._last_line >= self._every)
    if due:
      self._last_line = now
    return due

  def _line(self, step: int, times: step_times.Times) -> str:
    """What a log shows of a step, and of the time since the last line."""
    start, end, speed = f'step {step}/{self._total}  ', '', self.steps_per_second
    if speed:
      end = f'  {datetime.timedelta(seconds=round((self._total - step) / speed))} left'
    return start + self._facts(times, _LINE - len(start + end)) + end

  def _facts(self, times: step_times.Times, columns: int) -> str:
    """What is known of some steps (of all, if none of those was timed), as long as it may be."""
    values = self.measurements(times) or self.measurements()
    held = memory.peak_device_gb() or memory.host_gb()
    pieces = heartbeat.pieces(self._loss, values, self._unit, held, self._of)
    return heartbeat.fit(pieces, columns)

  def _write_postfix(self, times: step_times.Times) -> None:
    if self._bar is not None:
      columns = shutil.get_terminal_size().columns if self._bar.ncols is None else self._bar.ncols
      self._bar.set_postfix_str(self._facts(times, columns - _BAR))

  def close(self) -> None:
    """Ends the bar and the clock."""
    self.pause()
    if self._bar is not None:
      self._bar.close()


def table(title: str, rows: Mapping[str, Any]) -> str:
  """Two aligned columns under a title."""
  width = max(len(name) for name in rows)
  lines = [f'  {name:<{width}}  {value}' for name, value in rows.items()]
  return '\n'.join([title, *lines])
