"""Activation functions by name."""

import functools
from collections.abc import Callable

import jax

from losa_scenic.common_lib.types import Array

# The JAX checkpoints were trained with the tanh approximation, PyTorch code uses erf.
GELU: dict[str, Callable[[Array], Array]] = {
  'tanh': functools.partial(jax.nn.gelu, approximate=True),
  'erf': functools.partial(jax.nn.gelu, approximate=False),
}
