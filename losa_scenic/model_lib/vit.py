"""ViT: patches -> encoder -> final norm -> pooling. Dosovitskiy et al. 2021, section 3.1.

What else `BackboneSpec` can say (registers, norms, rotary positions ...) is what public checkpoints
have; each is a line here or in `block.Block`.

With frames in the spec, tubelets of a clip take the place of patches and all tokens attend to each
other: the unfactorised space-time ViViT (Arnab et al. 2021, section 3.3, model 1). A factorised one
runs the encoder on each time by itself, as on an image (the spatial encoder of model 2), up to the
pooling; what comes after it stands at the site 'time'.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Num

from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Array, DType, PyTree
from losa_scenic.model_lib import encoder, layers, sites, streaming
from losa_scenic.model_lib.spec import BackboneSpec


class ViT(nn.Module):
  """A vision transformer without a classifier.

  Attributes:
    spec: geometry and pooling.
    inserts: what a method places at the sites; empty for the plain backbone.
    collect: layer sites whose outputs `encode` returns.
    dtype: dtype of compute (float32, bfloat16 or float16).
    scan: scan over stacked layers instead of unrolling them.
    remat: recompute layers in the backward pass.
    gather: see `Encoder`.
    quantisation: see `Encoder`.
    stream: see `Encoder`.
    frozen: see `Encoder`.
  """

  spec: BackboneSpec
  inserts: sites.Inserts
  collect: tuple[str, ...] = ()
  dtype: DType = jnp.float32
  scan: bool = False
  remat: bool = False
  gather: encoder.Gather | None = None
  quantisation: str | None = None
  stream: streaming.Stream | None = None
  frozen: bool = False

  def setup(self):
    spec = self.spec
    outer, inner = sites.split(self.inserts)
    named = {site for where in outer for site in sites.sites_of(where)}
    unreachable = named & set(sites.MAP_HEAD_SITES)
    if unreachable and spec.pool != 'map':
      raise errors.UserError(
        f"Sites {sorted(unreachable)} exist only with pooling 'map'; this backbone pools by "
        f"'{spec.pool}'."
      )
    if 'time' in named and not spec.factorised:
      raise errors.UserError("Site 'time' exists only in backbones with factorised=True.")
    self.patch = layers.PatchEmbed(spec, dtype=self.dtype)
    if spec.class_token:
      self.cls = self.param('cls', nn.initializers.zeros, (1, 1, spec.width))
    if spec.registers:
      self.registers = self.param(
        'registers', nn.initializers.normal(0.02), (1, spec.registers, spec.width)
      )
    if spec.positions == 'learned':
      self.pos_embedding = self.param(
        'pos_embedding', nn.initializers.normal(0.02), (1, spec.sequence, spec.width)
      )
    if spec.patch_norm:
      self.patch_norm = layers.norm(spec, self.dtype)
    if spec.pre_norm:
      self.pre_norm = layers.norm(spec, self.dtype)
    self.encoder = encoder.Encoder(
      spec,
      inner,
      self.collect,
      dtype=self.dtype,
      scan=self.scan,
      remat=self.remat,
      gather=self.gather,
      quantisation=self.quantisation,
      stream=self.stream,
      frozen=self.frozen,
    )
    if spec.final_norm != 'none':
      self.norm = layers.norm(spec, self.dtype)
    if spec.pool == 'map':
      self.map_head = layers.MapHead(spec, dtype=self.dtype)
    self.insert = {sites.name_of(where): make() for where, make in outer.items()}

  def _ctx(self, train: bool, shared: PyTree | None) -> sites.Ctx:
    t, h, w = self.spec.grid
    many = self.spec.sequences
    grid, prefix = (t // many, h, w), self.spec.prefix
    return sites.Ctx(grid=grid, prefix=prefix, train=train, shared=shared, sequences=many)

  def _at(self, train: bool, shared: PyTree | None) -> layers.At:
    return sites.make_at(sites.by_site(self.insert), self._ctx(train, shared))

  def encode(
    self,
    images: Num[Array, 'b *thw c'],
    *,
    per_layer: PyTree | None = None,
    shared: PyTree | None = None,
    train: bool = False,
    read: encoder.Read | None = None,
  ) -> encoder.Encoded:
    """Runs the encoder.

    Args:
      images: [b h w 3] or, with frames, [b t h w 3]; integers in [0, 255], normalised here with
        the spec's mean and std, or floats that are already normalised.
      per_layer: optional signal to each layer's inserts, leading axis [depth].
      shared: optional signal to all layers' inserts.
      train: whether this is a training pass.
      read: what is wanted of the values of each layer, see `Encoder`.

    Returns:
      The tokens before the final norm, and everything collected, or what was read of it. If the
      backbone is factorised, tokens of all times stand in one row: all class tokens and registers,
      then the grid, then what was added.

    Raises:
      errors.UserError: if the image size is not that of the position embedding.
    """
    spec = self.spec
    if images.shape[1:] != spec.input_shape:
      raise errors.UserError(
        f"Images are {list(images.shape[1:])}, but backbone '{spec.name}' is for "
        f'{list(spec.input_shape)}.'
      )
    at = self._at(train, shared)
    embedded = self._embedded(at('patch', self.patch)(normalize(images, spec)))
    ctx = self._ctx(train, shared=None)  # The encoder hands `shared` to its layers itself.
    seen: dict[str, Any] = {}
    read_now = read if spec.sequences == 1 else None  # Else rows of whole inputs come later.

    def run(x: Array) -> Array:
      x, values = self.encoder(x, ctx, per_layer, shared, read_now)
      seen.update(values)
      return x

    tokens, embedded = self._joined(at('encoder', run)(embedded)), self._joined(embedded)
    if spec.sequences > 1:
      for site in seen.keys() & set(self.collect):
        seen[site] = jax.tree.map(self._joined, seen[site])
    if read is not None and read_now is None:
      seen = encoder.read_layers(seen, spec.depth, read)
    prefix = spec.sequences * spec.prefix
    return encoder.Encoded(tokens, embedded, seen, spec.grid, prefix, spec.sequences)

  def _embedded(self, x: Float[Array, 'b patches d']) -> Float[Array, 's n d']:
    """Patch tokens -> input of the first block: class token, registers, patches."""
    spec = self.spec
    x = x.reshape(spec.sequences * len(x), -1, spec.width)
    x = self.patch_norm(x) if spec.patch_norm else x
    prefix = [self.cls] if spec.class_token else []
    prefix += [self.registers] if spec.registers else []
    own = [jnp.broadcast_to(p.astype(x.dtype), (len(x), *p.shape[1:])) for p in prefix]
    x = jnp.concatenate([*own, x], axis=1)
    if spec.positions == 'learned':
      x = x + self.pos_embedding.astype(x.dtype)
    return self.pre_norm(x) if spec.pre_norm else x

  def _joined(self, x: Float[Array, '*l s m d']) -> Float[Array, '*l b n d']:
    """Sequences -> rows of whole inputs: what leads each sequence, the grid, what was added."""
    spec, many = self.spec, self.spec.sequences
    if many == 1:
      return x
    *lead, s, _, d = x.shape
    parts = jnp.split(x, (spec.prefix, min(spec.sequence, x.shape[-2])), axis=-2)
    parts = [part.reshape(*lead, s // many, many * part.shape[-2], d) for part in parts]
    return jnp.concatenate([part for part in parts if part.shape[-2]], axis=-2)

  def _apart(self, x: Float[Array, 'b n d']) -> Float[Array, 's m d']:
    """The inverse of `_joined`."""
    spec, many = self.spec, self.spec.sequences
    if many == 1:
      return x
    b, n, d = x.shape
    parts = jnp.split(x, (many * spec.prefix, min(spec.tokens, n)), axis=1)
    parts = [part.reshape(b * many, part.shape[1] // many, d) for part in parts]
    return jnp.concatenate([part for part in parts if part.shape[1]], axis=1)

  def normed(
    self, tokens: Float[Array, 'b n d'], *, shared: PyTree | None = None, train: bool = False
  ) -> Float[Array, 'b n d']:
    """Final norm of tokens in the place of the last block's output, if it is before the pooling."""
    tokens = tokens.astype(self.dtype)
    if self.spec.final_norm != 'tokens':
      return tokens
    return self._joined(self._at(train, shared)('norm', self.norm)(self._apart(tokens)))

  def pooled(
    self, tokens: Float[Array, 'b n d'], *, shared: PyTree | None = None, train: bool = False
  ) -> Float[Array, 'b d']:
    """Pooling of `normed` tokens, and the final norm if it comes after.

    The mean is over the grid's tokens alone. The features of a factorised backbone are the mean of
    those of all times.
    """
    at, spec = self._at(train, shared), self.spec

    def pool(x: Array) -> Array:
      if spec.pool == 'map' and self.stream is not None and not self.is_initializing():
        params = streaming.fetched(self.map_head.variables['params'], x)
        head: Any = layers.MapHead(spec, dtype=self.dtype, parent=None)
        return head.apply({'params': params}, x, at)
      if spec.pool == 'map':
        return self.map_head(x, at)
      if spec.pool == 'gap':
        return x[:, spec.prefix : spec.sequence].mean(axis=1)
      return x[:, 0] if spec.pool == 'cls' else x[:, :2].mean(axis=1)

    x = at('pool', pool)(self._apart(tokens))
    if spec.final_norm == 'pooled':
      x = at('norm', self.norm)(x[:, None])[:, 0]
    if not spec.factorised:
      return x
    return at('time', lambda x: x.mean(axis=1))(x.reshape(len(tokens), -1, spec.width))

  def features(
    self, tokens: Float[Array, 'b n d'], *, shared: PyTree | None = None, train: bool = False
  ) -> Float[Array, 'b d']:
    """Final norm and pooling of tokens in the place of the last block's output."""
    tokens = self.normed(tokens[:, : self.tokens_read], shared=shared, train=train)
    return self.pooled(tokens, shared=shared, train=train)

  @property
  def tokens_read(self) -> int | None:
    """How many leading tokens `features` reads: those pooled, if no insert sees others; or None."""
    spec, placed = self.spec, {site for where in self.inserts for site in sites.sites_of(where)}
    if spec.sequences > 1 or not spec.pool.startswith('cls') or placed & {'norm', 'pool'}:
      return None
    return 1 if spec.pool == 'cls' else 2

  def __call__(self, images: Num[Array, 'b *thw c'], *, train: bool = False) -> Float[Array, 'b d']:
    """Images -> pooled features."""
    return self.features(self.encode(images, train=train).tokens, train=train)


def normalize(images: Num[Array, 'b *thw c'], spec: BackboneSpec) -> Float[Array, 'b *thw c']:
  """Integer images in [0, 255] -> (x / 255 - mean) / std in float32; floats pass unchanged."""
  if not jnp.issubdtype(images.dtype, jnp.integer):
    return images
  x = images.astype(jnp.float32) / 255.0
  return (x - jnp.asarray(spec.mean)) / jnp.asarray(spec.std)
