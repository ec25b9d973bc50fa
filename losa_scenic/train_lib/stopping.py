"""Requests to stop (signals) and to save, and how the processes of a run agree on them."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

# In a batch: what a process asks of all, int32 [b]. No part of the model's input.
ASKED = 'asked'
# In rising order: the highest wins.
NOTHING, SAVE, STOP = 0, 1, 2
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(Exception):
  """A run was asked to end, and has: the same command continues it.

  Attributes:
    exit_code: 128 + the signal's number, as shells say it.
  """

  def __init__(self, number: int, step: int, saved: bool):
    """`number` of the signal; `step` is the last one done, and `saved` whether it is kept."""
    kept = f'step {step} is saved; the same command continues' if saved else 'nothing is saved'
    super().__init__(f'stopped by {signal.Signals(number).name}: {kept}')
    self.exit_code = 128 + number
    self.signal_name = signal.Signals(number).name


class Interrupted(Exception):
  """Raised in a wait that a request to stop cuts short."""


class Requests:
  """Requests of this process to all; several processes act on them at the same step.

  From `listen` to `close`, the first SIGTERM, SIGHUP (a terminal that is gone) or SIGINT asks to
  stop; further ones change nothing (schedulers send several), but a second SIGINT interrupts at
  once. What was ignored, as `nohup` asks for, stays so. Signals that arrive before `listen` end the
  process as usual: then there is nothing to save.
  """

  def __init__(self, save_seconds: float | None = None):
    """Asks to save when the last save is `save_seconds` old; None: never."""
    self._alone = jax.process_count() == 1
    self._every = save_seconds
    self._saved = time.monotonic()
    self._signal: int | None = None
    self._waiting = False
    self._agreed = NOTHING
    self._before: dict[int, Any] = {}

  def listen(self) -> None:
    """Takes signals from now on."""
    # Only the main thread may do this; a run in another one is stopped by its owner.
    if threading.current_thread() is threading.main_thread():
      for number in _SIGNALS:
        if signal.getsignal(number) is signal.SIG_IGN:
          continue
        self._before[number] = signal.signal(number, self._note)

  def close(self) -> None:
    """Leaves signals to whom they were before."""
    for number, handler in self._before.items():
      signal.signal(number, handler)
    self._before.clear()

  def _note(self, number: int, _: Any) -> None:
    if self._signal is None:
      self._signal = number
      # Not through `print`: the main thread may be in the middle of one.
      os.write(2, f'\n{signal.Signals(number).name}: saving, then stopping\n'.encode())
      if self._waiting:
        raise Interrupted
    elif number == signal.SIGINT:
      raise KeyboardInterrupt

  @contextlib.contextmanager
  def interruptible(self) -> Iterator[None]:
    """A wait that a request to stop ends with `Interrupted`: the input may never come.

    In a run of several processes the others would go on waiting for this one, so there it does not.
    """
    if not self._alone:
      yield
      return
    self._waiting = True
    try:
      if self._signal is not None:
        raise Interrupted
      yield
    finally:
      self._waiting = False

  def mine(self) -> int:
    """What this process asks for now."""
    if self._signal is not None:
      return STOP
    old = self._every is not None and time.monotonic() - self._saved >= self._every
    return SAVE if old and jax.process_index() == 0 else NOTHING

  def mark(self, batch: Any) -> Any:
    """The batch of this process, with what it asks for: `agreed` hears of it when it was used."""
    if self._alone:
      return batch
    return {**batch, ASKED: np.full(len(batch['batch_mask']), self.mine(), np.int32)}

  def hear(self, asked: float) -> None:
    """Notes what a batch said, of all processes the highest."""
    self._agreed = max(self._agreed, int(asked))

  @property
  def agreed(self) -> int:
    """What is to be done; the same on all processes after the same batch was heard."""
    return self.mine() if self._alone else self._agreed

  @property
  def signal_number(self) -> int:
    """The signal that asked to stop; SIGTERM if it came to another process."""
    return self._signal or signal.SIGTERM

  def saved(self) -> None:
    """A checkpoint is made: the request for one is met."""
    self._saved = time.monotonic()
    if self._agreed == SAVE:
      self._agreed = NOTHING
