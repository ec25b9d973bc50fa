"""A trace of some steps: what host and devices did when, for TensorBoard and XProf."""

import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax

from losa_scenic.common_lib import errors

# Compilation, filling caches and the first reads of the data are over after so many steps.
_WARM = 5


def _print(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


class Profiler:
  """Traces some steps of this process, once it is warm.

  A run of several processes has a trace of each, in `<workdir>/profile/process_<i>`; of one process
  it is in `<workdir>/profile`. A trace that fails ends no run.
  """

  def __init__(self, workdir: pathlib.Path, steps: int, say: Callable[[str], None] | None = None):
    """Traces `steps` steps, none if 0.

    Args:
      workdir: of the run.
      steps: how many, from the sixth of this process on.
      say: prints a line; to stderr by default.

    Raises:
      errors.UserError: if `steps` is no integer of at least 0.
    """
    errors.check_at_least('profile_steps', steps, 0)
    own = (f'process_{jax.process_index()}',) if jax.process_count() > 1 else ()
    self._workdir, self._folder = workdir, pathlib.Path(workdir, 'profile', *own)
    self._wanted, self._done, self._say = steps, 0, say or _print
    self._tracing = False

  def annotate(self, step: int) -> jax.profiler.StepTraceAnnotation:
    """A context around what one step does on the host; names it in a trace."""
    return jax.profiler.StepTraceAnnotation('train', step_num=step)

  def step(self, number: int, outputs: Any = None) -> None:
    """One more step was handed to the devices; starts the trace or ends it where it is time.

    Args:
      number: of the step.
      outputs: what it returned. At both ends of the trace they are waited for, so that it holds
        the devices' work on exactly these steps.
    """
    if not self._wanted:
      return
    self._done += 1
    if self._done == _WARM:
      jax.block_until_ready(outputs)
      self._start(number)
    elif self._tracing and self._done == _WARM + self._wanted:
      jax.block_until_ready(outputs)
      self._stop()

  def close(self) -> None:
    """Ends a trace that is under way; says so if none was begun."""
    if self._tracing:
      self._stop()
    elif self._wanted and self._done < _WARM:
      self._say(f'profile: no trace, because this process did no more than {_WARM} steps')
      self._wanted = 0

  def _start(self, number: int) -> None:
    try:
      self._folder.mkdir(parents=True, exist_ok=True)  # Else it fails when all is traced.
      jax.profiler.start_trace(str(self._folder))
    except (RuntimeError, OSError) as e:
      self._fail(e)
    else:
      self._tracing = True
      self._say(f'profile: tracing {self._wanted} steps from step {number + 1} on')

  def _stop(self) -> None:
    self._tracing, self._wanted = False, 0
    try:
      jax.profiler.stop_trace()
    except (RuntimeError, OSError) as e:
      self._fail(e)
    else:
      self._say(
        f'profile: {self._done - _WARM} steps; open it with '
        f'`tensorboard --logdir {self._workdir}`, PROFILE in its menu (needs `pip install '
        'tensorboard xprof`)'
      )

  def _fail(self, error: Exception) -> None:
    self._wanted = 0
    self._say(f'profile: no trace: {error}')
