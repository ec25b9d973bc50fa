"""The steps of a run that were dropped because their numbers were not finite, with their images."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from losa_scenic.common_lib import errors, hosts
from losa_scenic.train_lib.writers import JsonLinesWriter


class Diverged(errors.UserError):
  """Training ended because its numbers were not finite."""

  exit_code = 3


class BadSteps:
  """Lists them in a file of JSON lines: step, loss, norms, positions and names of the images.

  Attributes:
    count: how many were dropped so far.
  """

  def __init__(self, path: pathlib.Path, start: int, limit: int):
    """Keeps what the file says of steps up to `start`; the run goes on from there.

    Args:
      path: the file; made when the first bad step comes.
      start: steps done.
      limit: so many in a row end the run.
    """
    self._path, self._limit = path, limit
    self._lines = JsonLinesWriter(path)
    self.count = hosts.on_first(lambda: self._rewind(start))

  def _rewind(self, start: int) -> int:
    self._lines.rewind(start)
    return len(self._path.read_bytes().splitlines()) if self._path.exists() else 0

  def add(
    self, step: int, values: Mapping[str, Any], positions: Sequence[int], names: Sequence[str]
  ) -> str:
    """Notes a step, on all processes at once.

    Args:
      step: its number.
      values: its metrics.
      positions: of this process's images in the training split; -1 where there was none.
      names: of those images.

    Returns:
      A line about it.
    """
    self.count += 1
    numbers = {name: float(values[name][0]) for name in ('loss', 'l2_grads', 'l2_params')}
    everywhere = hosts.gather([list(map(int, positions)), list(names)])
    row = {
      'step': step,
      # JSON has no name for what is not finite.
      **{k: value if math.isfinite(value) else str(value) for k, value in numbers.items()},
      'positions': [i for part, _ in everywhere for i in part],
      'images': [name for _, part in everywhere for name in part],
    }
    if hosts.is_first():
      self._lines.write_row(row)
      self._lines.flush()  # It is on disk before a checkpoint that it belongs to.
      self._lines.close()
    what = ', '.join(f'{name} {value:g}' for name, value in numbers.items())
    return f'step {step} is dropped: {what}; its images are in {self._path.name}'

  def end(self, step: int, kept: str) -> Diverged:
    """The error that ends the run after step `step`; `kept` says what became of the state."""
    few = f'{self._limit} steps in a row were' if self._limit > 1 else 'The step was'
    return Diverged(
      f'{few} not finite, the last one step {step}: training has diverged. {kept} What they saw is '
      f'in {self._path}. The same command tries them again, and --config.max_bad_steps='
      f'{2 * self._limit} drops more of them. Else lower the learning rate or clip gradients '
      '(max_grad_norm), and use another --workdir.'
    )
