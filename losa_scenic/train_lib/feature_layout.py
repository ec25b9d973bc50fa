"""What a feature cache keeps of an input, and how it lies in a row of bytes.

Where all that comes before the classifier is frozen: the pooled features. Else those outputs of the
frozen encoder that the rest of the model reads, found by tracing it. What is the same array twice,
such as the last block's output that is also a tap, is kept once.

A row holds its leaves one after the other, in 'float32', 'bfloat16' or 'int8'. Of int8 every token
has a scale, the largest absolute value of its channels / 127, and the scales of all leaves follow
the values, as float32. Rows are filled up to a multiple of 64 bytes, so that a batch of them can be
used where it lies.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int8, Num

from losa_scenic.adapt_lib.method import Method
from losa_scenic.adapt_lib.token_products import tokens_first
from losa_scenic.common_lib.types import Array, Params
from losa_scenic.model_lib import attention
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.encoder import Encoded
from losa_scenic.model_lib.spec import BackboneSpec

DTYPES = ('int8', 'bfloat16', 'float32')
FEATURES = 'features'
_ALIGNED = 64


def are_rows(inputs: Any) -> bool:
  """Whether an array of inputs are rows [b items]; images and clips have more axes."""
  return inputs.ndim == 2


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One array of a row.

  Attributes:
    name: 'features', or what it is in `encoder.Encoded`, e.g. 'layers/block/3'.
    shape: of one input; the last axis is that of channels.
    dtype: of the model, which is computed in again.
  """

  name: str
  shape: tuple[int, ...]
  dtype: str

  @property
  def size(self) -> int:
    """Number of values."""
    return math.prod(self.shape)

  @property
  def tokens(self) -> int:
    """Number of vectors with a scale of their own."""
    return math.prod(self.shape[:-1])


