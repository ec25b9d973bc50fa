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


def quick_gelu(x: Array) -> Array:
  """x sigmoid(1.702 x)."""
  return x * jax.nn.sigmoid(1.702 * x)


# What backbones and the bottlenecks of the methods use, by name.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  'relu': jax.nn.relu,
  'gelu_tanh': GELU['tanh'],
  'gelu_erf': GELU['erf'],
  'quick_gelu': quick_gelu,
  'silu': jax.nn.silu,
  'none': lambda x: x,
}
