"""What XLA is told when it compiles the steps of a run."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

# XLA has two libraries for matrix products on CPUs. Of large float32 ones, which is what a backbone
# is made of, the older is quicker by a tenth; naming what else the newer one shall do leaves them
# to the older one. Sums, which the newer one does quicker, stay with it. The older one has no int8
# products: XLA's own loops would take thirty times as long. Narrow products, as all are where
# features are read instead of computed, are quicker by the newer one: LoSA by a quarter.
_CPU = {'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_REDUCE'}
# Products of the same input are not made one, as XLA would the three of attention: for that it
# copies their weights side by side in every step, those of many layers before the first one runs.
GPU = {'xla_gpu_dot_merger_threshold_mb': 0}


def options(quantisation: str | None = None, *, encodes: bool = True) -> dict[str, Any] | None:
  """`compiler_options` of `jax.jit` for the default backend; None for XLA's own choice.

  They change how fast a program runs, its memory and the order of sums in it, nothing else.

  Args:
    quantisation: of the backbone, or None: most products of 'w8a8' are of int8 matrices.
    encodes: whether the program has a backbone in it.
  """
  backend = jax.default_backend()
  if backend == 'cpu' and (quantisation == 'w8a8' or not encodes):
    return None
  return _if_known(backend)


@functools.cache
def _if_known(backend: str) -> dict[str, Any] | None:
  wanted = {'cpu': _CPU, 'gpu': GPU}.get(backend)
  if wanted is None:
    return None
  try:
    jax.jit(lambda x: x + 1, compiler_options=wanted).lower(jnp.zeros(1)).compile()
  except jax.errors.JaxRuntimeError:  # Another version of XLA may not have the option.
    return None
  return dict(wanted)
