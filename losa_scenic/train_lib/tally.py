"""Training metrics since the last logged row; checkpoints keep them, so no save shows in a log."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from losa_scenic.train_lib import metrics


class Tally:
  """Sums of metrics over steps, in float64."""

  def __init__(self, saved: Mapping[str, Any] | None = None):
    """Starts empty, or where another one was when it was `saved`."""
    self._total: dict[str, tuple[Any, Any]] = {
      name: (np.asarray(value, np.float64)[()], np.asarray(weight, np.float64)[()])
      for name, (value, weight) in (saved or {}).items()
    }

  def add(self, values: metrics.Metrics) -> None:
    """Adds one step's {name: (sum, normalizer)}."""
    self._total = metrics.accumulate([values], self._total)

  def row(self) -> dict[str, float]:
    """The means so far ({} of no steps); begins a new row."""
    means = metrics.normalize(self._total)
    self._total = {}
    return means

  def saved(self) -> dict[str, Any]:
    """What a checkpoint keeps, as JSON gives it back exactly."""
    return {name: [np.asarray(x).tolist() for x in pair] for name, pair in self._total.items()}
