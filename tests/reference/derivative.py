"""Features of a reference model and their derivative along a direction, in one pass."""

import numpy as np

STEP = 1e-30


def features_and_derivative(model, params, direction, images, spec, **kwargs):
  """Features [b d], and their derivative along `direction` (a table of some of the parameters)."""
  table = {path: np.asarray(value, np.float64) for path, value in params.items()}
  for path, value in direction.items():
    table[path] = table[path] + 1j * STEP * np.asarray(value, np.float64)
  y = model(table, spec, **kwargs)(np.asarray(images, np.float64))
  return y.real, y.imag / STEP
