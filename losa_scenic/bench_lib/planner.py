"""What a run would take of a device: memory by part, the largest batch, time at best, and options.

Everything is a plain dict, which `plan_table` prints; sizes are MiB (2^20 bytes) of one device.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from losa_scenic.bench_lib import (
  gpu_memory,
  gpu_targets,
  plan_batch,
  plan_model,
  plan_options,
  plan_step,
)
from losa_scenic.bench_lib.plan_step import Memory, Step
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Config
from losa_scenic.train_lib import device_speed

CPU = 'cpu'
NAMES = (*gpu_targets.TARGETS, CPU)
# What CUDA itself takes of a GPU's memory.
CUDA_BYTES = 512 * 2**20
# What JAX takes of it, unless told otherwise.
_SHARE = 0.75


class Device:
  """Where a step would run.

  Attributes:
    name: one of `NAMES`.
    count: how many there are; each has the memory that is planned.
    gpu: what the data sheet says, or None for the CPU that is here.
    reason: why memory is estimated by `plan_model`, or '' where XLA's compiler plans it.
    steps: how many steps were compiled or estimated.
  """

  def __init__(self, name: str, count: int = 1, say: Callable[[str], None] | None = None):
    """Raises `UserError` for an unknown name, and for more CPU devices than JAX has.

    Args:
      name: one of `NAMES`.
      count: how many there are.
      say: gets a line for each step that is compiled, which may take a minute.
    """
    self._say = say or (lambda _: None)
    errors.check_at_least('devices', count, 1)
    errors.one_of('device', name, NAMES)
    if not jax.config.jax_platforms:  # Else JAX would look for a GPU, and take memory of it.
      jax.config.update('jax_platforms', 'cpu')
    self.name, self.count, self.reason, self.steps = name, count, '', 0
    self.gpu = None if name == CPU else gpu_targets.find(name)
    if self.gpu is None:
      self._check_cpu()
      return
    try:
      gpu_memory.described(name, count)
    except gpu_memory.NoCompiler as e:
      self.reason = str(e)

  def _check_cpu(self) -> None:
    have = len(jax.devices('cpu'))
    if self.count > have:
      raise errors.UserError(
        f'--devices={self.count}: JAX has {have} CPU device(s) here. '
        f'XLA_FLAGS=--xla_force_host_platform_device_count={self.count} divides the CPU.'
      )

  @property
  def capacity(self) -> int:
    """Bytes that a program can have of one device."""
    if self.gpu is not None:
      return self.gpu.memory - CUDA_BYTES
    return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') // self.count

  def memory(self, step: Step) -> Memory:
    """Memory of the step on each device; frozen weights that no product uses count all the same.

    Raises:
      errors.UserError: if the step cannot be compiled for the device.
    """
    self.steps += 1
    self._say(f'step {self.steps}: {"estimating" if self.reason else "compiling"} ...')
    if self.reason:
      return plan_model.of_step(step, self.name, self.count)
    try:
      if self.gpu is not None:
        planned = gpu_memory.of_step(step, self.name, self.count)
      else:
        options = step.model.compiler_options()
        devices = jax.devices('cpu')[: self.count]
        planned = plan_step.memory_of(step.compile(devices, None, options))
    except jax.errors.JaxRuntimeError as e:
      raise errors.UserError(f'XLA cannot compile this step: {str(e).splitlines()[0]}') from e
    arguments = {**step.sizes(self.count), 'host': 0}
    return Memory(sum(arguments.values()), planned.outputs, planned.temporary)


def plan(config: Config, device: Device, num_classes: int, quick: bool = False) -> dict[str, Any]:
  """The plan of a run.

  Args:
    config: as `run_config.resolve` returns it.
    device: where it shall run.
    num_classes: width of the classifier, which a run learns from its data.
    quick: leave out the largest batch and the options: one step is compiled, not about ten.

  Returns:
    {'device', 'kind', 'devices', 'exact' (compiled, not estimated), 'reason', 'backbone', 'method',
    'batch_size', 'num_classes', 'dtype', 'frozen_dtype', 'layer_loop', 'attention', 'memory' (MiB
    by part), 'capacity' (MiB), 'fits', 'speed' (see `speed`), 'notes'}, and without `quick`
    'largest_batch' (see `plan_batch.largest`) and 'options' (see `plan_options.tried`).

  Raises:
    errors.UserError: for what no run can have, and for a population of runs.
  """
  if config.get('population') is not None:
    raise errors.UserError(
      'A plan is of one run, and this config has a population of them: --config.population=None.'
    )
  step = plan_step.of_config(config, num_classes)
  memory = device.memory(step)
  own = _kept(step, device, memory)
  way = None if device.gpu is None else gpu_memory.way_of(device.name, step.model.spec)
  found: dict[str, Any] = {
    'device': device.name,
    'kind': 'the CPU of this machine' if device.gpu is None else device.gpu.kind,
    'devices': device.count,
    'exact': not device.reason,
    'reason': device.reason,
    'backbone': config.backbone,
    'method': config.method,
    'batch_size': config.batch_size,
    'num_classes': num_classes,
    'dtype': np.dtype(step.model.dtype).name,
    'frozen_dtype': step.model.quantisation or np.dtype(step.frozen_dtype).name,
    'layer_loop': 'scan' if step.model.scan else 'unroll',
    'attention': way,
    'memory': _in_mib(_parts(step, device, memory, own)),
    'capacity': _mib(device.capacity),
    'fits': memory.total <= device.capacity,
    'speed': speed(step, device, own),
    'notes': _notes(config, device, memory.total),
  }
  if not quick:

    def total(size: int) -> int:
      changed = ml_collections.ConfigDict(config.to_dict() | {'batch_size': size})
      return device.memory(plan_step.of_config(changed, num_classes)).total

    unit = device.count * step.accumulate * config.get('stream_microbatches', 1)
    size, most = plan_batch.largest(total, config.batch_size, memory.total, unit, device.capacity)
    found['largest_batch'] = {'batch_size': size, 'total': _mib(most)}
    found['options'] = plan_options.tried(config, step, device, num_classes, memory.total)
  return found | {'steps': device.steps}


def speed(step: Step, device: Device, kept: int) -> dict[str, float | None]:
  """What a step takes at best: a bound, not a measurement.

  Operations over the data sheet's peak, or what must at least cross the memory bus over its
  bandwidth, whichever is more. Crossing it are frozen weights, once a pass and part of the batch;
  what trains and its optimizer, read and written; what is kept for the backward pass, written and
  read; the batch.

  Args:
    step: the step.
    device: where it shall run.
    kept: bytes that one part of the batch keeps on a device for its backward pass.

  Returns:
    {'tera_flops' (of all devices), 'compute_ms', 'bandwidth_ms', 'step_ms', 'images_per_second'};
    None where it cannot be told, as on a CPU.
  """
  state, frozen = step.state
  flops = device_speed.step_flops(step.function(), state, frozen, step.batch())
  found: dict[str, float | None] = {'tera_flops': None if flops is None else flops / 1e12}
  found |= dict.fromkeys(('compute_ms', 'bandwidth_ms', 'step_ms', 'images_per_second'))
  peak = None if device.gpu is None else device.gpu.peak(step.model.dtype)
  if device.gpu is None or peak is None or flops is None:
    return found
  sizes = step.sizes(device.count)
  passes = step.accumulate * (1 if step.model.method.spares_backbone else 2)
  crossing = passes * sizes['frozen'] + 2 * (sizes['trainable'] + sizes['optimizer'])
  crossing += 2 * step.accumulate * kept + sizes['batch']
  found['compute_ms'] = 1e3 * flops / (device.count * peak)
  found['bandwidth_ms'] = 1e3 * crossing / device.gpu.bandwidth
  found['step_ms'] = max(found['compute_ms'], found['bandwidth_ms'])
  found['images_per_second'] = 1e3 * step.batch_size / found['step_ms']
  return found


def _kept(step: Step, device: Device, memory: Memory) -> int:
  """Bytes kept for the backward pass of a part of the batch; of what is in between at most all."""
  with plan_model.as_on(None if device.gpu is None else device.name, step):
    kept = plan_model.kept(step, step.batch_size // (device.count * step.accumulate))
  return min(kept, memory.temporary)


def _parts(step: Step, device: Device, memory: Memory, kept: int) -> dict[str, int]:
  """Bytes by name, the total last."""
  sizes = step.sizes(device.count)
  sizes.pop('host')
  return {
    **sizes,
    'kept': kept,
    'workspace': memory.temporary - kept,
    'outputs': memory.outputs,
    'total': memory.total,
  }


def _notes(config: Config, device: Device, total: int) -> list[str]:
  notes = []
  if device.gpu is not None and _SHARE * device.gpu.memory < total <= device.capacity:
    notes.append('JAX takes 75 % of a GPU: this needs XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 or so.')
  if device.name == 'v100-16gb':
    notes.append('A V100 needs JAX with CUDA 12 and cuDNN before 9.11: nvidia-cudnn-cu12==9.10.2.*')
  if (config.get('feature_cache') or {}).get('dir'):
    notes.append('Planned is a step that runs the encoder; steps from the feature cache need less.')
  if config.get('frozen_memory', 'device') == 'host':
    notes.append("Frozen layers are in the host's memory: crossing to the device is not timed.")
  return notes


def _mib(size: int) -> float:
  return round(size / 2**20, 1)


def _in_mib(sizes: Mapping[str, int]) -> dict[str, float]:
  return {name: _mib(size) for name, size in sizes.items()}
