"""Convpass: a small convolution over the token grid beside attention and MLP.

With q(t) = t sigmoid(1.702 t) and z the output of a block's LayerNorm,

  C(z) = q(conv3x3(q(z W_d + b_d))) W_u + b_u,   W_d [d h], conv h -> h, W_u [h d]
  u = x + Attn(LN_1 x) + s C_1(LN_1 x)
  y = u + MLP(LN_2 u) + s C_2(LN_2 u)

The convolution pads with zeros and sees each frame of a clip on its own. Tokens that are not on the
grid, the class token above all, pass as images of one pixel: only the centre of the window acts.
Convpass_attn has C_1 only.

Jie, Deng 2022: Convolutional Bypasses Are Better Vision Transformer Adapters, section 3,
https://arxiv.org/abs/2207.07039; the convolution's starts as in https://github.com/JieShibo/PETL-ViT.

Trainable parameters, L blocks of width d: 2 L (2 d h + h + d + 9 h^2 + h), half of it for
Convpass_attn.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from losa_scenic.adapt_lib import convolutions, inserts
from losa_scenic.adapt_lib.method import Method
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.activations import quick_gelu
from losa_scenic.common_lib.types import Array
from losa_scenic.model_lib.sites import Ctx
from losa_scenic.model_lib.spec import BackboneSpec


def _identity(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
  del key
  return jnp.zeros(shape, dtype).at[1, 1].set(jnp.eye(shape[-1], dtype=dtype))


CONV_INITS = {'xavier': nn.initializers.xavier_uniform(), 'identity': _identity}


def build(
  spec: BackboneSpec,
  *,
  bottleneck: int = 8,
  scale: float = 1.0,
  conv_init: str = 'xavier',
  dropout: float = 0.0,
) -> Method:
  """Convolutional bypasses of attention and MLP.

  Args:
    spec: the backbone.
    bottleneck: h, at least 1 (8 in the paper).
    scale: s, positive (one of 0.01, 0.1, 1, 10, 100 for each task of VTAB-1K).
    conv_init: 'xavier', or 'identity': the convolution copies its input at the start (chosen for
      each task in the released code).
    dropout: rate before W_u, in [0, 1) (0.1 in the released code).

  Raises:
    errors.UserError: for a value out of range.
  """
  del spec
  errors.one_of('convpass conv_init', conv_init, CONV_INITS)
  return _method('convpass', ('attn', 'mlp'), bottleneck, scale, conv_init, dropout)


def build_attn(
  spec: BackboneSpec, *, bottleneck: int = 8, scale: float = 1.0, dropout: float = 0.0
) -> Method:
  """Convolutional bypasses of attention only; their convolutions start Xavier-uniform.

  Args:
    spec: the backbone.
    bottleneck: h, at least 1 (8 in the paper).
    scale: s, positive (one of 0.01, 0.1, 1, 10, 100 for each task of VTAB-1K).
    dropout: rate before W_u, in [0, 1) (0.1 in the released code).

  Raises:
    errors.UserError: for a value out of range.
  """
  del spec
  return _method('convpass_attn', ('attn',), bottleneck, scale, 'xavier', dropout)


def _method(
  name: str, where: tuple[str, ...], hidden: int, scale: float, conv_init: str, dropout: float
) -> Method:
  inserts.check_options(name, bottleneck=hidden, scale=scale, dropout=dropout)
  conv = functools.partial(GridConvolution, conv_init)
  make = functools.partial(inserts.Bottleneck, hidden, 'quick_gelu', dropout, conv=conv)
  insert = functools.partial(inserts.Delta, make, place='beside', scale=scale)
  return Method(inserts=dict.fromkeys(where, insert))


class GridConvolution(nn.Module):
  """conv3x3(q(x)) of the tokens on the grid; the others meet only the centre of the window.

  Attributes:
    init: a key of `CONV_INITS`.
  """

  init: str

  @nn.compact
  def __call__(self, x: Float[Array, 'b n h'], ctx: Ctx) -> Float[Array, 'b n h']:
    b, _, h = x.shape
    kernel = self.param('kernel', CONV_INITS[self.init], (3, 3, h, h)).astype(x.dtype)
    bias = self.param('bias', nn.initializers.zeros, (h,)).astype(x.dtype)
    prefix, grid, added = ctx.split(quick_gelu(x))
    grid = convolutions.per_frame(grid, kernel).reshape(b, -1, h)
    centre = kernel[1, 1]
    return jnp.concatenate([prefix @ centre, grid, added @ centre], axis=1) + bias
