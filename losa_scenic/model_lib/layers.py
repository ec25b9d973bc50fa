"""The small layers a backbone is made of, with explicit dtypes.

Parameters are created in float32; frozen ones may be stored in any float dtype (they are cast once
at load). Every layer casts its parameters and its input to `dtype`, the dtype of compute.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from losa_scenic.common_lib.activations import ACTIVATIONS
from losa_scenic.common_lib.types import Array, DType
from losa_scenic.model_lib import products
from losa_scenic.model_lib.attention import attention
from losa_scenic.model_lib.quantised import QuantisedDense
from losa_scenic.model_lib.spec import BackboneSpec

Linear = nn.Dense | QuantisedDense
At = Callable[[str, Callable[[Any], Array]], Callable[[Any], Array]]


def dense(features: int, dtype: DType, quantisation: str | None = None, **kwargs: Any) -> Linear:
  """A linear layer [.. d] -> [.. features]; kernel xavier-uniform as in the ViT code bases.

  Args:
    features: width of the output.
    dtype: of compute.
    quantisation: of the kernel, a key of `quantised.KINDS`; None for floats.
    **kwargs: more attributes of the layer.
  """
  kwargs.setdefault('kernel_init', nn.initializers.xavier_uniform())
  if quantisation is not None:
    return QuantisedDense(features, quantisation, dtype=dtype, **kwargs)
  return nn.Dense(features, dtype=dtype, dot_general=products.dot_general, **kwargs)


def norm(spec: BackboneSpec, dtype: DType) -> nn.LayerNorm | nn.RMSNorm:
  """The spec's kind of norm over channels; statistics in float32, output in `dtype`."""
  kind = nn.LayerNorm if spec.norm == 'layer' else nn.RMSNorm
  return kind(epsilon=spec.norm_eps, dtype=dtype)


class PatchEmbed(nn.Module):
  """Cuts images into patches, or clips into tubelets, and projects each: one matrix product.

  Attributes:
    spec: geometry; the kernel is [tubelet * patch * patch * 3, d], the row order (t, y, x, channel)
      being that of a flattened [tubelet, patch, patch, 3, d] convolution kernel.
    dtype: dtype of compute.
  """

  spec: BackboneSpec
  dtype: DType = jnp.float32

  @nn.compact
  def __call__(self, images: Float[Array, 'b *thw 3']) -> Float[Array, 'b n d']:
    """Images [b h w 3] or clips [b t h w 3] -> tokens, time slowest."""
    x = images.astype(self.dtype)
    x = x[:, None] if x.ndim == 4 else x
    b, frames, height, width, channels = x.shape
    p, t = self.spec.patch, self.spec.tubelet
    x = x.reshape(b, frames // t, t, height // p, p, width // p, p, channels)
    x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, -1, t * p * p * channels)
    return dense(
      self.spec.width,
      self.dtype,
      use_bias=self.spec.patch_bias,
      kernel_init=nn.initializers.lecun_normal(),
      name='proj',
    )(x)


class MapHead(nn.Module):
  """Multi-head attention pooling: a learned probe attends over all tokens.

  z = MHA(query=probe, key=value=x); pooled = z + MLP(LN(z)). No residual from the probe (as in
  big_vision and Scenic; Zhai et al. 2022, section 3.3).
  """

  spec: BackboneSpec
  dtype: DType = jnp.float32

  def setup(self):
    spec, linear = self.spec, functools.partial(dense, dtype=self.dtype)
    self.probe = self.param('probe', nn.initializers.xavier_uniform(), (1, 1, spec.width))
    self.query, self.key, self.value, self.out = (linear(spec.width) for _ in range(4))
    self.norm = norm(spec, self.dtype)
    self.fc1, self.fc2 = linear(spec.mlp), linear(spec.width)

  def __call__(self, x: Float[Array, 'b n d'], at: At) -> Float[Array, 'b d']:
    probe = jnp.broadcast_to(self.probe.astype(self.dtype), (x.shape[0], 1, self.spec.width))

    def mlp(u: Array) -> Array:
      return self.fc2(ACTIVATIONS[self.spec.activation](self.fc1(u)))

    z = at('pool_out', self.out)(
      attention(
        at('pool_query', self.query)(probe),
        at('pool_key', self.key)(x),
        at('pool_value', self.value)(x),
        self.spec.heads,
      )
    )
    return (z + at('pool_mlp', mlp)(self.norm(z)))[:, 0]
