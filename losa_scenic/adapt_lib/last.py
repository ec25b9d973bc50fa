"""LAST: a side network of low-rank attention modules.

With z_0 the embedded tokens and z_1 .. z_m the outputs of m = L / g groups of g frozen blocks,

  u_i = F_i(u_{i-1} + z_i), u_0 = z_0,    F_i = T modules one after the other
  f(x) = x + delta(x),  delta(x) = softmax(q k^T / sqrt(r)) v W_o + c_o
  q, k, v = LN(x) W + c, each [d r], W_o [r d]; one head over all tokens, no MLP
  o = u_m - (z_0 + .. + z_{m-1})

o takes the place of z_m: frozen final norm, pooling, classifier. Computed in an equal form that
cancels no large terms: with s the sum of all deltas so far, a module of group i reads
s + z_0 + .. + z_i, and o = z_m + s. Both sums are kept in float32.

Tang, Fu, Zhu, Wu: Low-rank Attention Side-Tuning for Parameter-Efficient Fine-Tuning,
2024, https://arxiv.org/abs/2402.04009, section 3. No code was released. Trainable parameters:
m T (4 d r + 3 r + 3 d), 2 d of them the LayerNorm's.

Our reading, since the paper leaves it open or was not available in full: that u and z are added,
the residual, the LayerNorm before, the biases, one head, the scale 1/sqrt(r), and the defaults of
the options. W_o = 0 at the start, so that o = z_m exactly while W_o has a gradient.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float, Num

from losa_scenic.adapt_lib.method import Method, Run
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Array, DType
from losa_scenic.model_lib import attention, layers
from losa_scenic.model_lib.spec import BackboneSpec


def build(spec: BackboneSpec, *, rank: int = 16, group: int = 1, modules: int = 1) -> Method:
  """LAST for a backbone.

  Args:
    spec: the backbone.
    rank: r, width of the attention, at least 1 (default: ours).
    group: g, blocks of a group, which must divide the backbone's depth (default: ours).
    modules: T, attention modules of a group, at least 1 (default: ours).

  Raises:
    errors.UserError: for a value out of range, or a depth that is no multiple of `group`.
  """
  for name, value in {'rank': rank, 'group': group, 'modules': modules}.items():
    if value < 1:
      raise errors.UserError(f'LAST {name} must be at least 1, got {value}.')
  if spec.depth % group:
    raise errors.UserError(
      f"LAST group must divide the {spec.depth} blocks of backbone '{spec.name}', got {group}."
    )
  taps = tuple(range(group - 1, spec.depth, group))
  side = functools.partial(LAST, rank=rank, taps=taps, modules=modules, norm_eps=spec.norm_eps)
  return Method(collect=('block',), side=side)


class LowRankAttention(nn.Module):
  """delta(x): LayerNorm, attention in width r, back to width d.

  Attributes:
    rank: r.
    norm_eps: LayerNorm epsilon.
    dtype: dtype of compute, also of the output.
  """

  rank: int
  norm_eps: float
  dtype: DType

  @nn.compact
  def __call__(self, x: Float[Array, 'b n d']) -> Float[Array, 'b n d']:
    u = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name='norm')(x)
    q, k, v = (
      layers.dense(self.rank, self.dtype, name=name)(u) for name in ('query', 'key', 'value')
    )
    out = layers.dense(x.shape[-1], self.dtype, kernel_init=nn.initializers.zeros, name='out')
    return out(attention.attention(q, k, v, heads=1))


class LAST(nn.Module):
  """The side network.

  Attributes:
    rank: r.
    taps: 0-based index of the last block of every group.
    modules: T.
    norm_eps: LayerNorm epsilon, the backbone's.
  """

  rank: int
  taps: tuple[int, ...]
  modules: int = 1
  norm_eps: float = 1e-6

  @nn.compact
  def __call__(
    self, run: Run, inputs: Num[Array, 'b *thw c'] | None, *, train: bool
  ) -> Float[Array, 'b ...']:
    encoded = run.encode(inputs, train=train)
    dtype = encoded.tokens.dtype
    z = encoded.embedded.astype(jnp.float32)
    s = jnp.zeros_like(z)
    for i, tap in enumerate(self.taps):
      z = z + encoded.layers['block'][tap].astype(jnp.float32)
      for t in range(self.modules):
        delta = LowRankAttention(self.rank, self.norm_eps, dtype, name=f'group_{i}_module_{t}')
        s = s + delta(z + s).astype(jnp.float32)
    return run.features(encoded.tokens + s.astype(dtype), train=train)
