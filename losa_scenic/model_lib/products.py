"""Products of tokens with the weight of a linear layer, in the order that CPUs are quick at.

Of a product of rows with a matrix, x w, everything is the same everywhere but the gradient of w: a
sum over rows of two factors, of which XLA on CPUs lays one out anew and then takes up to ten times
as long as it must, if one is narrow (low-rank adaptation) and not the first.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Num

from losa_scenic.common_lib.types import Array
from losa_scenic.model_lib import attention


def product(x: Float[Array, '*b d'], w: Float[Array, 'd e']) -> Float[Array, '*b e']:
  """x @ w. It has a gradient of any order in reverse mode, on CPUs none in forward mode."""
  return _product(None, x, w) if _is_ours(x, w) else x @ w


def dot_general(
  x: Array, w: Array, dimensions: Any, precision: Any = None, **kwargs: Any
) -> Float[Array, '...']:
  """`product` for `nn.Dense.dot_general`; any other product is `jax.lax.dot_general`."""
  if dimensions == (((x.ndim - 1,), (0,)), ((), ())) and not kwargs and _is_ours(x, w):
    return _product(precision, x, w)
  return jax.lax.dot_general(x, w, dimensions, precision=precision, **kwargs)


def _is_ours(x: Array, w: Array) -> bool:
  return attention.on_cpu() and w.ndim == 2 and x.dtype == w.dtype


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(precision: Any, x: Array, w: Array) -> Array:
  return jnp.matmul(x, w, precision=precision)


def _forward(precision: Any, x: Any, w: Any) -> tuple[Array, Any]:
  # What nobody needs is not kept: of frozen weights no gradient is wanted.
  kept = x.value if w.perturbed else None, w.value if x.perturbed else None
  return jnp.matmul(x.value, w.value, precision=precision), kept


def _backward(precision: Any, kept: Any, dy: Any) -> tuple[Any, Any]:
  x, w = kept
  if isinstance(dy, jax.custom_derivatives.SymbolicZero):
    return None, None
  dx = None if w is None else jnp.matmul(dy, w.T, precision=precision)
  return dx, None if x is None else sum_of_rows(x, dy, precision=precision)


_product.defvjp(_forward, _backward, symbolic_zeros=True)


def sum_of_rows(
  x: Num[Array, '*b d'], y: Num[Array, '*b e'], *, dtype: Any = None, precision: Any = None
) -> Num[Array, 'd e']:
  """x^T y, summed over all rows: on CPUs the narrow one stands first.

  Args:
    x: the rows' factors on the left.
    y: those on the right.
    dtype: of the sums; that of the factors if not given.
    precision: as for `jnp.matmul`.
  """
  rows = tuple(range(x.ndim - 1))
  a, b = (y, x) if y.shape[-1] < x.shape[-1] else (x, y)
  # Contracted, not joined: several devices that split b would have to share all of it.
  z = jax.lax.dot_general(
    *(a, b), ((rows, rows), ((), ())), precision=precision, preferred_element_type=dtype
  )
  return made(z).T if a is y else z


def made(x: Num[Array, 'm n']) -> Num[Array, 'm n']:
  """x, as it is then made on CPUs: else XLA may make, or multiply by, its transpose, slowly."""
  return jax.lax.optimization_barrier(x) if attention.on_cpu() else x
