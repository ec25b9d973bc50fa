"""A transformer block with named sites, and the layer that it is with a method's inserts."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from losa_scenic.common_lib.activations import ACTIVATIONS
from losa_scenic.common_lib.types import Array, DType, PyTree
from losa_scenic.model_lib import attention, layers, positions, sites
from losa_scenic.model_lib.spec import BackboneSpec


class Block(nn.Module):
  """One transformer block; its parts stand at the sites of `sites.LayerSite`.

  With `tokens_first` its input and all it makes of it is [n b d]; only attention minds.
  """

  spec: BackboneSpec
  dtype: DType = jnp.float32
  quantisation: str | None = None
  tokens_first: bool = False

  def setup(self):
    spec, norm = self.spec, functools.partial(layers.norm, self.spec, self.dtype)

    def linear(name: str, features: int, **kwargs: Any) -> layers.Linear:
      kwargs['use_bias'] = spec.has_bias(name)
      return layers.dense(features, self.dtype, self.quantisation, **kwargs)

    self.norm1, self.norm2 = norm(), norm()
    self.query, self.key, self.value = (
      linear(name, spec.width) for name in ('query', 'key', 'value')
    )
    self.out = linear('out', spec.width)
    mlp_bias = nn.initializers.normal(1e-6)
    self.fc1 = linear('fc1', spec.mlp, bias_init=mlp_bias)
    self.fc2 = linear('fc2', spec.width, bias_init=mlp_bias)
    if spec.gated:
      self.gate = linear('gate', spec.mlp, bias_init=mlp_bias)
    if spec.qk_norm != 'none':
      self.query_norm, self.key_norm = norm(), norm()
    if spec.attn_norm:
      self.attn_norm = norm()
    if spec.mlp_norm:
      self.mlp_norm = norm()
    if spec.layer_scale:
      self.attn_scale, self.mlp_scale = (
        self.param(name, nn.initializers.ones, (spec.width,))
        for name in ('attn_scale', 'mlp_scale')
      )
    if spec.relative_positions:
      self.relative_bias = self.param(
        'relative_bias', nn.initializers.zeros, (positions.num_offsets(spec), spec.heads)
      )

  def __call__(self, x: Float[Array, 'b n d'], at: layers.At) -> Float[Array, 'b m d']:
    spec = self.spec

    def attend(qkv: Any) -> Array:
      q, k, v, *mask = qkv
      q, k, v = (self._batch_first(x) for x in (q, k, v))
      bias = None
      if spec.relative_positions:
        bias = positions.relative_bias(self.relative_bias, spec, q.shape[1], k.shape[1])
      return self._batch_first(attention.attention(q, k, v, spec.heads, *mask, bias=bias))

    def attn(u: Array) -> Array:
      q, k, v = (at(name, getattr(self, name))(u) for name in ('query', 'key', 'value'))
      y = at('attend', attend)((self._placed(q, 'query_norm'), self._placed(k, 'key_norm'), v))
      y = at('out', self.out)(self.attn_norm(y) if spec.attn_norm else y)
      return y * self.attn_scale.astype(y.dtype) if spec.layer_scale else y

    def mlp(u: Array) -> Array:
      act = ACTIVATIONS[spec.activation]
      y = at('fc1', self.fc1)(u)
      y = act(at('gate', self.gate)(u)) * y if spec.gated else act(y)
      y = at('fc2', self.fc2)(self.mlp_norm(y) if spec.mlp_norm else y)
      return y * self.mlp_scale.astype(y.dtype) if spec.layer_scale else y

    def branch(f: sites.Op, norm: sites.Op) -> sites.Op:
      return lambda x: x + (f(norm(x)) if spec.block_norm == 'pre' else norm(f(x)))

    attn_block = branch(at('attn', attn), at('norm1', self.norm1))
    mlp_block = branch(at('mlp', mlp), at('norm2', self.norm2))

    def block(x: Array) -> Array:
      return at('mlp_block', mlp_block)(at('attn_block', attn_block)(x))

    return at('block', block)(x)

  def _placed(self, x: Float[Array, 'b n d'], norm: str) -> Float[Array, 'b n d']:
    """Queries or keys as attention compares them: normalised and turned by their position."""
    spec = self.spec
    if spec.qk_norm == 'width':
      x = getattr(self, norm)(x)
    elif spec.qk_norm == 'head':
      x = getattr(self, norm)(attention.split_heads(x, spec.heads)).reshape(x.shape)
    if spec.rope == 'none':
      return x
    return self._batch_first(positions.rotate(self._batch_first(x), spec))

  def _batch_first(self, x: Float[Array, 'x y d']) -> Float[Array, '_ _ d']:
    """Tokens as attention takes them, and its own inverse."""
    return jnp.swapaxes(x, 0, 1) if self.tokens_first else x


class Layer(nn.Module):
  """A block and this layer's own inserts: the body that is scanned.

  Inserts are ordinary children, named `insert_<site>`, so their parameters stack by themselves.
  `tokens_first`, for layers without inserts, makes tokens lie as [n b d] in memory.
  """

  spec: BackboneSpec
  inserts: tuple[tuple[sites.Where, sites.MakeInsert], ...]  # Scanning would sort a dict's keys.
  collect: tuple[str, ...]
  ctx: sites.Ctx
  dtype: DType = jnp.float32
  quantisation: str | None = None
  tokens_first: bool = False

  def setup(self):
    # Made in setup, never inside an operation: a module built lazily inside an insert would be
    # adopted by the insert, and frozen weights would move into its subtree.
    self.block = Block(
      self.spec,
      dtype=self.dtype,
      quantisation=self.quantisation,
      tokens_first=self.tokens_first,
    )
    self.insert = {sites.name_of(where): make() for where, make in self.inserts}

  def __call__(
    self, x: Float[Array, 'b n d'], layer: PyTree | None, shared: PyTree | None
  ) -> tuple[Float[Array, 'b m d'], dict[str, Array]]:
    seen: dict[str, Array] = {}
    ctx = dataclasses.replace(self.ctx, layer=layer, shared=shared, record=seen.__setitem__)
    at = sites.make_at(sites.by_site(self.insert), ctx, self.collect, seen)
    if not self.tokens_first:
      return self.block(x, at), seen
    # These only say how arrays lie in memory: from layer to layer they cancel out.
    x = jnp.swapaxes(self.block(jnp.swapaxes(x, 0, 1), at), 0, 1)
    return x, jax.tree.map(lambda y: jnp.swapaxes(y, 0, 1), seen)
