"""The side network of HST; its equations stand in `hst`."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Num

from losa_scenic.adapt_lib.method import Run
from losa_scenic.common_lib.activations import GELU
from losa_scenic.common_lib.types import Array, DType
from losa_scenic.model_lib import attention, vit
from losa_scenic.model_lib.spec import BackboneSpec

# Of every linear layer, and of every convolution.
_LINEAR_INIT = nn.initializers.normal(0.02)
_CONV_INIT = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


def _conv(width: int, size: int, padding: int, dtype: DType, **kwargs) -> nn.Conv:
  pad = ((padding, padding), (padding, padding))
  return nn.Conv(
    width, (size, size), strides=2, padding=pad, dtype=dtype, kernel_init=_CONV_INIT, **kwargs
  )


class Stem(nn.Module):
  """Images -> the first stage's grid, a quarter as high and wide.

  Attributes:
    width: channels.
    norm_eps: LayerNorm epsilon.
    dtype: dtype of compute.
  """

  width: int
  norm_eps: float
  dtype: DType

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w 3'], *, train: bool) -> Float[Array, 'b h_out w_out c']:
    x = _conv(self.width, 3, 1, self.dtype, use_bias=False, name='conv1')(x)
    x = nn.BatchNorm(
      use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype, name='bn'
    )(x)
    x = _conv(self.width, 2, 0, self.dtype, name='conv2')(nn.relu(x))
    return nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name='norm')(x)


class SideBlock(nn.Module):
  """One block of a stage: cross-attention, injection, MLP; each on top of the residual stream.

  Attributes:
    width: c.
    heads: attention heads.
    gelu: 'tanh' or 'erf'.
    norm_eps: LayerNorm epsilon.
    dtype: dtype of compute.
  """

  width: int
  heads: int
  gelu: str
  norm_eps: float
  dtype: DType

  @nn.compact
  def __call__(
    self,
    s: Float[Array, 'b n c'],
    context: Float[Array, 'b k c'],
    features: Float[Array, 'b n c'],
  ) -> Float[Array, 'b n c']:
    """Tokens s, what they attend to, and what is added to them."""
    c = self.width
    linear = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=_LINEAR_INIT)
    norm = functools.partial(nn.LayerNorm, epsilon=self.norm_eps, dtype=self.dtype)
    query = linear(c, name='query')(norm(name='norm1')(s))
    key, value = linear(c, name='key')(context), linear(c, name='value')(context)
    s = s + linear(c, name='out')(attention.attention(query, key, value, self.heads))
    s = s + features
    hidden = linear(4 * c, name='fc1')(norm(name='norm2')(s))
    return s + linear(c, name='fc2')(GELU[self.gelu](hidden))


class SideNetwork(nn.Module):
  """The pyramid.

  Attributes:
    spec: the backbone.
    stage_of: stage of every block of the backbone, 0-based, without gaps.
    widths: channels of every stage.
    heads: attention heads of every stage.
  """

  spec: BackboneSpec
  stage_of: tuple[int, ...]
  widths: tuple[int, ...]
  heads: tuple[int, ...]

  @nn.compact
  def __call__(
    self, run: Run, inputs: Num[Array, 'b h w 3'], *, train: bool
  ) -> Float[Array, 'b c']:
    encoded = run.encode(inputs, train=train)
    if self.is_initializing():
      run.features(encoded.tokens)  # The backbone keeps its norm and pooling, though unused.
    dtype = encoded.tokens.dtype
    s = vit.normalize(inputs, self.spec).astype(dtype)
    for stage, (width, heads) in enumerate(zip(self.widths, self.heads, strict=True)):
      s = self._enter(s, stage, train)
      grid = (s.shape[1], s.shape[2])
      bridge = nn.Dense(width, dtype=dtype, kernel_init=_LINEAR_INIT, name=f'bridge_{stage}')
      tokens = s.reshape(s.shape[0], -1, width)
      for i in (i for i, of in enumerate(self.stage_of) if of == stage):
        # The bridge commutes with the resizing and is cheaper before it.
        features = self._resize(bridge(encoded.layers['block'][i]), grid)
        meta = self._norm(f'meta_norm_{i}', dtype)(bridge(encoded.layers['meta'][i]))
        context = jnp.concatenate([meta, features.mean(axis=1, keepdims=True)], axis=1)
        block = SideBlock(
          width, heads, self.spec.gelu, self.spec.norm_eps, dtype, name=f'block_{i}'
        )
        tokens = block(tokens, context, features)
      s = self._norm(f'norm_{stage}', dtype)(tokens).reshape(s.shape)
    return nn.BatchNorm(
      use_running_average=not train,
      momentum=0.9,
      epsilon=1e-6,
      use_bias=False,
      use_scale=False,
      dtype=dtype,
      name='bn',
    )(s.mean(axis=(1, 2)))

  def _norm(self, name: str, dtype: DType) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=self.spec.norm_eps, dtype=dtype, name=name)

  def _enter(
    self, s: Float[Array, 'b h w c'], stage: int, train: bool
  ) -> Float[Array, 'b h_out w_out c_out']:
    """The image, or the grid of the stage before -> the grid of this stage."""
    width, dtype = self.widths[stage], s.dtype
    if stage == 0:
      return Stem(width, self.spec.norm_eps, dtype, name='stem')(s, train=train)
    s = _conv(width, 3, 1, dtype, name=f'down_{stage}')(s)
    return self._norm(f'down_norm_{stage}', dtype)(s)

  def _resize(self, x: Float[Array, 'b n c'], grid: tuple[int, int]) -> Float[Array, 'b m c']:
    """The grid of all tokens of a layer, bilinear to another size (half-pixel centres)."""
    _, height, width = self.spec.grid
    shape = (x.shape[0], height, width, x.shape[-1])
    x = x[:, self.spec.prefix :].reshape(shape)
    x = jax.image.resize(x, (shape[0], *grid, shape[-1]), 'bilinear', antialias=False)
    return x.reshape(shape[0], -1, shape[-1])
