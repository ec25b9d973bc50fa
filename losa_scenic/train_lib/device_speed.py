"""How much of a device's speed a step uses: the operations of a step, and what devices can do.

Model FLOPs utilization (MFU) is operations of a step, over the seconds that it took, over what all
devices together could have done in them. A multiply-accumulate is two operations.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from losa_scenic.common_lib.types import DType
from losa_scenic.model_lib import macs

# Dense products with float32 sums, in TFLOP/s of one JAX device: (device_kind, float16, bfloat16,
# float32). By default a float32 product is one of TF32 on NVIDIA GPUs from Ampere on, one of
# bfloat16 on TPUs, and a full one elsewhere. Data sheets print twice these figures "with sparsity".
_PEAKS: tuple[tuple[str, float | None, float | None, float], ...] = (
  # NVIDIA V100 data sheet, 2020: 125 and 15.7 (SXM2), 112 and 14 (PCIe); no bfloat16.
  (r'Tesla V100-SXM\d-\d+GB', 125, None, 15.7),
  (r'Tesla V100-PCIE-\d+GB', 112, None, 14),
  # NVIDIA T4 data sheet, 2019.
  (r'(Tesla|NVIDIA) T4', 65, None, 8.1),
  # NVIDIA A100 data sheet, 2021: the same for SXM and PCIe.
  (r'(NVIDIA )?A100-(SXM|PCIE?|PG).*', 312, 312, 156),
  (r'NVIDIA A100 80GB PCIe', 312, 312, 156),
  # NVIDIA L4 and L40S data sheets, 2023.
  (r'NVIDIA L4', 121, 121, 60),
  (r'NVIDIA L40S', 362, 362, 183),
  # NVIDIA H100 and H200 data sheets, 2024: SXM, PCIe, NVL.
  (r'NVIDIA H100 80GB HBM3', 989, 989, 494),
  (r'NVIDIA H100 PCIe', 756, 756, 378),
  (r'NVIDIA H(100|200) NVL', 835, 835, 417),
  (r'NVIDIA H200', 989, 989, 494),
  # NVIDIA HGX B200 data sheet, 2025: of 8 GPUs, sparse.
  (r'NVIDIA B200', 2250, 2250, 1125),
  # cloud.google.com/tpu/docs/v4, v5e, v5p, v6e: a device is a chip.
  (r'TPU v4', None, 275, 275),
  (r'TPU v5( lite|e)', None, 197, 197),
  (r'TPU v5p?', None, 459, 459),
  (r'TPU v6( lite|e)', None, 918, 918),
)
_COLUMNS = ('float16', 'bfloat16', 'float32')
# Settings of JAX under which float32 products are as fast as `_PEAKS` says.
_DEFAULT_PRECISION = (None, 'default', 'fastest')


def step_flops(train_step: Callable[..., Any], *args: Any) -> float | None:
  """Floating-point operations of one step, of all devices together.

  Counted in the traced program, so nothing is compiled and no array is read; see `macs.count` for
  what is counted: forward and backward pass as differentiated, without what rematerialisation
  repeats. ViT-g with LoSA takes about two seconds.

  Args:
    train_step: as passed to `jax.jit`, or what that returned; its own trace is not touched.
    *args: its arguments, as arrays (donated ones too) or `jax.ShapeDtypeStruct`s, of global shape.

  Returns:
    The number, or None if it cannot be counted.
  """
  try:
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    return 2.0 * macs.count(train_step, *shapes)
  except Exception:  # A measurement that fails must not end a run.
    return None


def peak(device_kind: str, dtype: DType | str) -> float | None:
  """Floating-point operations a second of one device at its best, in dense products.

  Args:
    device_kind: as `jax.Device.device_kind`.
    dtype: in which the model computes.

  Returns:
    The figure of the data sheet; None for a device or dtype without one here (a slice of a GPU is
    one of those), and for float32 if `jax_default_matmul_precision` asks for another precision.
  """
  name = np.dtype(dtype).name
  if name not in _COLUMNS:
    return None
  if name == 'float32' and jax.config.jax_default_matmul_precision not in _DEFAULT_PRECISION:
    return None
  for pattern, *tera in _PEAKS:
    if re.fullmatch(pattern, device_kind) and 'MIG' not in device_kind:
      figure = tera[_COLUMNS.index(name)]
      return None if figure is None else 1e12 * figure
  return None
