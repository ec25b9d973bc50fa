"""Checkpoints of a run: trainable parameters, optimizer, step, rng, data position; nothing frozen.

`<workdir>/checkpoints/last/<step>` and `.../best/<step>` are folders as `checkpoint_files`
describes them. meta.json holds format_version, step, data_position, identity (of backbone, method
and data), leaves (path -> shape, dtype), notes (the train loop's own) and, of a best one, metric.

A save copies the state to the host and returns; one thread writes it, in the order of the calls, so
that a best checkpoint is on disk before a later last one. In a run of several processes only
process 0 touches the disk. Time plays no part: checkpoints are ordered by their step.
"""

import contextlib
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from losa_scenic.common_lib import errors, hosts, trees
from losa_scenic.train_lib import background, checkpoint_state
from losa_scenic.train_lib import checkpoint_files as files
from losa_scenic.train_lib.state import TrainState

FORMAT_VERSION = 3
# Copies of the state in host memory: one being written, and these.
_WAITING = 2


class Checkpoints:
  """The last few and the best checkpoint of one run.

  All processes of a run call the same methods in the same order.

  Attributes:
    identity: {'backbone': ..., 'method': ...}: what a checkpoint must agree with to be restored.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    identity: dict[str, Any],
    keep: int = 2,
    restored: int | None = None,
  ):
    """Opens (and creates) `<workdir>/checkpoints`, and removes what a killed run left half done.

    Args:
      workdir: the run's directory, which the caller has locked.
      identity: what JSON can hold, by key.
      keep: how many last checkpoints stay, at least 1.
      restored: the step that the run goes on from, if its last checkpoints are elsewhere.

    Raises:
      errors.UserError: if the directory cannot be written.
    """
    self.identity = json.loads(json.dumps(identity))
    self._keep = keep
    self._place = pathlib.Path(workdir).absolute() / 'checkpoints'
    self._last, self._best = self._place / 'last', self._place / 'best'
    self._saved: set[int] = set()  # Steps of `last` that are on disk or on their way.
    self._known_best: tuple[int, float] | None = None
    self._best_is_known = False
    self._writer = background.Background('checkpoints', _WAITING)
    hosts.on_first(lambda: self._open(restored))

  def _open(self, restored: int | None) -> None:
    with _system_errors(f'Cannot write to {self._place}'):
      for directory in (self._last, self._best):
        directory.mkdir(parents=True, exist_ok=True)
        files.clean(directory)
      files.sync(self._place)
      self._saved = set(files.steps(self._last))
      if restored is not None:
        self._find_best(restored)
      elif not self._saved and not files.damaged(self._last):
        self._find_best(-1)  # The run starts over.

  def latest_step(self) -> int | None:
    """Steps done at the newest checkpoint, or None if there is none.

    Raises:
      errors.UserError: if nothing is left but checkpoints that were set aside as damaged: the run
        would silently start over.
    """
    return hosts.on_first(self._latest_step)

  def _latest_step(self) -> int | None:
    found = files.steps(self._last)
    if not found and files.damaged(self._last):
      raise self._only_damage([])
    return found[-1] if found else None

  def save(self, state: TrainState, notes: Mapping[str, Any] | None = None) -> None:
    """Saves the state as the last checkpoint, in the background. A step is saved only once.

    The state may be donated as soon as this returns. Waits only if two saves wait already.

    Args:
      state: to save.
      notes: what else `restore` shall return; JSON must hold it.

    Raises:
      errors.UserError: if an earlier save failed.
    """
    if not hosts.is_first():
      return
    self._writer.check()
    step = int(state.global_step)
    if step not in self._saved:
      self._saved.add(step)
      self._submit(self._last, self._keep, state, notes, {})

  def save_best(
    self, state: TrainState, metric: float, notes: Mapping[str, Any] | None = None
  ) -> None:
    """Saves the state as the best one, like `save`, if `metric` exceeds that of the best so far."""
    if not hosts.is_first():
      return
    self._writer.check()
    best, step = self._get_best(), int(state.global_step)
    if best is None or (metric > best[1] and step != best[0]):
      self._known_best = (step, float(metric))
      self._submit(self._best, 1, state, notes, {'metric': float(metric)})

  def best_metric(self) -> float | None:
    """The best checkpoint's metric, or None."""
    best = hosts.on_first(self._get_best)
    return None if best is None else best[1]

  def check(self) -> None:
    """Raises the `UserError` of a save that failed in the background; costs nothing."""
    self._writer.check()

  def wait(self) -> None:
    """Waits for saves under way, on all processes.

    Raises:
      errors.UserError: on every process, if one failed.
    """
    hosts.on_first(self._writer.wait)

  def close(self) -> None:
    """Waits for saves under way. Raises as `check` does what has not been raised before."""
    self._writer.close()

  def _submit(
    self,
    directory: pathlib.Path,
    keep: int,
    state: TrainState,
    notes: Mapping[str, Any] | None,
    extra: dict[str, Any],
  ) -> None:
    self._writer.make_room()
    step = int(state.global_step)
    meta = {
      'format_version': FORMAT_VERSION,
      'step': step,
      'data_position': step,
      'identity': self.identity,
      'leaves': checkpoint_state.describe(state),
      'notes': dict(notes or {}),
      **extra,
    }
    text, arrays = json.dumps(meta, indent=1) + '\n', checkpoint_state.to_host(state)

    def write() -> None:
      try:
        files.write(directory / str(step), arrays, text)
        for old in files.steps(directory)[:-keep]:
          files.delete(directory / str(old))
      except Exception as e:
        raise self._cannot_save(directory / str(step), e) from e

    self._writer.submit(write)

  def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """The newest checkpoint that is not damaged.

    Damaged ones that are newer are named on stderr and renamed to `<step>.damaged`. Best ones of
    later steps are deleted: the continued run reaches those steps again.

    Args:
      like: a state with the shapes, dtypes and shardings to restore into.

    Returns:
      (the state, placed as `like` is, the notes that were saved with it).

    Raises:
      errors.UserError: if all are damaged, or the newest other one has another format, belongs to
        another backbone, method or data, or has other leaves.
    """
    leaves = checkpoint_state.describe(like)
    arrays: dict[str, np.ndarray] = {}

    def load() -> dict[str, Any]:
      with _system_errors(f'Cannot restore from {self._last}'):
        step, found = self._newest_whole()
        meta = self._check(self._last / str(step), leaves)
        arrays.update(files.read_arrays(self._last / str(step), leaves))
        for damaged, problem in found.items():
          name = files.set_aside(self._last / str(damaged))
          self._saved.discard(damaged)
          _say(f'checkpoint {damaged}: {problem}; set aside as {name}, continuing from {step}')
        self._find_best(step)
      return meta['notes']

    notes = hosts.on_first(load)
    values = hosts.broadcast(
      [arrays[path] for path in leaves] if hosts.is_first() else None,
      [(tuple(shape), np.dtype(dtype)) for shape, dtype in leaves.values()],
    )
    return checkpoint_state.from_host(dict(zip(leaves, values, strict=True)), like), notes

  def _newest_whole(self) -> tuple[int, dict[int, str]]:
    """The newest step whose files are whole, and what is wrong with the newer ones."""
    candidates, found = files.steps(self._last)[::-1], {}
    if not candidates and not files.damaged(self._last):
      raise ValueError('There is no checkpoint.')
    for step in candidates:
      folder = self._last / str(step)
      if files.is_older_format(folder):
        raise _other_format(folder, '2 or older')
      problem = files.problem(folder)
      if problem is None:
        return step, found
      found[step] = problem
    raise self._only_damage([f'{step}: {problem}' for step, problem in found.items()])

  def _check(self, folder: pathlib.Path, leaves: dict[str, list]) -> dict[str, Any]:
    """The meta data of a whole checkpoint, if it is one of this run and has these leaves."""
    meta = files.read_meta(folder)
    if meta.get('format_version') != FORMAT_VERSION:
      raise _other_format(folder, meta.get('format_version'))
    for key, mine in self.identity.items():
      theirs = {key: meta['identity'][key]} if key in meta['identity'] else {}
      lines = trees.differences(_values({key: mine}), _values(theirs))
      if lines:
        raise _listed(f'Checkpoint {folder} belongs to another {key}:', lines)
    lines = trees.differences(leaves, meta['leaves'], limit=sys.maxsize)
    if lines:
      raise _listed(f'Checkpoint {folder} has other leaves:', lines)
    return meta

  def _get_best(self) -> tuple[int, float] | None:
    """(step, metric) of the best so far, on disk or on its way there."""
    if not self._best_is_known:
      with _system_errors(f'Cannot read {self._best}'):
        self._find_best(max(self._saved, default=-1))
    return self._known_best

  def _find_best(self, step: int) -> None:
    """Looks for the best on disk up to `step`: deletes later ones, sets damaged ones aside."""
    self._known_best, self._best_is_known = None, True
    for candidate in files.steps(self._best)[::-1]:
      folder = self._best / str(candidate)
      if candidate > step:
        files.delete(folder)
        continue
      problem = files.problem(folder)
      if problem is None:
        self._known_best = (candidate, files.read_meta(folder)['metric'])
        return
      _say(f'best checkpoint {candidate}: {problem}; set aside as {files.set_aside(folder)}')

  def _only_damage(self, lines: list[str]) -> errors.UserError:
    lines = lines + [f'{name}: set aside before' for name in files.damaged(self._last)]
    end = f'Put a whole copy back, or delete {self._place} to start over.'
    return _listed(f'Every checkpoint in {self._last} is damaged:', [*lines, end])

  def _cannot_save(self, folder: pathlib.Path, e: Exception) -> errors.UserError:
    found = files.steps(self._last)
    newest = f'The newest checkpoint is that of step {found[-1]}.' if found else 'There is none.'
    return errors.UserError(f'Cannot save checkpoint {folder}: {files.reason(e)}. {newest}')


def _values(value: Any, prefix: str = '') -> dict[str, list]:
  """{'a': {'b': 1}} -> {'a.b': [1]}."""
  if isinstance(value, dict):
    tables = [_values(item, f'{prefix}{key}.') for key, item in value.items()]
    return {path: leaf for table in tables for path, leaf in table.items()}
  return {prefix.rstrip('.'): value if isinstance(value, list) else [value]}


def _say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def _listed(title: str, lines: list[str]) -> errors.UserError:
  return errors.UserError('\n  '.join([title, *lines]))


def _other_format(folder: pathlib.Path, found: Any) -> errors.UserError:
  return errors.UserError(
    f'Checkpoint {folder} has format {found}, not {FORMAT_VERSION}. Continue it with the version '
    'of losa_scenic that wrote it, or choose another --workdir.'
  )


@contextlib.contextmanager
def _system_errors(what: str) -> Iterator[None]:
  try:
    yield
  except OSError as e:
    raise errors.UserError(f'{what}: {e.strerror or e} ({e.filename}).') from e