@dataclasses.dataclass(frozen=True)
class Layout:
  """A row.

  Attributes:
    leaves: what is kept of each input.
    dtype: one of `DTYPES`.
    encoded: shapes of an `encoder.Encoded` of one input; None where the features are kept.
    places: of each of its leaves the number in `leaves`, or None for what nobody reads.
  """

  leaves: tuple[Leaf, ...]
  dtype: str
  encoded: Any = None
  places: tuple[int | None, ...] = ()

  @property
  def items(self) -> int:
    """Length of a row, in numbers of `dtype`."""
    values = sum(leaf.size for leaf in self.leaves)
    if self.dtype == 'int8':
      values += 4 * sum(leaf.tokens for leaf in self.leaves)
    each = _ALIGNED // self.numpy_dtype.itemsize
    return -(-values // each) * each

  @property
  def numpy_dtype(self) -> np.dtype:
    """That of a row's numbers."""
    return jnp.dtype(self.dtype)

  @property
  def row_bytes(self) -> int:
    """Bytes of a row, a multiple of 64."""
    return self.items * self.numpy_dtype.itemsize

  def describe(self) -> dict[str, Any]:
    """What makes two rows comparable, as JSON can hold it."""
    leaves = [[leaf.name, list(leaf.shape), leaf.dtype] for leaf in self.leaves]
    return {'dtype': self.dtype, 'leaves': leaves}

  def pack(self, values: Sequence[Float[Array, 'b ...']]) -> Num[Array, 'b items']:
    """Rows of the leaves of b inputs."""
    b = len(values[0])
    if self.dtype == 'int8':
      rounded, scales = zip(*(_rounded(x.astype(jnp.float32)) for x in values), strict=True)
      parts = [q.reshape(b, -1) for q in rounded]
      parts += [jax.lax.bitcast_convert_type(s, jnp.int8).reshape(b, -1) for s in scales]
    else:
      parts = [x.reshape(b, -1).astype(self.dtype) for x in values]
    row = jnp.concatenate(parts, axis=1)
    return jnp.pad(row, ((0, 0), (0, self.items - row.shape[1])))

  def unpack(self, rows: Num[Array, 'b items']) -> list[Float[Array, 'b ...']]:
    """The leaves that rows hold, as far as their dtype could keep them."""
    values, start = [], 0
    for leaf in self.leaves:
      values.append(rows[:, start : start + leaf.size].reshape(-1, *leaf.shape))
      start += leaf.size
    if self.dtype == 'int8':
      scales = self._scales(rows, start)
      values = [_whole(x, scale) for x, scale in zip(values, scales, strict=True)]
    return [x.astype(leaf.dtype) for x, leaf in zip(values, self.leaves, strict=True)]

  def _scales(self, rows: Array, start: int) -> list[Array]:
    """Of each leaf [b *t 1]."""
    tokens = [leaf.tokens for leaf in self.leaves]
    packed = rows[:, start : start + 4 * sum(tokens)].reshape(len(rows), -1, 4)
    # Else they would be put together from their bytes for every value that they scale.
    scales = jax.lax.optimization_barrier(jax.lax.bitcast_convert_type(packed, jnp.float32))
    parts = jnp.split(scales, np.cumsum(tokens)[:-1].tolist(), axis=1)
    return [
      part.reshape(-1, *leaf.shape[:-1], 1) for part, leaf in zip(parts, self.leaves, strict=True)
    ]

  def encode(self, model: Adapted, frozen: Params, inputs: Num[Array, 'b ...']) -> Array:
    """Rows [b items] of inputs, from one pass through the frozen encoder.

    Args:
      model: the adapted model that the layout is of.
      frozen: its frozen parameters.
      inputs: images or clips.
    """
    variables = {'params': frozen}
    if self.encoded is None:
      return self.pack([apply(model, variables, inputs, method='features')])
    values = jax.tree.leaves(apply(model, variables, inputs, method='encode'))
    first = {place: i for i, place in reversed(list(enumerate(self.places)))}
    return self.pack([values[first[k]] for k in range(len(self.leaves))])

  def decode(self, rows: Num[Array, 'b items']) -> Any:
    """The `encoder.Encoded` of rows; what nobody reads is zero."""
    values = self.unpack(rows)

    def leaf(place: int | None, shape: jax.ShapeDtypeStruct) -> Array:
      if place is not None:
        return values[place]
      return jnp.zeros((len(rows), *shape.shape[1:]), shape.dtype)

    shapes, tree = jax.tree.flatten(self.encoded)
    return jax.tree.unflatten(tree, map(leaf, self.places, shapes))


def _rounded(x: Float[Array, 'b *t d']) -> tuple[Array, Array]:
  """(int8 [b *t d], scales float32 [b *t]); x is their product, to half a scale."""
  scale = jnp.abs(x).max(-1) / 127
  divisor = jnp.where(scale > 0, scale, 1.0)[..., None]
  return jnp.round(x / divisor).astype(jnp.int8), scale


def _whole(x: Int8[Array, 'b *t d'], scale: Float[Array, 'b *t 1']) -> Float[Array, 'b *t d']:
  """The inverse of `_rounded`, in float32."""
  if x.ndim != 3 or not attention.on_cpu():
    return x.astype(jnp.float32) * scale
  # CPUs: laid out with tokens first, as most side networks read them, while they are small; and
  # made whole once, not by each operation that reads them.
  x, scale = jax.lax.optimization_barrier((tokens_first(x), tokens_first(scale)))
  return tokens_first(jax.lax.optimization_barrier(x.astype(jnp.float32) * scale))


def read_by(encoded: Encoded, method: Method) -> Encoded:
  """What a pass for this method alone would have collected."""
  return encoded.replace(layers={site: encoded.layers[site] for site in method.collect})


def apply(model: Adapted, *args: Any, **kwargs: Any) -> Any:
  """`model.apply`, whose result flax's types leave open."""
  return model.apply(*args, **kwargs)


@dataclasses.dataclass(frozen=True)
class RowModel:
  """An adapted model whose inputs may be rows of a layout instead of images or clips.

  Attributes:
    model: the adapted model.
    layout: of the rows.
  """

  model: Adapted
  layout: Layout

  @property
  def method(self) -> Method:
    """See `Adapted`."""
    return self.model.method

  @property
  def num_classes(self) -> int:
    """See `Adapted`."""
    return self.model.num_classes

  @property
  def spec(self) -> BackboneSpec:
    """See `Adapted`."""
    return self.model.spec

  def apply(self, variables: Mapping[str, Any], inputs: Num[Array, 'b ...'], **kwargs: Any) -> Any:
    """`Adapted.apply`; of rows too."""
    if not are_rows(inputs):
      return apply(self.model, variables, inputs, **kwargs)
    if self.layout.encoded is not None:
      encoded = self.layout.decode(inputs)
      return apply(self.model, variables, None, **{**kwargs, 'encoded': encoded})
    (features,) = self.layout.unpack(inputs)
    kwargs = {name: value for name, value in kwargs.items() if name not in ('train', 'encoded')}

    def classify(model: Adapted, x: Array) -> Array:
      return model.output_projection(x.astype(jnp.float32))

    return apply(self.model, variables, features, method=classify, **kwargs)
