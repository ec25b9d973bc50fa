"""What XLA is told when it compiles the steps of a run."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from losa_scenic.common_lib.types import DType

# XLA has two libraries for matrix products on CPUs. Of large float32 ones, which is what a backbone
# is made of, the older is quicker by a tenth; naming what else the newer one shall do leaves them
# to the older one. Sums, which the newer one does quicker, stay with it. The older one has no int8
# products: XLA's own loops would take thirty times as long. Narrow products, as all are where
# features are read instead of computed, are quicker by the newer one: LoSA by a quarter.
_OLDER_PRODUCTS = {'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_REDUCE'}
# What there is between products XLA has an older and a newer compiler for. The older one takes half
# of the time for what is in the body of a loop, and what it makes is as quick, but of bfloat16; of
# unrolled layers it does not see that they are alike.
_OLDER_KERNELS = {'xla_cpu_use_fusion_emitters': False, 'xla_backend_optimization_level': 1}
# Products of the same input are not made one, as XLA would the three of attention: for that it
# copies their weights side by side in every step, those of many layers before the first one runs.
GPU = {'xla_gpu_dot_merger_threshold_mb': 0}


def options(
  quantisation: str | None = None,
  *,
  encodes: bool = True,
  scanned: bool = False,
  dtype: DType = jnp.float32,
) -> dict[str, Any] | None:
  """`compiler_options` of `jax.jit` for the default backend; None for XLA's own choice.

  They change how fast a program runs and is compiled, its memory and the order of sums in it,
  nothing else.

  Args:
    quantisation: of the backbone, or None: most products of 'w8a8' are of int8 matrices.
    encodes: whether the program has a backbone in it.
    scanned: whether its layers are scanned.
    dtype: of its compute.
  """
  wanted: dict[str, Any] = {}
  backend = jax.default_backend()
  if backend == 'gpu':
    wanted = GPU
  elif backend == 'cpu' and encodes:
    if quantisation != 'w8a8':
      wanted |= _OLDER_PRODUCTS
    if scanned and dtype != jnp.bfloat16:
      wanted |= _OLDER_KERNELS
  return {name: value for name, value in wanted.items() if _is_known(name, value)} or None


@functools.cache
def _is_known(name: str, value: Any) -> bool:
  """Whether the version of XLA that is there has an option."""
  try:
    jax.jit(lambda x: x + 1, compiler_options={name: value}).lower(jnp.zeros(1)).compile()
  except jax.errors.JaxRuntimeError:
    return False
  return True
