"""How long a train step takes to compile, its layers scanned and unrolled; nothing is allocated."""

import gc
import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import optax

from losa_scenic.adapt_lib import methods
from losa_scenic.bench_lib.plan_step import Step
from losa_scenic.common_lib import errors
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.classification_model import ClassificationModel
from losa_scenic.train_lib import optimizers
from losa_scenic.weights_lib import backbones


def of_method(
  backbone: str,
  method: str,
  options: Mapping[str, Any] | None = None,
  backbone_options: Mapping[str, Any] | None = None,
  num_classes: int = 1000,
  batch_size: int = 1,
  rounds: int = 3,
) -> dict[str, Any]:
  """Compiles a float32 train step some times, each time from nothing.

  The first five arguments are those of `params.count`.

  Args:
    backbone: a preset, a packaged backbone, or a backbone file.
    method: a key of `methods.METHODS`, or several joined by '+'.
    options: the method's options, as `methods.build` takes them.
    backbone_options: fields of the backbone to change.
    num_classes: width of the classifier.
    batch_size: images or clips of a step.
    rounds: how many times, scanned and unrolled in turn.

  Returns:
    Medians in seconds, of 'scan' (None for methods whose layers differ) and 'unroll': {'trace'
    (from Python to XLA's input), 'compile' (by XLA), 'cpu' (both, all threads)}, and what was asked
    for.

  Raises:
    errors.UserError: for unknown names or values out of range.
  """
  for name, value in (('num_classes', num_classes), ('batch_size', batch_size), ('rounds', rounds)):
    errors.check_at_least(name, value, 1)
  spec = backbones.find(backbone, backbone_options).spec
  built = methods.build(method, spec, options)
  loops = {'scan': True, 'unroll': False} if not built.unrolled else {'unroll': False}
  found: dict[str, list[tuple[float, float, float]]] = {loop: [] for loop in loops}
  for _ in range(rounds):
    for loop, scan in loops.items():
      found[loop].append(_seconds(Adapted(spec, built, num_classes, scan=scan), batch_size))
  medians = {
    loop: dict(
      zip(
        ('trace', 'compile', 'cpu'),
        (round(statistics.median(part), 2) for part in zip(*times, strict=True)),
        strict=True,
      )
    )
    for loop, times in found.items()
  }
  return {
    'backbone': backbone,
    'method': method,
    'set': dict(options or {}),
    'batch_size': batch_size,
    'rounds': rounds,
    'device': jax.devices()[0].device_kind,
    'scan': None,
    **medians,
  }


def _seconds(model: Adapted, batch_size: int) -> tuple[float, float, float]:
  """Of one compilation: until it is lowered, by XLA, and CPU time of both."""
  head = ClassificationModel(None, {'num_classes': model.num_classes})
  tx = optimizers.momentum(optax.constant_schedule(1e-3))
  step = Step(model, head, tx, batch_size)
  state, frozen = step.state
  jax.clear_caches()
  # A function of its own each time; JAX would find the trace of the one before.
  options = model.compiler_options()
  jitted = jax.jit(step.function(), donate_argnums=0, compiler_options=options)
  gc.collect()  # What the last one left; a run starts with none.
  keep = jax.config.jax_enable_compilation_cache
  jax.config.update('jax_enable_compilation_cache', False)
  try:
    cpu, start = time.process_time(), time.perf_counter()
    lowered = jitted.lower(state, frozen, step.batch())
    middle = time.perf_counter()
    lowered.compile()
    end = time.perf_counter()
    return middle - start, end - middle, time.process_time() - cpu
  finally:
    jax.config.update('jax_enable_compilation_cache', keep)
