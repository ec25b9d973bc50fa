"""The small layers a backbone is made of, with explicit dtypes.

Parameters are created in float32; frozen ones may be stored in any float dtype (they are cast once
at load). Every layer casts its parameters and its input to `dtype`, the dtype of compute.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from losa_scenic.common_lib.activations import ACTIVATIONS
from losa_scenic.common_lib.types import Array, DType
from losa_scenic.model_lib.spec import BackboneSpec

At = Callable[[str, Callable[[Any], Array]], Callable[[Any], Array]]


def dense(features: int, dtype: DType, **kwargs) -> nn.Dense:
  """A linear layer [.. d] -> [.. features]; kernel xavier-uniform as in the ViT code bases."""
  kwargs.setdefault('kernel_init', nn.initializers.xavier_uniform())
  return nn.Dense(features, dtype=dtype, **kwargs)


def norm(spec: BackboneSpec, dtype: DType) -> nn.LayerNorm | nn.RMSNorm:
  """The spec's kind of norm over channels; statistics in float32, output in `dtype`."""
  kind = nn.LayerNorm if spec.norm == 'layer' else nn.RMSNorm
  return kind(epsilon=spec.norm_eps, dtype=dtype)


def split_heads(x: Float[Array, 'b n d'], heads: int) -> Float[Array, 'b n h e']:
  """[b n d] -> [b n heads d/heads]."""
  return x.reshape(*x.shape[:-1], heads, -1)


def attention(
  q: Float[Array, 'b n d'],
  k: Float[Array, 'b m d'],
  v: Float[Array, 'b m d'],
  heads: int,
  mask: Bool[Array, '#b 1 #n m'] | None = None,
  bias: Float[Array, 'h n m'] | None = None,
) -> Float[Array, 'b n d']:
  """softmax(q k^T / sqrt(d / heads) + bias) v, per head; the softmax is computed in float32.

  With a mask, query i sees only the keys where it is True.
  """
  dtype = q.dtype
  # On CPU XLA has no product of float16 matrices with float32 sums.
  if dtype == jnp.float16 and jax.default_backend() == 'cpu':
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
  y = jax.nn.dot_product_attention(
    split_heads(q, heads),
    split_heads(k, heads),
    split_heads(v, heads),
    bias=None if bias is None else bias[None].astype(q.dtype),
    mask=mask,
  )
  return y.reshape(q.shape).astype(dtype)


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
