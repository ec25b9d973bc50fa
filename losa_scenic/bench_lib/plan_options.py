"""Options of a config that may lower the memory of its step, each planned by itself."""

from collections.abc import Iterator
from typing import Any, Protocol

import jax.numpy as jnp
import ml_collections
import numpy as np

from losa_scenic.adapt_lib import methods
from losa_scenic.bench_lib import gpu_targets, plan_step
from losa_scenic.bench_lib.plan_step import Memory, Step
from losa_scenic.common_lib import config as config_lib
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Config

# What the option `memory` of a method can be, beside 'auto', from the most to the least.
MEMORY = ('fast', 'balanced', 'smallest')


class Device(Protocol):
  """What is needed of `planner.Device`."""

  gpu: gpu_targets.Gpu | None
  count: int

  def memory(self, step: Step) -> Memory: ...


def tried(
  config: Config, step: Step, device: Device, num_classes: int, total: int
) -> list[dict[str, Any]]:
  """Plans the step of each changed config.

  Args:
    config: as `run_config.resolve` returns it.
    step: its step.
    device: where it shall run.
    num_classes: width of the classifier.
    total: bytes of the step as it is.

  Returns:
    For each {'set': {key: value}, 'total', 'change'} in MiB, or {'set', 'impossible': why}.
  """
  rows = []
  for changes in _worth_trying(config, step, device):
    changed = ml_collections.ConfigDict(config.to_dict())
    for key, value in changes.items():
      *blocks, last = key.split('.')
      block: Any = changed
      for name in blocks:
        block = block[name]
      block[last] = value
    row: dict[str, Any] = {'set': changes}
    try:
      size = device.memory(plan_step.of_config(changed, num_classes)).total
      row |= {'total': round(size / 2**20, 1), 'change': round((size - total) / 2**20, 1)}
    except errors.UserError as e:
      row['impossible'] = str(e)
    rows.append(row)
  return rows


def _worth_trying(config: Config, step: Step, device: Device) -> Iterator[dict[str, Any]]:
  """Changes {key: value} that are not what the config has already, the mildest first."""
  method, gpu = step.model.method, device.gpu
  frozen = bool(step.sizes(device.count)['frozen'])
  short = 'bfloat16' if gpu is None or gpu.has_bfloat16 else 'float16'
  wide = np.dtype(step.frozen_dtype) == jnp.float32 and step.model.quantisation is None
  if wide and frozen:
    yield {'frozen_dtype_str': short}
  if gpu is not None and step.model.dtype == jnp.float32:
    yield {'model_dtype_str': short, **({'frozen_dtype_str': short} if wide and frozen else {})}
  if frozen and step.model.quantisation is None and not method.trains_kernels:
    yield {'backbone_quantisation': 'int8'}
  for name in methods.parts(config.method):
    if 'memory' in config_lib.options(methods.METHODS[name]):
      now = config.method_configs[name].get('memory')
      for mode in MEMORY[MEMORY.index(now) + 1 if now in MEMORY else 1 :]:
        yield {f'method_configs.{name}.memory': mode}
  if not method.spares_backbone and not step.model.remat:
    yield {'remat': True}
  images = step.batch_size // device.count
  parts = next((n * step.accumulate for n in (4, 2) if images % (n * step.accumulate) == 0), None)
  if parts:
    yield {'grad_accum_steps': parts}
  together = step.mesh.get('fsdp', 1) == 1 and step.model.stream is None
  if gpu is not None and method.spares_backbone and frozen and together:
    yield {'frozen_memory': 'host'}
  if device.count > 1 and frozen and together:
    yield {'mesh.fsdp': device.count}
