"""Checkpoints of a run: trainable parameters, optimizer, step, rng, data position; nothing frozen.

`<workdir>/checkpoints/last/<step>` and `.../best/<step>` are orbax checkpoints, written
asynchronously and renamed into place, so that a kill at any moment leaves the previous one. Beside
the state each holds a JSON object with the identity of backbone, method and data, a table of all
leaves and a checksum. They are compared in a restore, because orbax casts other dtypes silently and
does not notice a flipped bit.
"""

import contextlib
import gc
import io
import pathlib
import sys
import time
import zlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from losa_scenic.common_lib import errors, trees
from losa_scenic.train_lib.state import TrainState

FORMAT_VERSION = 2


def _to_tree(state: TrainState) -> dict[str, Any]:
  # Orbax wants dicts and tuples of arrays; optax states are named tuples, so only leaves are kept.
  return {
    'global_step': state.global_step,
    'trainable': state.trainable,
    'opt_state': {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state.opt_state))},
    'rng': state.rng,
    **({'model_state': state.model_state} if state.model_state else {}),
  }


def _from_tree(tree: dict[str, Any], like: TrainState) -> TrainState:
  structure = jax.tree.structure(like.opt_state)
  leaves = [tree['opt_state'][str(i)] for i in range(structure.num_leaves)]
  return TrainState(
    global_step=tree['global_step'],
    trainable=tree['trainable'],
    opt_state=jax.tree.unflatten(structure, leaves),
    model_state=tree.get('model_state', {}),
    rng=tree['rng'],
  )


class Checkpoints:
  """The last few and the best checkpoint of one run.

  Attributes:
    identity: {'backbone': ..., 'method': ...}: what a checkpoint must agree with to be restored.
  """

  def __init__(self, workdir: pathlib.Path, identity: dict[str, Any], keep: int = 2):
    """Opens (and creates) `<workdir>/checkpoints`; `keep` last checkpoints stay."""
    self.identity = identity
    self._last, self._best = (
      ocp.CheckpointManager(
        pathlib.Path(workdir).absolute() / 'checkpoints' / name,
        options=ocp.CheckpointManagerOptions(max_to_keep=n, create=True),
      )
      for name, n in (('last', keep), ('best', 1))
    )
    if self.latest_step() is None:
      self._forget_best_after(-1)

  def latest_step(self) -> int | None:
    """Steps done at the newest checkpoint, or None if there is none."""
    return self._last.latest_step()

  def save(self, state: TrainState) -> None:
    """Saves the state as the last checkpoint, in the background. A step is saved only once."""
    # A run that continues from here never comes back to an earlier evaluation: if that one was the
    # best, it must be on disk first.
    self._best.wait_until_finished()
    step = int(state.global_step)
    if step not in self._last.all_steps():
      self._last.save(step, args=self._args(state, {}))

  def save_best(self, state: TrainState, metric: float) -> None:
    """Saves the state as the best one if `metric` exceeds that of the best so far."""
    best = self.best_metric()
    if best is None or metric > best:
      self._best.wait_until_finished()
      self._best.save(int(state.global_step), args=self._args(state, {'metric': metric}))

  def best_metric(self) -> float | None:
    """The best checkpoint's metric, or None."""
    self._best.wait_until_finished()
    step = self._best.latest_step()
    return None if step is None else self._meta(self._best, step)['metric']

  def _args(self, state: TrainState, extra: dict[str, Any]) -> ocp.args.Composite:
    tree = _to_tree(state)
    meta = {
      'format_version': FORMAT_VERSION,
      'data_position': int(state.global_step),
      **self.identity,
      'leaves': trees.describe(tree),
      'crc32': _checksum(tree),
      **extra,
    }
    return ocp.args.Composite(state=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave(meta))

  def _meta(self, manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    return _read(manager, step, 'meta', ocp.args.JsonRestore())

  def restore(self, like: TrainState) -> TrainState:
    """The newest checkpoint.

    Args:
      like: a state with the shapes, dtypes and shardings to restore into.

    Raises:
      errors.UserError: if the checkpoint belongs to another backbone or method, has other leaves,
        or cannot be read.
    """
    step = self.latest_step()
    if step is None:
      raise ValueError('There is no checkpoint.')
    where = self._last.directory / str(step)
    tree = _to_tree(like)
    meta = self._meta(self._last, step)
    if meta.get('format_version') != FORMAT_VERSION:
      raise errors.UserError(
        f'Checkpoint {where} has format {meta.get("format_version")}, not {FORMAT_VERSION}.'
      )
    for key, mine in self.identity.items():
      lines = trees.differences(_paths(mine), _paths(meta.get(key)))
      if lines:
        raise errors.UserError(
          '\n  '.join([f'Checkpoint {where} belongs to another {key}:', *lines])
        )
    lines = trees.differences(trees.describe(tree), meta['leaves'])
    if lines:
      raise errors.UserError('\n  '.join([f'Checkpoint {where} has other leaves:', *lines]))
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
    restored = _read(self._last, step, 'state', ocp.args.StandardRestore(abstract))
    if _checksum(restored) != meta['crc32']:
      raise _damaged(where, 'its checksum is not the one that was saved.')
    self._forget_best_after(step)
    return _from_tree(restored, like)

  def _forget_best_after(self, step: int) -> None:
    # The continued run reaches those steps again and will save them itself.
    for later in [s for s in self._best.all_steps() if s > step]:
      self._best.delete(later)

  def close(self) -> None:
    """Waits for writes under way, raising what went wrong in them."""
    for manager in (self._last, self._best):
      manager.wait_until_finished()
      manager.close()


def _paths(value: Any, prefix: str = '') -> dict[str, list]:
  if isinstance(value, dict):
    table: dict[str, list] = {}
    for key, item in value.items():
      table |= _paths(item, f'{prefix}{key}.')
    return table
  return {prefix.rstrip('.'): np.atleast_1d(np.asarray(value, dtype=object)).tolist()}


def _read(manager: ocp.CheckpointManager, step: int, item: str, args: Any) -> Any:
  """One item of a checkpoint. Raises `UserError` if it cannot be read."""
  printed, problem = io.StringIO(), None
  # When one array cannot be read, the threads that read the others print a traceback each.
  with contextlib.redirect_stderr(printed):
    try:
      value = manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]
    except Exception as e:  # Orbax and TensorStore raise many types for one damaged file.
      problem = _first_line(e)
    if problem is not None:
      gc.collect()
      time.sleep(0.5)
  if problem is None:
    sys.stderr.write(printed.getvalue())
    return value
  raise _damaged(manager.directory / str(step), problem)


def _damaged(where: Any, problem: str) -> errors.UserError:
  return errors.UserError(
    f'Checkpoint {where} is damaged: {problem}\n'
    'Delete that folder to continue from the checkpoint before it, or choose another --workdir.'
  )


def _checksum(tree: dict[str, Any]) -> int:
  value = 0
  for _, leaf in sorted(trees.flatten(tree).items()):
    value = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data, value)
  return value


def _first_line(e: BaseException) -> str:
  return f'{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ""}'[:300]
