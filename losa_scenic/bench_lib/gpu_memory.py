"""Memory of a train step on GPUs that are not there, as XLA's compiler for them plans it.

Needs `pip install 'losa_scenic[plan]'` and no GPU: the program is compiled for a description of one
and never run. Not counted are what CUDA itself takes (0.3 to 0.5 GB) and JAX's preallocation.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies

from losa_scenic.adapt_lib import methods, side_memory
from losa_scenic.bench_lib import gpu_targets, plan_step
from losa_scenic.bench_lib.plan_step import Memory, Step
from losa_scenic.common_lib import compiler, errors
from losa_scenic.model_lib import attention, quantised, streaming
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.classification_model import (
  DTYPES,
  LAYER_LOOPS,
  ClassificationModel,
  is_scanned,
)
from losa_scenic.model_lib.spec import BackboneSpec
from losa_scenic.train_lib import optimizers
from losa_scenic.weights_lib import backbones

# Tuning would need the device; without it Triton's matrix products may not compile.
_OPTIONS = {**compiler.GPU, 'xla_gpu_autotune_level': 0, 'xla_gpu_enable_triton_gemm': False}


class NoCompiler(errors.UserError):
  """JAX's CUDA plugin is not installed, or lacks its libraries."""


def described(target: str, count: int) -> Sequence[Any]:
  """GPUs of one host that are only described.

  Args:
    target: a key of `gpu_targets.TARGETS`.
    count: how many.

  Raises:
    NoCompiler: without JAX's CUDA plugin.
    errors.UserError: for an unknown GPU.
  """
  config = {'target_config': gpu_targets.find(target).described()}
  try:
    topology = topologies.get_topology_desc(platform='cuda', topology=f'1x1x{count}', **config)
  except Exception as e:  # Of JAX without the plugin, and of a plugin that lacks its libraries.
    reason = ' '.join(str(e).split())
    raise NoCompiler(
      "Compiling for a GPU needs JAX's CUDA plugin (the GPU itself is not needed): "
      f"pip install 'losa_scenic[plan]'. {reason}"
    ) from e
  return topology.devices


def way_of(target: str, spec: BackboneSpec) -> str:
  """How attention of a backbone is computed on a GPU, a word for `attention.using`."""
  if gpu_targets.find(target).has_bfloat16:
    return 'fused'
  return 'chunked' if spec.sequence >= attention.LEAST_KEYS else 'plain'


def compile_step(step: Step, target: str, devices: int = 1, way: str | None = None) -> Any:
  """A train step, compiled for GPUs of one host (`jax.stages.Compiled`).

  Args:
    step: the step.
    target: the GPU, a key of `gpu_targets.TARGETS`.
    devices: number of GPUs.
    way: of attention, see `attention.using`; by default `way_of` the GPU.

  Raises:
    errors.UserError: without JAX's CUDA plugin, for an unknown GPU, for compute in bfloat16 on one
      that has none, and as `Step.compile`.
  """
  check_dtype(target, step.model.dtype)
  way = way_of(target, step.model.spec) if way is None else way
  with side_memory.planned_for(usable(target), devices):
    return step.compile(described(target, devices), way, _OPTIONS)


def usable(target: str) -> int:
  """Bytes that JAX takes of such a GPU, unless told otherwise."""
  return int(0.75 * gpu_targets.find(target).memory)


def check_dtype(target: str, dtype: Any) -> None:
  """Raises `UserError` for compute in bfloat16 on a GPU that has none."""
  if jnp.dtype(dtype) == jnp.bfloat16 and not gpu_targets.find(target).has_bfloat16:
    raise errors.UserError(
      f"A {target} multiplies no bfloat16 matrices: compute in 'float16' (of a run's config: "
      'model_dtype_str; frozen_dtype_str may be float16 too).'
    )


def of_step(step: Step, target: str, devices: int = 1, way: str | None = None) -> Memory:
  """Memory of `compile_step`, of the same arguments."""
  return plan_step.memory_of(compile_step(step, target, devices, way))


