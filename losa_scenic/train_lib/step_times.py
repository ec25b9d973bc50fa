"""Where the time of training goes: waiting for data, waiting for the device, the rest on the host.

The clock runs between `run` and `stop`, so compilation and evaluation are left out by whoever
starts and stops it. A CPU may compute a step while it is dispatched: then that is the host's time.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Times:
  """Of some steps, in seconds.

  Attributes:
    steps: how many.
    seconds: all the time that they took.
    input: of that, waiting for batches.
    device: of that, waiting for the device, which computes meanwhile.
  """

  steps: int = 0
  seconds: float = 0.0
  input: float = 0.0
  device: float = 0.0

  def __sub__(self, before: 'Times') -> 'Times':
    """What came after `before`."""
    mine, others = dataclasses.astuple(self), dataclasses.astuple(before)
    return Times(*(a - b for a, b in zip(mine, others, strict=True)))

  @property
  def known(self) -> bool:
    """Whether there is a step, and the clock saw it."""
    return self.steps > 0 and self.seconds > 0

  @property
  def steps_per_second(self) -> float:
    """0 before it is known."""
    return self.steps / self.seconds if self.known else 0.0

  def shares(self) -> dict[str, float]:
    """{'input_wait', 'device_wait', 'host'}: shares of the time, in [0, 1], sum 1; needs `known`.

    The host's share is what is left: dispatching steps, logging, saving.
    """
    data, device = self.input / self.seconds, self.device / self.seconds
    return {'input_wait': data, 'device_wait': device, 'host': max(0.0, 1.0 - data - device)}


class Clock:
  """Adds up `Times`."""

  def __init__(self):
    """The clock stands."""
    self._steps, self._seconds, self._since = 0, 0.0, None
    self._input = self._device = 0.0

  def run(self) -> None:
    """The clock runs, if it does not yet."""
    if self._since is None:
      self._since = time.monotonic()

  def stop(self) -> None:
    """The clock stands, if it does not yet."""
    if self._since is not None:
      self._seconds += time.monotonic() - self._since
      self._since = None

  def step(self) -> None:
    """One more step is done; it counts if the clock ran."""
    if self._since is not None:
      self._steps += 1

  @contextlib.contextmanager
  def input(self) -> Iterator[None]:
    """Inside, the run waits for data."""
    counts, asked = self._since is not None, time.monotonic()
    try:
      yield
    finally:
      if counts:
        self._input += time.monotonic() - asked

  @contextlib.contextmanager
  def device(self) -> Iterator[None]:
    """Inside, the run waits for the device."""
    counts, asked = self._since is not None, time.monotonic()
    try:
      yield
    finally:
      if counts:
        self._device += time.monotonic() - asked

  def times(self) -> Times:
    """All that was counted so far."""
    running = time.monotonic() - self._since if self._since is not None else 0.0
    return Times(self._steps, self._seconds + running, self._input, self._device)
