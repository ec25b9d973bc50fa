"""Jobs that one thread does in order, beside the train loop; its first failure ends them."""

import collections
import concurrent.futures
from collections.abc import Callable


class Background:
  """A queue of jobs and the one thread that works on it.

  After a job has failed, those behind it are dropped: a later job may rest on an earlier one.
  """

  def __init__(self, name: str, waiting: int):
    """Starts without a thread.

    Args:
      name: of the thread.
      waiting: jobs that may wait behind the one under way.
    """
    self._waiting = waiting
    self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix=name)
    self._jobs: collections.deque[concurrent.futures.Future] = collections.deque()
    self._failure: Exception | None = None
    self._told = False

  def make_room(self) -> None:
    """Waits until one more job may wait, if `waiting` do. Raises as `check` does."""
    while self._jobs and (self._jobs[0].done() or len(self._jobs) > self._waiting):
      concurrent.futures.wait([self._jobs.popleft()])
    self.check()

  def submit(self, job: Callable[[], None]) -> None:
    """Queues a job, without waiting; call `make_room` before what it needs is allocated."""
    self._jobs.append(self._pool.submit(self._run, job))

  def check(self) -> None:
    """Raises what a job raised, if one did; costs nothing."""
    if self._failure is not None:
      self._told = True
      raise self._failure

  def wait(self) -> None:
    """Waits for all jobs. Raises as `check` does."""
    concurrent.futures.wait(self._jobs)
    self._jobs.clear()
    self.check()

  def close(self) -> None:
    """Waits for all jobs and ends the thread; raises a failure that nobody was told of yet."""
    self._pool.shutdown(wait=True)
    self._jobs.clear()
    if not self._told:
      self.check()

  def _run(self, job: Callable[[], None]) -> None:
    if self._failure is None:
      try:
        job()
      except Exception as e:
        self._failure = e
