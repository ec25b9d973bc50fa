"""Type names shared by all parts."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

if TYPE_CHECKING:
  Array = jax.Array
else:  # The shape checks of the tests see both.
  Array = jax.Array | np.ndarray
PyTree = Any
# Parameters as nested dicts of arrays; leaves are addressed by 'a/b/c' paths (see `trees`).
Params = Mapping[str, Any]
# {'inputs': [b h w 3], 'label': int32 [b] (or float32 [b classes]), 'batch_mask': float32 [b]}
Batch = Mapping[str, Any]
# name -> (sum, normalizer): scalars, or vectors [classes] whose ratio is averaged over classes.
Metrics = Mapping[str, tuple[jax.Array, jax.Array]]
# A `ml_collections.ConfigDict`; its fields are not known to type checkers.
Config = Any
# Anything that `jnp.dtype` accepts.
DType = Any
