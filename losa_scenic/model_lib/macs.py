"""Multiply-accumulates of a program, counted in its traced form: nothing is compiled or run.

Counted are matrix products and convolutions, each multiplication with the addition that follows it
as one, and a loop's body as often as it runs. Element-wise operations are not: of ViT-g they would
add 0.15 %. What a backward pass computes again to save memory (`jax.checkpoint`) is not counted
either: it is a price of the program, not a part of the task. That is how model FLOPs utilization is
defined (Chowdhery et al. 2022, PaLM, appendix B).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from losa_scenic.model_lib import attention

# What JAX names the computations that a backward pass repeats.
_REPEATED = 'rematted_computation'
# Programs whose products cannot be seen from here, or are those of one device among several.
_HIDDEN = ('pallas_call', 'ffi_call', 'custom_partitioning', 'shard_map', 'xla_metadata_call')


def count(fn: Callable[..., Any], *shapes: Any) -> int:
  """Multiply-accumulates of one call of `fn`, forward and backward where it differentiates.

  A function that `jax.jit` made is traced afresh, and the trace it may have is left alone.

  Args:
    fn: a function of arrays.
    *shapes: its arguments, as arrays or `jax.ShapeDtypeStruct`s.

  Raises:
    ValueError: for a `while` loop with products in it, whose number of turns is not known before it
      runs, and for a kernel that hides its products.
  """
  if isinstance(fn, jax.stages.Wrapped):
    fn = fn.__wrapped__
  with attention.using('plain'):  # A fused kernel hides its products, blocks fill up the last one.
    return _of_jaxpr(jax.make_jaxpr(lambda *args: fn(*args))(*shapes).jaxpr, depthwise=False)


def _of_jaxpr(jaxpr: core.Jaxpr, depthwise: bool) -> int:
  return sum(_of_equation(equation, depthwise) for equation in jaxpr.eqns)


def _of_equation(equation: core.JaxprEqn, depthwise: bool) -> int:
  """Of one equation; inside a depthwise convolution the shifted copies are multiplied singly."""
  name, given = equation.primitive.name, equation.params
  if _REPEATED in str(equation.source_info.name_stack):
    return 0
  if name == 'dot_general':
    (contracted, _), _ = given['dimension_numbers']
    left = equation.invars[0].aval.shape
    return _size(equation.outvars[0]) * math.prod(left[axis] for axis in contracted)
  if name == 'conv_general_dilated':
    return _of_convolution(equation)
  if depthwise and name == 'mul':
    return _size(equation.outvars[0])
  if name in _HIDDEN:
    raise ValueError(f'The products of {name} cannot be counted.')
  depthwise |= name in ('jit', 'pjit') and given['name'] == 'depthwise_convolution'
  if name == 'cond':
    return max(_of_jaxpr(branch.jaxpr, depthwise) for branch in given['branches'])
  inner = [v.jaxpr if isinstance(v, core.ClosedJaxpr) else v for v in given.values()]
  once = sum(_of_jaxpr(value, depthwise) for value in inner if isinstance(value, core.Jaxpr))
  if name == 'while' and once:
    raise ValueError('The number of turns of a while loop is not known before it runs.')
  return once * (given['length'] if name == 'scan' else 1)


def _of_convolution(equation: core.JaxprEqn) -> int:
  # Each output sums over the window and the input channels of its group: all but one axis.
  kernel = equation.invars[1].aval.shape
  layout = equation.params['dimension_numbers'].rhs_spec
  return _size(equation.outvars[0]) * math.prod(kernel) // kernel[layout[0]]


def _size(variable: Any) -> int:
  return math.prod(variable.aval.shape)
