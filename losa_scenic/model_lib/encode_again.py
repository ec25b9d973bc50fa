"""A pass of the frozen encoder of which nothing is kept: the backward pass makes another one.

What is read of layer i, `read(i, weights[i], values)`, may depend on weights that train. Their
gradient needs the values, and the gradient of what was read, but it does not matter when: so it is
made layer by layer in a second pass, and no more than one layer's values are ever there.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jaxtyping import Num

from losa_scenic.common_lib.types import Array, PyTree
from losa_scenic.model_lib.encoder import Encoded
from losa_scenic.model_lib.vit import ViT

# `read(layer, weights of it, {name: collected value})` -> {name: what is wanted of it}.
ReadWith = Callable[[int, Any, Mapping[str, Any]], dict[str, Any]]


def run(
  backbone: ViT,
  read: ReadWith,
  variables: PyTree,
  images: Num[Array, 'b *thw c'],
  weights: Sequence[PyTree],
) -> Encoded:
  """`ViT.encode` with `read`, differentiable with respect to `weights` alone.

  Args:
    backbone: unbound.
    read: what is wanted of the values of a layer.
    variables: of the backbone; frozen.
    images: its input.
    weights: of each layer.
  """
  encode = jax.custom_vjp(functools.partial(_encode, backbone, read))
  encode.defvjp(
    lambda *given: (_encode(backbone, read, *given), given),
    functools.partial(_backward, backbone, read),
  )
  tokens, embedded, values = encode(variables, images, list(weights))
  spec = backbone.spec
  prefix = spec.sequences * spec.prefix
  return Encoded(tokens, embedded, values, spec.grid, prefix, spec.sequences)


def _encode(
  backbone: ViT, read: ReadWith, variables: PyTree, images: Array, weights: Sequence[PyTree]
) -> tuple[Array, Array, dict[str, Any]]:
  found: Any = backbone.apply(
    variables,
    images,
    read=lambda i, values: read(i, weights[i], values),
    method='encode',
  )
  return found.tokens, found.embedded, dict(found.layers)


def _backward(backbone: ViT, read: ReadWith, given: Any, gradient: Any) -> tuple[Any, ...]:
  variables, images, weights = given
  _, _, of_values = gradient
  # Else the compiler would notice that this pass computes what the first one did, and keep that.
  variables, images, of_values = jax.lax.optimization_barrier((variables, images, of_values))

  def gradient_of(i: int, values: Mapping[str, Any]) -> dict[str, Any]:
    own = {name: each[i] for name, each in of_values.items() if each[i] is not None}
    if not own:
      return {}
    return {'weights': jax.vjp(lambda w: read(i, w, values), weights[i])[1](own)[0]}

  found: Any = backbone.apply(variables, images, read=gradient_of, method='encode')
  return None, None, list(found.layers['weights'])
