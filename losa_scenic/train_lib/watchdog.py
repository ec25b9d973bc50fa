"""Says what a run is waiting for when nothing moves, and ends it when that lasts too long.

A disk that does not answer or a process of the run that is gone leaves the main thread in a call
that never returns: no exception can be raised there. So another thread looks on, speaks, and in the
end leaves the process, for whoever started it to start it again.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable

EXIT_STATUS = 4
_TICK = 5.0  # seconds between two looks, at most
_LAST_WORDS = 10.0  # seconds: what is said last may hang as well, e.g. on a full pipe


class Watchdog:
  """Watches the phases of a run; see `doing`."""

  def __init__(
    self,
    say: Callable[[str], object],
    seconds: float,
    limit_seconds: float | None = None,
    details: Callable[[], list[str]] = list,
  ) -> None:
    """Nothing is watched before `doing`.

    Args:
      say: prints a line; called from another thread.
      seconds: a phase that lasts longer is spoken of, and again after twice, four times ... as
        long; above 0.
      limit_seconds: a phase that lasts longer ends the process with status 4, after the stacks of
        all threads went to stderr; above 0. None: never.
      details: what else to say then, e.g. what is being read; called from another thread.

    Raises:
      ValueError: for times that are not above 0.
    """
    if not seconds > 0 or (limit_seconds is not None and not limit_seconds > 0):
      raise ValueError(f'Times must be above 0, not {seconds} and {limit_seconds}.')
    self._say, self._details = say, details
    self._seconds, self._limit = seconds, limit_seconds
    # Of the process: while it was stopped or suspended, nothing could have moved.
    self._stopped = 0.0
    self._phase = ('', 0.0, 0.0)
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._watch, name='watchdog', daemon=True)
    self._thread.start()

  def doing(self, text: str) -> None:
    """A phase begins, and the one before ends. It costs a fraction of a microsecond.

    Args:
      text: what the run is about to do, as 'waiting for the batch of step 41'; '' for nothing that
        is to be watched.
    """
    self._phase = (text, time.monotonic(), self._stopped)

  def close(self) -> None:
    """Ends the watch."""
    self._closed.set()
    self._thread.join(_LAST_WORDS)

  def _watch(self) -> None:
    spoken_of, due = self._phase, self._seconds
    tick = min(_TICK, self._seconds / 8, (self._limit or self._seconds) / 8)
    last = time.monotonic()
    while not self._closed.wait(tick):
      phase, now = self._phase, time.monotonic()
      # Woken much too late: the process was stopped, as a scheduler does to make room.
      self._stopped += max(0.0, now - last - 2 * tick)
      last = now
      if phase is not spoken_of:
        spoken_of, due = phase, self._seconds
      text, since, stopped = phase
      lasted = now - since - (self._stopped - stopped)
      if not text:
        continue
      if self._limit is not None and lasted > self._limit:
        self._end(text, lasted)
      if lasted > due:
        self._speak(f'nothing has moved for {_time(lasted)}: {text}')
        while due < lasted:
          due *= 2

  def _speak(self, line: str) -> None:
    """Says a line and the details. What goes wrong is told and changes nothing."""
    try:
      self._say(line)
      for detail in self._details():
        self._say(f'  {detail}')
    except Exception:
      with contextlib.suppress(Exception):
        traceback.print_exc()

  def _end(self, text: str, lasted: float) -> None:
    """Says why, dumps all stacks, and leaves the process."""

    def last_words() -> None:
      self._speak(
        f'nothing has moved for {_time(lasted)}: {text}. That is longer than hang_limit_seconds '
        f'{self._limit:g}: the process ends with status {EXIT_STATUS}; started again, it goes on '
        'from its last checkpoint'
      )
      stderr = sys.__stderr__ or sys.stderr
      with contextlib.suppress(Exception):
        stderr.flush()
        faulthandler.dump_traceback(stderr, all_threads=True)

    speaker = threading.Thread(target=last_words, name='last words', daemon=True)
    speaker.start()
    speaker.join(_LAST_WORDS)
    os._exit(EXIT_STATUS)


def _time(seconds: float) -> str:
  return f'{seconds:.0f} s' if seconds >= 10 else f'{seconds:.1f} s'
