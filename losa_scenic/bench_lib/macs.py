"""Multiply-accumulates of a forward pass, counted in the traced program: nothing is run.

Counted are matrix products and convolutions, each multiplication with the addition that follows it
as one, and a loop's body as often as it runs. Element-wise operations are not: of ViT-g they would
add 0.15 %. The tables of the LoSA paper call multiply-accumulates "GFLOPs" (of one image, with a
MAP head and the classifier), by XLA's count halved, which includes those.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from losa_scenic.bench_lib import params
from losa_scenic.model_lib import attention
from losa_scenic.model_lib.adapted import Adapted


def count(fn: Callable[..., Any], *shapes: Any) -> int:
  """Multiply-accumulates of one call of `fn`.

  Args:
    fn: a function of arrays.
    *shapes: its arguments, as arrays or `jax.ShapeDtypeStruct`s.

  Raises:
    ValueError: for a `while` loop, whose number of turns is not known before it runs.
  """
  with attention.using('plain'):  # A fused kernel hides its products, blocks fill up the last one.
    return _of_jaxpr(jax.make_jaxpr(fn)(*shapes).jaxpr)


def of_method(
  backbone: str,
  method: str,
  options: Mapping[str, Any] | None = None,
  backbone_options: Mapping[str, Any] | None = None,
  num_classes: int = 1000,
) -> dict[str, Any]:
  """Multiply-accumulates of an adapted model on one image or clip, classifier included.

  The arguments are those of `params.count`; `num_classes` is part of what is counted.

  Returns:
    {'macs' (of the adapted model), 'backbone_macs' (the plain backbone with the classifier)} and
    what was asked for.

  Raises:
    errors.UserError: for unknown names or values out of range.
  """
  model, plain = params.models(backbone, method, options, backbone_options, num_classes)
  return {
    'backbone': backbone,
    'method': method,
    'set': dict(options or {}),
    'macs': of_model(model),
    'backbone_macs': of_model(plain),
  }


def of_model(model: Adapted) -> int:
  """Multiply-accumulates of one image or clip, from pixels to logits."""
  inputs = jax.ShapeDtypeStruct(model.input_shape(), jnp.float32)
  return count(model.apply, model.variable_shapes(), inputs)


def _of_jaxpr(jaxpr: core.Jaxpr) -> int:
  return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: core.JaxprEqn) -> int:
  name, given = equation.primitive.name, equation.params
  if name == 'dot_general':
    (contracted, _), _ = given['dimension_numbers']
    left = equation.invars[0].aval.shape
    return _size(equation.outvars[0]) * math.prod(left[axis] for axis in contracted)
  if name == 'conv_general_dilated':
    # Each output sums over the window and the input channels of its group: all but one axis.
    kernel, layout = equation.invars[1].aval.shape, given['dimension_numbers'].rhs_spec
    return _size(equation.outvars[0]) * math.prod(kernel) // kernel[layout[0]]
  if name in ('jit', 'pjit') and given['name'] == 'depthwise_convolution':
    return _size(equation.outvars[0]) * math.prod(equation.invars[1].aval.shape[:-1])
  if name == 'while':
    raise ValueError('The number of turns of a while loop is not known before it runs.')
  turns = given['length'] if name == 'scan' else 1
  if name == 'cond':
    return max(_of_jaxpr(branch.jaxpr) for branch in given['branches'])
  inner = [v.jaxpr if isinstance(v, core.ClosedJaxpr) else v for v in given.values()]
  return turns * sum(_of_jaxpr(value) for value in inner if isinstance(value, core.Jaxpr))


def _size(variable: Any) -> int:
  return math.prod(variable.aval.shape)
