"""What the checkpoints of a run cost: bytes on disk, a pause of training, and time beside it.

Only what trains is made; the frozen backbone is never allocated, whatever its size.
"""

import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from losa_scenic.adapt_lib.method import partition, split_head
from losa_scenic.bench_lib import params
from losa_scenic.common_lib import errors, trees
from losa_scenic.train_lib import checkpoint_files, checkpoints, optimizers
from losa_scenic.train_lib.state import TrainState


def of_method(
  backbone: str,
  method: str,
  options: Mapping[str, Any] | None = None,
  backbone_options: Mapping[str, Any] | None = None,
  num_classes: int = 1000,
  optimizer: str = 'momentum',
  saves: int = 9,
  folder: str | None = None,
) -> dict[str, Any]:
  """Saves a run's state some times, then verifies and restores it.

  The first five arguments are those of `params.count`; `num_classes` is part of what is saved.

  Args:
    backbone: a preset, a packaged backbone, or a backbone file.
    method: a key of `methods.METHODS`, or several joined by '+'.
    options: the method's options, as `methods.build` takes them.
    backbone_options: fields of the backbone to change.
    num_classes: width of the classifier, at least 1.
    optimizer: a key of `optimizers.OPTIMIZERS`, with its defaults.
    saves: how many, at least 1.
    folder: the directory to measure in; None for that of temporary files. What is written there is
      removed.

  Returns:
    {'trainable_params' (without the classifier), 'head_params', 'trainable_bytes' (of both),
    'disk_bytes' (of one checkpoint) and, as medians in ms: 'pause_ms' (until `save` returns),
    'write_ms' (beside training), 'write_cpu_ms' (of all threads), 'verify_ms', 'restore_ms' (which
    verifies, too)} and what was asked for.

  Raises:
    errors.UserError: for unknown names, values out of range, or a folder that cannot be written.
  """
  errors.check_at_least('saves', saves, 1)
  make = optimizers.OPTIMIZERS[errors.one_of('optimizer', optimizer, optimizers.OPTIMIZERS)]
  model, _ = params.models(backbone, method, options, backbone_options, num_classes)
  shapes, _ = partition(model.param_shapes(), model.method)
  rest, head = split_head(shapes)
  state = _random_state(shapes, make(optax.constant_schedule(1e-3)), model.init_model_state())
  try:
    with tempfile.TemporaryDirectory(prefix='checkpoint-cost-', dir=folder) as place:
      measured = _measure(state, saves, pathlib.Path(place))
  except OSError as e:
    raise errors.UserError(f'Cannot write to {e.filename}: {e.strerror}.') from e
  return {
    'backbone': backbone,
    'method': method,
    'set': dict(options or {}),
    'optimizer': optimizer,
    'saves': saves,
    'trainable_params': trees.count(rest),
    'head_params': trees.count(head),
    'trainable_bytes': sum(leaf.nbytes for leaf in jax.tree.leaves(state.trainable)),
    **measured,
  }


def _random_state(shapes: Any, tx: optax.GradientTransformation, more: Any) -> TrainState:
  """A state in which nothing is zero: zeros would be compressed."""
  rng = np.random.default_rng(0)

  def fill(leaf: Any) -> jax.Array:
    return jnp.asarray(rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype))

  made = TrainState.create(jax.tree.map(fill, shapes), tx, jax.random.key(0), more)
  moments = jax.tree.map(lambda leaf: fill(leaf) if leaf.ndim else leaf, made.opt_state)
  return made.replace(opt_state=moments)


def _measure(state: TrainState, saves: int, place: pathlib.Path) -> dict[str, Any]:
  pauses, writes, cpu = [], [], []
  for step in range(1, saves + 1):
    now = jax.block_until_ready(state.replace(global_step=jnp.int32(step)))
    # A state's arrays remember their copies on the host; those of a step are new.
    now = jax.block_until_ready(jax.tree.map(jnp.copy, now))
    saver = checkpoints.Checkpoints(place, {})
    start = time.perf_counter()
    saver.save(now)
    saved, used = time.perf_counter(), time.process_time()
    saver.close()
    pauses.append(saved - start)
    writes.append(time.perf_counter() - saved)
    cpu.append(time.process_time() - used)
  folder = place / 'checkpoints' / 'last' / str(saves)
  found = [file.stat().st_size for file in folder.rglob('*') if file.is_file()]
  opened = checkpoints.Checkpoints(place, {})

  def restore() -> None:
    jax.block_until_ready(opened.restore(state))

  timings = {
    'pause_ms': pauses,
    'write_ms': writes,
    'write_cpu_ms': cpu,
    'verify_ms': [_seconds(lambda: checkpoint_files.problem(folder)) for _ in range(5)],
    'restore_ms': [
      _seconds(lambda: jax.block_until_ready(opened.restore(state))) for _ in range(5)
    ],
  }
  medians = {name: round(1e3 * statistics.median(values), 1) for name, values in timings.items()}
  return {'disk_bytes': sum(found), **medians}


def _seconds(fn: Callable[[], Any]) -> float:
  start = time.perf_counter()
  fn()
  return time.perf_counter() - start
