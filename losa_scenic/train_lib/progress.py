"""What a person sees while a run goes on: a bar on a terminal, a line now and then elsewhere."""

import datetime
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import tqdm

T = TypeVar('T')


class Progress:
  """Step, loss, images (or clips) per second, the share of time spent waiting, and time left.

  The speed leaves out the first step of the process, which compiles, and pauses for evaluation.
  """

  def __init__(
    self,
    start: int,
    total: int,
    batch_size: int,
    seconds_between_lines: float = 5.0,
    unit: str = 'images',
  ):
    """Starts at step `start` of `total`; `unit` is what a batch holds."""
    self._unit = unit
    self._total, self._batch_size, self._every = total, batch_size, seconds_between_lines
    self._loss = '-'
    self._steps, self._seconds, self._since = 0, 0.0, None
    self._waited = 0.0
    self._last_line = time.monotonic()
    self._bar = None
    if sys.stderr.isatty():
      self._bar = tqdm.tqdm(
        total=total, initial=start, unit='step', dynamic_ncols=True, file=sys.stderr
      )

  def timed(self, batches: Iterator[T]) -> Iterator[T]:
    """Hands batches on, and counts how long the run waits for them."""
    while True:
      asked = time.monotonic()
      try:
        batch = next(batches)
      except StopIteration:
        return
      if self._since is not None:
        self._waited += time.monotonic() - asked
      yield batch

  def step(self) -> None:
    """One more step is done."""
    if self._since is not None:
      self._steps += 1
    if self._bar is not None:
      self._bar.update(1)

  def show(self, step: int) -> None:
    """Without a terminal: prints a line if the last is old, or `step` the end."""
    now = time.monotonic()
    old = now - self._last_line >= self._every and self._steps
    if self._bar is None and (old or step == self._total):
      self._last_line = now
      left = (self._total - step) / self.steps_per_second if self._steps else 0
      self.say(
        f'step {step}/{self._total}  loss {self._loss}  {self._speed()}  '
        f'{datetime.timedelta(seconds=round(left))} left'
      )

  def run(self) -> None:
    """Training goes on: the clock of the speed runs. Called after the compiling step too."""
    if self._since is None:
      self._since = time.monotonic()
      if not self._steps:
        self._last_line = self._since

  def pause(self) -> None:
    """Something else than training begins."""
    if self._since is not None:
      self._seconds += time.monotonic() - self._since
      self._since = None

  def loss(self, value: float) -> None:
    """The latest loss that was logged."""
    self._loss = f'{value:.4f}'
    if self._bar is not None:
      self._bar.set_postfix_str(f'loss {self._loss}, {self._speed()}')

  def say(self, text: str) -> None:
    """Prints a line without spoiling the bar."""
    if self._bar is not None:
      self._bar.write(text, file=sys.stderr)
    else:
      print(text, file=sys.stderr, flush=True)

  @property
  def steps_per_second(self) -> float:
    """Mean speed of training so far; 0 before it is known."""
    return self._steps / self._trained() if self._steps else 0.0

  @property
  def images_per_second(self) -> float:
    """Mean speed of training so far, all devices together; 0 before it is known."""
    return self.steps_per_second * self._batch_size

  @property
  def input_wait(self) -> float:
    """Share of the training time so far that was spent waiting for batches; in [0, 1]."""
    return self._waited / self._trained() if self._steps else 0.0

  def _trained(self) -> float:
    """Seconds of training that count."""
    return self._seconds + (time.monotonic() - self._since if self._since is not None else 0.0)

  def _speed(self) -> str:
    return speed(self.images_per_second, self.input_wait, self._unit)

  def close(self) -> None:
    """Ends the bar and the clock."""
    self.pause()
    if self._bar is not None:
      self._bar.close()


def speed(rate: float, input_wait: float, unit: str = 'images') -> str:
  """'82 images/s, waits 3% for data'.

  Args:
    rate: a second.
    input_wait: share of the time spent waiting, in [0, 1].
    unit: what is counted.
  """
  number = f'{rate:.0f}' if rate >= 10 else f'{rate:.2g}'
  return f'{number} {unit}/s, waits {input_wait:.0%} for data'


def table(title: str, rows: Mapping[str, Any]) -> str:
  """Two aligned columns under a title."""
  width = max(len(name) for name in rows)
  lines = [f'  {name:<{width}}  {value}' for name, value in rows.items()]
  return '\n'.join([title, *lines])
