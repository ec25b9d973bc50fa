"""Adding up metrics that come as {name: (sum, normalizer)}."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Metrics


def accumulate(parts: Iterable[Metrics]) -> dict[str, tuple[Any, Any]]:
  """Adds sums and normalizers over batches, in float64 on the host."""
  total: dict[str, tuple[Any, Any]] = {}
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


def check_finite(values: Sequence[Mapping[str, Any]], step: int) -> None:
  """Raises `UserError`, naming the step, if a loss or a norm is not finite.

  Args:
    values: metrics of the steps up to `step`, one after another, as `steps.train_step` makes them.
    step: the last of them.
  """
  for number, one in enumerate(values, start=step - len(values) + 1):
    for name in ('loss', 'l2_grads', 'l2_params'):
      if not np.isfinite(one[name][0]):
        raise errors.UserError(
          f'{name} is {one[name][0]} at step {number}: training has diverged. The checkpoints '
          'before it are kept. Lower the learning rate, clip gradients (max_grad_norm), or check '
          'the data; then use another --workdir.'
        )
