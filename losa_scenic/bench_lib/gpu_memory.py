"""Memory of a train step on GPUs that are not there, as XLA's compiler for them plans it.

Needs `pip install 'losa_scenic[gpu]'` and no GPU: the program is compiled for a description of one
and never run. Not counted are what CUDA itself takes (0.3 to 0.5 GB) and JAX's preallocation.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import Mesh

from losa_scenic.adapt_lib import methods
from losa_scenic.adapt_lib.method import partition
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import DType
from losa_scenic.model_lib import attention
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.classification_model import (
  LAYER_LOOPS,
  ClassificationModel,
  is_scanned,
)
from losa_scenic.train_lib import optimizers, sharding, steps
from losa_scenic.train_lib.state import TrainState
from losa_scenic.weights_lib import backbones

# What XLA wants to know of a GPU, as on NVIDIA's data sheet.
TARGETS = {
  'h100': """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448 threads_per_core_limit: 2048
  core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84929347584 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 cuda_compute_capability { major: 9 minor: 0 } }
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 2 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
}
# Not float16: its attention is traced for the device that is there, a CPU, which lacks a product.
DTYPES = ('bfloat16', 'float32')
# Tuning would need the device; without it Triton's matrix products may not compile.
_OPTIONS = {'xla_gpu_autotune_level': 0, 'xla_gpu_enable_triton_gemm': False}


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device.

  Attributes:
    arguments: weights, optimizer state, batch.
    outputs: what the step returns, apart from what takes the place of arguments.
    temporary: everything in between, at its peak.
  """

  arguments: int
  outputs: int
  temporary: int

  @property
  def total(self) -> int:
    """All of it, in bytes."""
    return self.arguments + self.outputs + self.temporary

  def parts(self) -> dict[str, int]:
    """All of it by name, the total last."""
    return {**dataclasses.asdict(self), 'total': self.total}


def compile_step(
  model: Adapted,
  tx: optax.GradientTransformation,
  batch_size: int = 1,
  frozen_dtype: DType = jnp.bfloat16,
  way: str = 'fused',
  target: str = 'h100',
  devices: int = 1,
  fsdp: int = 1,
) -> Any:
  """The train step of one batch, compiled for GPUs of one host (`jax.stages.Compiled`).

  Args:
    model: the adapted model; its dtype and layer loop count.
    tx: the optimizer.
    batch_size: images or clips of each device, uint8.
    frozen_dtype: dtype that frozen parameters are stored in; trained ones are float32.
    way: of attention, see `attention.using`.
    target: the GPU, a key of `TARGETS`.
    devices: number of GPUs.
    fsdp: GPUs that share the frozen weights of the layers.

  Raises:
    errors.UserError: without JAX's CUDA plugin, for an unknown GPU, and as `sharding`.
  """
  mesh = _mesh(target, devices, fsdp)
  everywhere, batch_size = sharding.replicated(mesh), devices * batch_size
  trainable, frozen = partition(model.param_shapes(), model.method)
  frozen = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, frozen_dtype), frozen)
  frozen_shardings = sharding.frozen_shardings(frozen, mesh)
  key, variables = jax.random.key(0), model.init_model_state()
  state = jax.eval_shape(lambda t: TrainState.create(t, tx, key, variables), trainable)
  batch = {
    'inputs': jax.ShapeDtypeStruct(model.input_shape(batch_size), jnp.uint8),
    'label': jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    'batch_mask': jax.ShapeDtypeStruct((batch_size,), jnp.float32),
  }
  head = ClassificationModel(None, {'num_classes': model.num_classes})
  step = functools.partial(
    steps.train_step,
    flax_model=model.clone(gather=sharding.gather(frozen_shardings, mesh)),
    loss_fn=head.loss_function,
    metrics_fn=head.get_metrics_fn_jit('train'),
    tx=tx,
  )
  placed = jax.jit(
    step,
    in_shardings=(everywhere, frozen_shardings, sharding.batched(mesh)),
    out_shardings=everywhere,
    donate_argnums=0,
  )
  with attention.using(way):
    lowered = placed.lower(state, frozen, batch)
  return lowered.compile(compiler_options=_OPTIONS)


def _mesh(target: str, devices: int, fsdp: int) -> Mesh:
  """GPUs that are only described."""
  described = {'target_config': TARGETS[errors.one_of('GPU', target, TARGETS)]}
  try:
    topology = topologies.get_topology_desc(platform='cuda', topology=f'1x1x{devices}', **described)
  except Exception as e:  # Of JAX without the plugin, and of a plugin that lacks its libraries.
    reason = ' '.join(str(e).split())
    raise errors.UserError(
      "Compiling for a GPU needs JAX's CUDA plugin (the GPU itself is not needed): "
      f"pip install 'losa_scenic[gpu]'. {reason}"
    ) from e
  return sharding.make_mesh({'fsdp': fsdp}, topology.devices)


def of_step(*args: Any, **kwargs: Any) -> Memory:
  """Memory of `compile_step`, of the same arguments."""
  plan = compile_step(*args, **kwargs).memory_analysis()
  return Memory(
    plan.argument_size_in_bytes,
    plan.output_size_in_bytes - plan.alias_size_in_bytes,
    plan.temp_size_in_bytes,
  )


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
  way: str = 'fused',
  target: str = 'h100',
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
    way: of attention, see `attention.using`.
    target: a key of `TARGETS`.
    devices: number of GPUs.
    fsdp: GPUs that share the frozen weights of the layers, as `mesh.fsdp` in a run's config.

  Returns:
    {'arguments_mib' (weights, optimizer state, batch), 'outputs_mib', 'temporary_mib', 'total_mib'}
    in MiB (2^20 bytes), and what was asked for.

  Raises:
    errors.UserError: for unknown names, values out of range, or without JAX's CUDA plugin.
  """
  errors.check_at_least('num_classes', num_classes, 1)
  errors.check_at_least('batch_size', batch_size, 1)
  errors.check_at_least('devices', devices, 1)
  errors.check_at_least('fsdp', fsdp, 1)
  errors.one_of('dtype', dtype, DTYPES)
  errors.one_of('layer_loop', layer_loop, LAYER_LOOPS)
  errors.one_of('way of attention', way, attention.WAYS)
  errors.one_of('GPU', target, TARGETS)
  make_optimizer = optimizers.OPTIMIZERS[
    errors.one_of('optimizer', optimizer, optimizers.OPTIMIZERS)
  ]
  if not jax.config.jax_platforms:  # Else JAX would look for a GPU, and take memory of it.
    jax.config.update('jax_platforms', 'cpu')
  spec = backbones.find(backbone, backbone_options).spec
  built = methods.build(method, spec, options)
  scan = is_scanned(built, layer_loop, split=fsdp > 1)
  model = Adapted(spec, built, num_classes, dtype=jnp.dtype(dtype), scan=scan, remat=remat)
  tx = make_optimizer(optax.constant_schedule(1e-3))
  memory = of_step(model, tx, batch_size, jnp.dtype(dtype), way, target, devices, fsdp)
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
    'attention': way,
    **{f'{name}_mib': round(size / 2**20, 1) for name, size in memory.parts().items()},
  }
