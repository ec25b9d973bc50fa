"""Adding up metrics that come as {name: (sum, normalizer)}."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from losa_scenic.common_lib.types import Metrics


def accumulate(
  parts: Iterable[Metrics], start: Mapping[str, tuple[Any, Any]] | None = None
) -> dict[str, tuple[Any, Any]]:
  """Adds sums and normalizers over batches to those of `start`, in float64 on the host."""
  total: dict[str, tuple[Any, Any]] = dict(start or {})
  for part in jax.device_get(list(parts)):
    for name, (value, weight) in part.items():
      old = total.get(name, (np.float64(0), np.float64(0)))
      total[name] = (old[0] + np.float64(value), old[1] + np.float64(weight))
  return total


def normalize(total: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
  """sum / normalizer; of vectors, the mean ratio over the entries that occur."""
  values = {}
  for name, (value, weight) in total.items():
    value, weight = np.atleast_1d(value), np.atleast_1d(weight)
    occurs = weight > 0
    values[name] = float((value[occurs] / weight[occurs]).mean()) if occurs.any() else float('nan')
  return values
