"""Frozen linear layers stored in 8 or 4 bits.

  kind     kernel                 scale                        product
  int8     int8                   one per output channel       in the dtype of compute, dequantised
  w8a8     int8                   one per output channel       int8 x int8 -> int32
  float8   float8_e4m3fn          one per output channel       in the dtype of compute, dequantised
  int4     int4, two in a byte    one per group of 64 inputs   in the dtype of compute, dequantised
           on GPUs                and output channel

Scales are float32 and symmetric: the largest magnitude of a channel or group becomes the largest
stored number. In w8a8 each token is rounded to int8 at run time with a scale of its own (dynamic,
symmetric), as in LLM.int8() (Dettmers et al. 2022) without its float columns. The others are
weights alone: gradients pass through the dequantised product, as in QLoRA (Dettmers et al. 2023).

Not qwix: it rewrites a model from outside and stores `kernel/array/qvalue`, where everything here
(sharding, layouts, checkpoints, what a method may train) goes by the paths of plain layers. Only
the linear layers of blocks are quantised: they are nearly all of the weights.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int8

from losa_scenic.common_lib import errors, trees
from losa_scenic.common_lib.types import Array, DType, Params

KINDS = ('int8', 'w8a8', 'float8', 'int4')
# The linear layers of a block.
NAMES = ('query', 'key', 'value', 'out', 'fc1', 'gate', 'fc2')
SCALE = 'kernel_scale'
_GROUP = 64
_STORED = {
  'int8': (jnp.int8, 127.0),
  'w8a8': (jnp.int8, 127.0),
  'float8': (jnp.float8_e4m3fn, 448.0),
  'int4': (jnp.int4, 7.0),
}
# What a row of zeros is divided by, in the place of its largest magnitude.
_TINY = 1e-30


def check(kind: str, *, trains_kernels: bool, spares_backbone: bool) -> None:
  """Raises `UserError` for a kind that there is not, or that a method cannot train beside.

  Args:
    kind: the kind.
    trains_kernels: see `Method.trains_kernels`.
    spares_backbone: see `Method.spares_backbone`.
  """
  errors.one_of('backbone_quantisation', kind, KINDS)
  if trains_kernels:
    raise errors.UserError(
      f"backbone_quantisation '{kind}' is for frozen weights, and this method trains weight "
      'matrices of the encoder: leave it out.'
    )
  if kind == 'w8a8' and not spares_backbone:
    raise errors.UserError(
      "backbone_quantisation 'w8a8' rounds activations, and this method needs gradients through "
      "the encoder, which rounding has not: use 'int8'."
    )


def is_kernel(path: str) -> bool:
  """Whether a parameter, '.../block/fc1/kernel' of any tree, is one that is quantised."""
  *_, block, name, leaf = ('', '', *path.split('/'))
  return (block, leaf) == ('block', 'kernel') and name in NAMES


def stored(frozen: Params, dtype: DType) -> dict[str, Any]:
  """What frozen parameters are stored as: the one rule, for loading and for planning.

  Args:
    frozen: the frozen tree of a model's `param_shapes`.
    dtype: what the config wants frozen weights to be stored in.

  Returns:
    The tree of `jax.ShapeDtypeStruct`s: quantised weights and their scales as they are, everything
    else in `dtype`.
  """
  flat = trees.flatten(frozen)
  return trees.unflatten(
    {
      path: jax.ShapeDtypeStruct(
        leaf.shape,
        leaf.dtype if path.endswith(f'/{SCALE}') or leaf.dtype != jnp.float32 else dtype,
      )
      for path, leaf in flat.items()
    }
  )


def quantise(kernel: Any, kind: str) -> dict[str, Any]:
  """Rounds a weight matrix.

  Args:
    kernel: [d e], of any float dtype; of the host (numpy) or of a device.
    kind: one of `KINDS`.

  Returns:
    {'kernel': [d e] in the kind's dtype, 'kernel_scale': float32 [e], of int4 [groups e]}, where
    `kernel` was.

  Raises:
    ValueError: if a weight is not finite, on the host.
  """
  dtype, top = _STORED[kind]
  on_host = isinstance(kernel, np.ndarray)
  xp = np if on_host else jnp
  kernel = kernel.astype(xp.float32)
  d, e = kernel.shape
  groups = d // math.gcd(d, _GROUP) if kind == 'int4' else 1
  parts = kernel.reshape(groups, d // groups, e)
  largest = xp.abs(parts).max(axis=1, keepdims=True)
  if on_host and not np.isfinite(largest).all():
    raise ValueError('Weights that are not finite cannot be quantised.')
  scale = xp.maximum(largest, xp.float32(_TINY)) / xp.float32(top)
  parts = parts / scale
  parts = parts if kind == 'float8' else xp.round(parts)
  whole = parts.reshape(d, e).clip(-top, top).astype(dtype)
  return {'kernel': whole, SCALE: scale[:, 0] if kind == 'int4' else scale[0, 0]}


def dequantise(kernel: Any, scale: Any, dtype: DType = jnp.float32) -> Float[Array, 'd e']:
  """The weight matrix that `quantise` rounded, in `dtype`."""
  d, e = kernel.shape
  if scale.ndim == 2:
    parts = kernel.astype(jnp.float32).reshape(len(scale), -1, e) * scale[:, None]
    return parts.reshape(d, e).astype(dtype)
  return (kernel.astype(jnp.float32) * scale).astype(dtype)


def in_place_of(path: str, value: np.ndarray, kind: str) -> dict[str, np.ndarray]:
  """What is stored in the place of a kernel: {path: value}, on the host.

  Raises:
    errors.UserError: if a weight is not finite.
  """
  try:
    made = quantise(value, kind)
  except ValueError as e:
    raise errors.UserError(f'{path}: {e}') from None
  return {f'{path.removesuffix("kernel")}{name}': part for name, part in made.items()}


class QuantisedDense(nn.Module):
  """A frozen linear layer [.. d] -> [.. features], stored as `quantise` says.

  Parameters: `kernel` and `kernel_scale` in the place of `nn.Dense`'s kernel, and `bias`. Random
  ones are those of `nn.Dense` with the same key, rounded.

  Attributes:
    features: width of the output.
    kind: one of `KINDS`.
    dtype: of compute; the output's.
    use_bias: whether there is a bias.
    kernel_init: makes the float kernel.
    bias_init: makes the bias.
    dot_general: used in the place of `jax.lax.dot_general`.
  """

  features: int
  kind: str
  dtype: DType = jnp.float32
  use_bias: bool = True
  kernel_init: Callable[..., Array] = nn.initializers.lecun_normal()
  bias_init: Callable[..., Array] = nn.initializers.zeros
  dot_general: Callable[..., Array] | None = None

  @nn.compact
  def __call__(self, x: Float[Array, '*b d']) -> Float[Array, '*b e']:
    shape = (x.shape[-1], self.features)
    made: dict[str, Array] = {}

    def make(key: Array) -> Array:
      made.update(quantise(self.kernel_init(key, shape), self.kind))
      return made['kernel']

    kernel: Any = self.param('kernel', make)
    bias: Any = self.param('bias', self.bias_init, (self.features,)) if self.use_bias else None
    # No `param`, which would draw a random number, and change those of others.
    scale: Any = self.variable('params', SCALE, lambda: made[SCALE]).value
    dot = self.dot_general or jax.lax.dot_general
    if self.kind == 'w8a8':
      y = _rounded_product(x, kernel, scale, dot).astype(self.dtype)
    else:
      y = _product(x.astype(self.dtype), kernel, scale, dot)
    return y if bias is None else y + bias.astype(self.dtype)


def _contract(x: Array, kernel: Array, dot: Callable[..., Array], **kwargs: Any) -> Array:
  return dot(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), **kwargs)


def _product(x: Array, kernel: Array, scale: Array, dot: Callable[..., Array]) -> Array:
  """x times the dequantised kernel, which the backward pass makes anew instead of keeping it."""

  @jax.custom_vjp
  def product(x: Array, kernel: Array, scale: Array) -> Array:
    return _contract(x, dequantise(kernel, scale, x.dtype), dot)

  def forward(x: Array, kernel: Array, scale: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(x, kernel, scale), (kernel, scale)

  def backward(kept: tuple[Array, Array], g: Array) -> tuple[Array, Any, Array]:
    kernel, scale = kept
    dx = _contract(g, dequantise(kernel, scale, g.dtype).T, jax.lax.dot_general)
    integer = jnp.issubdtype(kernel.dtype, jnp.integer)
    none = np.zeros(kernel.shape, jax.dtypes.float0) if integer else jnp.zeros_like(kernel)
    return dx, none, jnp.zeros_like(scale)  # They are frozen: nobody asks.

  product.defvjp(forward, backward)
  return product(x, kernel, scale)


def round_tokens(x: Float[Array, '*b d']) -> tuple[Int8[Array, '*b d'], Float[Array, '*b 1']]:
  """Activations rounded to int8, and the float32 scale of each token: x is their product, nearly.

  A value that is not finite makes its token's scale so.
  """
  x = x.astype(jnp.float32)
  largest = jnp.maximum(jnp.abs(x).max(-1, keepdims=True), _TINY)
  return jnp.round(x * (127.0 / largest)).astype(jnp.int8), largest / 127.0


def _rounded_product(x: Array, kernel: Array, scale: Array, dot: Callable[..., Array]) -> Array:
  """Product of rounded tokens and the stored kernel, float32."""

  @jax.custom_vjp
  def product(x: Array, kernel: Array, scale: Array) -> Array:
    # Layers with the same input round it once: the compiler merges what is the same.
    rounded, of_token = round_tokens(x)
    y = _contract(rounded, kernel, dot, preferred_element_type=jnp.int32)
    return y.astype(jnp.float32) * of_token * scale

  def refuse(*_: Any) -> Any:
    raise ValueError("Rounded activations have no useful gradient: use 'int8'.")

  product.defvjp(refuse, refuse)
  return product(x, kernel, scale)