def of_method(
  backbone: str,
  method: str,
  options: Mapping[str, Any] | None = None,
  backbone_options: Mapping[str, Any] | None = None,
  num_classes: int = 1000,
  *,
  batch_size: int = 1,
  dtype: str = 'bfloat16',
  optimizer: str = 'momentum',
  layer_loop: str = 'auto',
  remat: bool = False,
  backbone_quantisation: str | None = None,
  frozen_memory: str = 'device',
  stream_microbatches: int = 1,
  way: str = 'auto',
  target: str = 'h100-80gb',
  devices: int = 1,
  fsdp: int = 1,
) -> dict[str, Any]:
  """Memory of a train step on each GPU. JAX stays on the CPU from then on, if it used nothing yet.

  The first five arguments are those of `params.count`; `num_classes` is part of what is counted.

  Args:
    backbone: a preset such as 'vivit-g/14x2', a packaged backbone, or a backbone file.
    method: a key of `methods.METHODS`, or several joined by '+'.
    options: the method's options, as `methods.build` takes them.
    backbone_options: fields of the backbone to change.
    num_classes: width of the classifier.
    batch_size: images or clips of each GPU, uint8.
    dtype: of compute and of frozen weights, one of `DTYPES`; what trains is float32.
    optimizer: a key of `optimizers.OPTIMIZERS`, with its defaults.
    layer_loop: 'scan', 'unroll' or 'auto', as in a run's config.
    remat: recompute layers in the backward pass.
    backbone_quantisation: of the frozen linear layers, as in a run's config.
    frozen_memory: where frozen layers are, as in a run's config.
    stream_microbatches: as in a run's config.
    way: of attention: 'auto' for that of the GPU, or see `attention.using`.
    target: a key of `gpu_targets.TARGETS`.
    devices: number of GPUs.
    fsdp: GPUs that share the frozen weights of the layers, as `mesh.fsdp` in a run's config.

  Returns:
    {'arguments_mib' (weights, optimizer state, batch), 'outputs_mib', 'temporary_mib', 'total_mib',
    'host_mib' (frozen layers in the host's memory)} in MiB (2^20 bytes), and what was asked for.

  Raises:
    errors.UserError: for unknown names, values out of range, or without JAX's CUDA plugin.
  """
  errors.check_at_least('num_classes', num_classes, 1)
  errors.check_at_least('batch_size', batch_size, 1)
  errors.check_at_least('devices', devices, 1)
  errors.check_at_least('fsdp', fsdp, 1)
  errors.one_of('dtype', dtype, DTYPES)
  errors.one_of('layer_loop', layer_loop, LAYER_LOOPS)
  if backbone_quantisation is not None:
    errors.one_of('backbone_quantisation', backbone_quantisation, quantised.KINDS)
  errors.one_of('way of attention', way, ('auto', *attention.WAYS))
  errors.one_of('GPU', target, gpu_targets.TARGETS)
  make_optimizer = optimizers.OPTIMIZERS[
    errors.one_of('optimizer', optimizer, optimizers.OPTIMIZERS)
  ]
  if not jax.config.jax_platforms:  # Else JAX would look for a GPU, and take memory of it.
    jax.config.update('jax_platforms', 'cpu')
  spec = backbones.find(backbone, backbone_options).spec
  built = methods.build(method, spec, options)
  scan = is_scanned(built, layer_loop, split=fsdp > 1)
  model = Adapted(
    spec,
    built,
    num_classes,
    dtype=jnp.dtype(dtype),
    scan=scan,
    remat=remat,
    quantisation=backbone_quantisation,
  )
  streamed = streaming.check(
    frozen_memory, stream_microbatches, spares_backbone=built.spares_backbone, fsdp=fsdp
  )
  step = Step(
    model=plan_step.streamed(model, stream_microbatches, dtype) if streamed else model,
    head=ClassificationModel(None, {'num_classes': num_classes}),
    tx=make_optimizer(optax.constant_schedule(1e-3)),
    batch_size=devices * batch_size,
    mesh={'fsdp': fsdp},
    frozen_dtype=jnp.dtype(dtype),
  )
  way = way_of(target, spec) if way == 'auto' else way
  memory = of_step(step, target, devices, way)
  return {
    'backbone': backbone,
    'method': method,
    'set': dict(options or {}),
    'target': target,
    'devices': devices,
    'fsdp': fsdp,
    'batch_size': batch_size,
    'dtype': dtype,
    'optimizer': optimizer,
    'layer_loop': 'scan' if scan else 'unroll',
    'remat': remat,
    'backbone_quantisation': backbone_quantisation,
    'frozen_memory': frozen_memory,
    'stream_microbatches': stream_microbatches,
    'attention': way,
    **{f'{name}_mib': round(size / 2**20, 1) for name, size in memory.parts().items()},
    'host_mib': round(step.sizes(devices)['host'] / 2**20, 1),
  }
