"""Sweeps on one machine: a training subprocess for each run, some at a time, restartable.

Layout of a sweep directory:

    sweep.lock      held while a sweep runs in the directory
    sweep.json      the config file the directory belongs to
    results.jsonl   a row for each finished run: its name, overrides and summary, in run order
    NAME/           one run: overrides.json, run.log, and what the training itself writes
"""

import collections
import contextlib
import dataclasses
import fcntl
import os
import pathlib
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import tqdm

from losa_scenic.bench_lib import results
from losa_scenic.common_lib import errors

_POLL_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run of a sweep.

  Attributes:
    name: directory name, see `hyper.run_name`.
    directory: absolute path; the training's workdir.
    overrides: flag values by key, the shared ones included.
    command: argument list of the subprocess.
    members: where the run is a population, the runs that it stands for, in folders of its own.
  """

  name: str
  directory: pathlib.Path
  overrides: dict[str, Any]
  command: list[str]
  members: tuple['Run', ...] = ()


def execute(
  runs: Sequence[Run],
  environments: Sequence[dict[str, str]],
  targets: Sequence[pathlib.Path],
  grace_seconds: float = 20.0,
  cores: Sequence[Sequence[int]] = (),
) -> int:
  """Runs what is unfinished, one subprocess a run, and gathers the results.

  A run that fails does not stop the others. SIGINT, SIGTERM and SIGHUP end the running ones:
  SIGTERM first, SIGKILL after `grace_seconds` or at a second signal.

  Args:
    runs: the runs, in the order to start them.
    environments: environment variables that each slot adds; as many runs at a time.
    targets: files that receive a row for each finished run, rewritten whenever runs end.
    grace_seconds: how long stopped runs may take to end.
    cores: the processor cores that each slot's runs are bound to; all of them when empty.

  Returns:
    Exit code: 0 if every run is finished, 1 if any failed, 128 + signal number if stopped.

  Raises:
    errors.UserError: if a run's directory holds other overrides, before any run is started.
  """
  with _signals() as signals:
    with contextlib.closing(_Pool(runs, environments, targets, grace_seconds, cores)) as pool:
      pool.work(signals)
    return pool.report(signals)


@contextlib.contextmanager
def lock(path: pathlib.Path) -> Iterator[None]:
  """Holds a file lock; it ends with the process, however that ends.

  Raises:
    errors.UserError: if another process holds it.
  """
  with path.open('a+', encoding='utf-8') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise errors.UserError(
        f"Another sweep ({file.read().strip()}) is running in '{path.parent}': wait for it, end"
        ' it, or choose another --workdir.'
      ) from None
    file.truncate(0)
    file.write(f'process {os.getpid()} on {platform.node()}')
    file.flush()
    yield


@dataclasses.dataclass
class _Child:
  """A started run: `offset` is where its output begins in the log, `started` is monotonic time."""

  run: Run
  slot: int
  process: subprocess.Popen[bytes]
  offset: int
  started: float


class _Pool:
  """Keeps the slots filled, gathers results and shows progress; `close` ends every child."""

  def __init__(
    self,
    runs: Sequence[Run],
    environments: Sequence[dict[str, str]],
    targets: Sequence[pathlib.Path],
    grace_seconds: float,
    cores: Sequence[Sequence[int]],
  ):
    self._runs, self._environments, self._targets = runs, environments, targets
    self._grace_seconds, self._cores = grace_seconds, cores
    self._children: list[_Child] = []
    self._rows: dict[str, list[results.Row]] = {}
    self._failures: dict[str, str] = {}
    self._diverged: dict[str, str] = {}  # Members, of populations that are finished.
    for run in runs:
      self._collect(run)
    self._skipped, self._begun = len(self._rows), time.monotonic()
    self._bar = tqdm.tqdm(
      total=len(runs),
      initial=self._skipped,
      bar_format='{n_fmt}/{total_fmt} |{bar:20}| {desc}',
      disable=not sys.stderr.isatty(),
    )

  def say(self, text: str) -> None:
    """Prints a line above the progress bar, or with the status in it where there is no bar."""
    with contextlib.suppress(OSError):  # A closed terminal must not keep runs from being ended.
      self._bar.write(f'{text} | {self._status()}' if self._bar.disable else text)
      sys.stdout.flush()

  def work(self, signals: Sequence[int]) -> None:
    """Runs everything unfinished, until done or until `signals` is no longer empty."""
    self._write()
    waiting = collections.deque(run for run in self._runs if run.name not in self._rows)
    free = collections.deque(range(len(self._environments)))
    self.say(f'{len(self._runs)} runs')
    while (waiting or self._children) and not signals:
      while waiting and free:
        self._start(waiting.popleft(), free.popleft())
      time.sleep(_POLL_SECONDS)
      free.extend(self._reap(signals))
      self._bar.set_description_str(self._status())
    if self._children:
      self.say(f'stopping {len(self._children)} runs')
      self._stop(signals)

  def close(self) -> None:
    """Ends the children that are left (after an error) and the progress bar."""
    self._stop(())
    self._bar.close()

  def report(self, signals: Sequence[int]) -> int:
    """Prints how the sweep went, with the end of the log of each failed run.

    Args:
      signals: signals received.

    Returns:
      The exit code, see `execute`.
    """
    for name, text in (self._failures | self._diverged).items():
      print(f'\nfailed: {name}: {text}', file=sys.stderr)
    counts = f'{len(self._rows)} of {len(self._runs)} runs finished, {len(self._failures)} failed'
    if self._diverged:
      counts += f', {len(self._diverged)} members diverged'
    print(f'{counts}; results in {self._targets[0]}')
    if signals:
      name = signal.Signals(signals[0]).name
      print(f'Stopped by {name}: the same command continues the sweep.', file=sys.stderr)
      return 128 + signals[0]
    return 1 if self._failures or self._diverged else 0

  def _start(self, run: Run, slot: int) -> None:
    results.write_object(run.directory / 'overrides.json', run.overrides)
    environment = {'PYTHONUNBUFFERED': '1', **os.environ, **self._environments[slot]}
    with (run.directory / 'run.log').open('ab') as log:
      log.write(f'$ {shlex.join(run.command)}\n'.encode())
      log.flush()
      offset = log.tell()  # Before the start: the child moves the position as it writes.
      process = subprocess.Popen(
        run.command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,  # Ctrl-C reaches the sweep only, which then ends the runs.
      )
      self._children.append(_Child(run, slot, process, offset, time.monotonic()))
      if self._cores:
        # Long before the run starts threads, which inherit it.
        os.sched_setaffinity(process.pid, self._cores[slot])
    self.say(f'started {run.name} (slot {slot})')

  def _reap(self, signals: Sequence[int]) -> list[int]:
    """Takes in the children that have ended and returns their slots."""
    ended = [child for child in self._children if child.process.poll() is not None]
    for child in ended:
      self._children.remove(child)
      name, seconds = child.run.name, time.monotonic() - child.started
      problem = self._problem(child)
      if problem and signals:
        self.say(f'stopped {name}')
        continue
      self._bar.update()
      if problem:
        self._failures[name] = problem
      self.say(f'{"FAILED" if problem else "finished"} {name} in {_duration(seconds)}')
    if ended:
      self._write()
    return [child.slot for child in ended]

  def _problem(self, child: _Child) -> str:
    """Collects the result of a child that has ended; says what is wrong, '' if nothing."""
    code, log = child.process.returncode, child.run.directory / 'run.log'
    reason = f'exit code {code}' if code >= 0 else f'killed by signal {-code}'
    try:
      if code == 0 and self._collect(child.run):
        return ''
      reason += ' without a summary.json' if code == 0 else ''
    except errors.UserError as error:
      reason += f', but {error}'
    return f'{reason}; end of {log}:\n{results.tail(log, child.offset)}'

  def _collect(self, run: Run) -> bool:
    summary = results.read_summary(run.directory, run.overrides)
    if summary is None:
      return False
    found = {one.name: results.read_summary(one.directory, one.overrides) for one in run.members}
    for name in [name for name, own in found.items() if own is None]:
      self._diverged[name] = f'diverged as a member of {run.name}; see its run.log'
    alone = [(run, summary)] if not run.members else [(o, found[o.name]) for o in run.members]
    self._rows[run.name] = [
      {'run': one.name, **one.overrides, **own} for one, own in alone if own is not None
    ]
    return True

  def _write(self) -> None:
    rows = [row for run in self._runs for row in self._rows.get(run.name, ())]
    for target in self._targets:
      results.write_rows(target, rows)

  def _stop(self, signals: Sequence[int]) -> None:
    """SIGTERM to each child; SIGKILL to it and its children after the grace or a second signal."""
    for child in self._children:
      child.process.terminate()
    deadline = time.monotonic() + self._grace_seconds
    running = list(self._children)
    while running and time.monotonic() < deadline and len(signals) < 2:
      time.sleep(_POLL_SECONDS)
      running = [child for child in running if child.process.poll() is None]
    for child in running:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(child.process.pid, signal.SIGKILL)
      child.process.wait()
    self._reap(signals or (signal.SIGTERM,))  # Last, as it can fail where the disk is full.

  def _status(self) -> str:
    done, failed = len(self._rows), len(self._failures)
    ended, left = done + failed - self._skipped, len(self._runs) - done - failed
    text = f'{done}/{len(self._runs)} finished, {len(self._children)} running, {failed} failed'
    if ended and left:
      text += f', about {_duration((time.monotonic() - self._begun) / ended * left)} left'
    return text


def _duration(seconds: float) -> str:
  if seconds < 120:
    return f'{seconds:.0f} s'
  return f'{seconds / 60:.0f} min' if seconds < 7200 else f'{seconds / 3600:.1f} h'


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
  """Collects stop signals in a list instead of dying of them; ignored ones stay ignored."""
  received: list[int] = []
  kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
  in_main = threading.current_thread() is threading.main_thread()  # Others may set no handlers.
  caught = [k for k in kinds if in_main and signal.getsignal(k) is not signal.SIG_IGN]
  previous = {k: signal.signal(k, lambda number, _: received.append(number)) for k in caught}
  try:
    yield received
  finally:
    for kind, handler in previous.items():
      signal.signal(kind, handler)
