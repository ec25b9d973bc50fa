"""The weights of frozen layers as rows in the host's memory, one a layer.

Stacked layers, which are scanned, are the rows of one buffer [depth 1 size]; of unrolled ones each
has a buffer [1 size] of its own. A layer's weights stand one after the other in its row, the
largest first, each at a multiple of `_ALIGNMENT` bytes. The row's dtype is theirs if they share
one. Else it is an integer as wide as that of most of the bytes, and weights, such as int8 ones with
float32 scales, are cut out as bits. Not a float: where a device computes in wider ones, bits that
are no number do not survive.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from losa_scenic.common_lib import errors, trees
from losa_scenic.common_lib.types import Array, DType, Params

HOST = 'pinned_host'
# Where a buffer stands in the tree of parameters: in the place of `backbone/encoder/layers`, or as
# `packed_<i>` in that of `layers_<i>`.
PACKED = 'packed'
_ENCODER = 'backbone/encoder/'
_PACKED = re.compile(rf'{_ENCODER}{PACKED}(_\d+)?')
_LAYER = re.compile(r'(?:backbone/)?encoder/layers(?:_(\d+))?/(.*)')
_ALIGNMENT = 128


@dataclasses.dataclass(frozen=True)
class Leaf:
  """A weight in a row.

  Attributes:
    path: below the layer, e.g. 'block/fc1/kernel'.
    shape: of one layer's.
    dtype: name of its dtype.
    start: of its first element, counted in elements of the row.
  """

  path: str
  shape: tuple[int, ...]
  dtype: str
  start: int


@dataclasses.dataclass(frozen=True)
class Layout:
  """How the weights of a layer are packed.

  Attributes:
    depth: layers, the rows of the buffer.
    dtype: name of the buffer's dtype.
    size: elements of a row.
    leaves: the weights of one layer.
    stacked: whether all rows are in one buffer.
  """

  depth: int
  dtype: str
  size: int
  leaves: tuple[Leaf, ...]
  stacked: bool = True

  @property
  def shape(self) -> tuple[int, ...]:
    """Of a buffer."""
    return (self.depth, 1, self.size) if self.stacked else (1, self.size)

  @property
  def names(self) -> tuple[str, ...]:
    """Of the buffers, as parameters of the encoder."""
    return (PACKED,) if self.stacked else tuple(f'{PACKED}_{i}' for i in range(self.depth))

  @property
  def layer_bytes(self) -> int:
    """Of a row."""
    return self.size * _dtype(self.dtype).itemsize

  def cut(self, row: Array) -> dict[str, Any]:
    """A row [1 size] on the device -> the layer's weights."""
    flat, own = row.reshape(-1), _dtype(self.dtype)
    params = {}
    for leaf in self.leaves:
      dtype, size = _dtype(leaf.dtype), math.prod(leaf.shape)
      part = jax.lax.slice_in_dim(flat, leaf.start, leaf.start + _elements(leaf, own))
      if dtype != own:
        wide = _bits(dtype) // _bits(own)
        part = part.reshape(-1, wide) if wide > 1 else part
        part = jax.lax.bitcast_convert_type(part, dtype).reshape(-1)[:size]
      params[leaf.path] = part.reshape(leaf.shape)
    return trees.unflatten(params)

  def pack(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """The weights of a layer by path, of the host -> its row [1 size].

    Raises:
      errors.UserError: if a weight is missing, unknown, or of another shape.
    """
    want = {leaf.path: [list(leaf.shape), leaf.dtype] for leaf in self.leaves}
    have = {path: [list(value.shape), value.dtype.name] for path, value in values.items()}
    differences = trees.differences(want, have)
    if differences:
      raise errors.UserError('\n  '.join(['The weights of a layer do not fit:', *differences]))
    own = _dtype(self.dtype)
    row = np.zeros((1, self.size), own)
    raw = row.reshape(-1).view(np.uint8)
    for leaf in self.leaves:
      part = _bytes_of(values[leaf.path])
      raw[leaf.start * own.itemsize :][: part.size] = part
    return row


def layout_of(layers: Mapping[str, Any], depth: int, *, stacked: bool = True) -> Layout:
  """The layout for the weights of one layer.

  Args:
    layers: {path below the layer: what has its shape and dtype}.
    depth: how many layers there are.
    stacked: whether their rows shall be in one buffer.
  """
  size_of: dict[np.dtype, int] = {}
  for leaf in layers.values():
    dtype = np.dtype(leaf.dtype)
    size_of[dtype] = size_of.get(dtype, 0) + math.prod(leaf.shape) * _bits(dtype)
  most = max(size_of, key=lambda dtype: (size_of[dtype], dtype.name))
  own = most if len(size_of) == 1 and _bits(most) >= 8 else np.dtype(f'uint{8 * most.itemsize}')
  # The large ones first: what little there is of other dtypes is at the end.
  largest = sorted(layers.items(), key=lambda item: (-math.prod(item[1].shape), item[0]))
  leaves, start, unit = [], 0, _ALIGNMENT // own.itemsize
  for path, value in largest:
    leaf = Leaf(path, tuple(value.shape), np.dtype(value.dtype).name, start)
    leaves.append(leaf)
    start += -(-_elements(leaf, own) // unit) * unit
  return Layout(depth, own.name, start, tuple(leaves), stacked)


def pack_shapes(frozen: Params) -> tuple[Layout, dict[str, Any]]:
  """The layout for a frozen tree, and the tree with its layers packed.

  Args:
    frozen: shapes as they are stored; layers stacked or not.

  Raises:
    errors.UserError: if the layers differ or none is frozen.
  """
  rest, layers, depth, stacked = {}, {}, 0, True
  for path, leaf in trees.flatten(frozen).items():
    match = _LAYER.fullmatch(path)
    if match is None:
      rest[path] = leaf
      continue
    stacked = match[1] is None
    shape = leaf.shape[1:] if stacked else leaf.shape
    depth = max(depth, leaf.shape[0] if stacked else 1 + int(match[1]))
    one = jax.ShapeDtypeStruct(shape, leaf.dtype)
    if layers.setdefault(match[2], one) != one:
      raise errors.UserError(f"frozen_memory 'host' needs layers that are alike: {path} differs.")
  if not layers:
    raise errors.UserError("frozen_memory 'host': no weights of layers are frozen.")
  layout = layout_of(layers, depth, stacked=stacked)
  buffer = jax.ShapeDtypeStruct(layout.shape, _dtype(layout.dtype))
  rest |= {f'{_ENCODER}{name}': buffer for name in layout.names}
  return layout, trees.unflatten(rest)


class Packer:
  """Fills the host's buffers, layer by layer as their weights come in.

  Beside the buffers the host holds the weights of layers that are not complete yet, and the device
  one layer, if rows share a buffer.
  """

  def __init__(self, layout: Layout, sharding: jax.sharding.Sharding | None = None):
    """Makes the buffer that rows share.

    Args:
      layout: of the rows.
      sharding: where they live, in memory `HOST`; by default that of JAX's first device.
    """
    if sharding is None:
      # Arrays of a `SingleDeviceSharding` are taken for the device's, whatever its memory.
      mesh = jax.sharding.Mesh(np.asarray(jax.local_devices()[:1]), ('device',))
      sharding = jax.NamedSharding(mesh, jax.P(), memory_kind=HOST)
    self._layout = layout
    self._sharding = sharding
    self._waiting: dict[int, dict[str, np.ndarray]] = {}
    self._missing = set(range(layout.depth))
    self._write = jax.jit(_write_row, donate_argnums=0, out_shardings=sharding)
    self._buffers: dict[str, Array] = {}
    if layout.stacked:
      # Zeros that nobody wrote take no memory of their own until they are copied.
      self._buffers[PACKED] = _place(np.zeros(layout.shape, _dtype(layout.dtype)), sharding)

  def put(self, path: str, value: np.ndarray) -> bool:
    """Takes one weight, 'encoder/layers_3/block/fc1/kernel'. Returns whether it is a layer's.

    Raises:
      errors.UserError: if a layer is complete and does not fit the layout.
    """
    match = _LAYER.fullmatch(path)
    if match is None or match[1] is None:
      return False
    i = int(match[1])
    layer = self._waiting.setdefault(i, {})
    layer[match[2]] = value
    if len(layer) == len(self._layout.leaves):
      self.put_layer(i, self._waiting.pop(i))
    return True

  def put_layer(self, i: int, values: Mapping[str, np.ndarray]) -> None:
    """Takes all weights of layer i. Raises `UserError` if they do not fit the layout."""
    row = self._layout.pack(values)
    if self._layout.stacked:
      row = _place(row[None], self._sharding.with_memory_kind('device'))
      self._buffers[PACKED] = self._write(self._buffers[PACKED], row, np.uint32(i))
    else:
      self._buffers[f'{PACKED}_{i}'] = _place(row, self._sharding)
    self._missing.remove(i)

  def packed(self) -> dict[str, Array]:
    """The buffers by their paths in the tree. Raises `UserError` if a layer is not complete."""
    if self._missing:
      some = {i: sorted(self._waiting.get(i, {}))[:3] for i in sorted(self._missing)[:3]}
      raise errors.UserError(f'Weights of layers are missing; all that came of these: {some}.')
    return {f'{_ENCODER}{name}': self._buffers[name] for name in self._layout.names}


def _place(value: np.ndarray, sharding: jax.sharding.Sharding) -> Array:
  return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _write_row(buffer: Array, row: Array, i: Array) -> Array:
  zero = jnp.uint32(0)
  row = jax.device_put(row, jax.memory.Space.Host)
  return jax.lax.dynamic_update_slice(buffer, row, (i, zero, zero))


def is_hosted(path: str) -> bool:
  """Whether a leaf of the MAP head, by its path there, stays in the host's memory too, as it is.

  Its weight matrices are as large as a layer's, and needed when no layer is on the device.
  """
  return path.endswith('kernel')


def hosted(frozen: Params) -> list[str]:
  """Paths of a frozen tree that are in the host's memory; none unless its layers are packed."""
  flat, head = trees.flatten(frozen), 'backbone/map_head/'
  packed = [path for path in flat if _PACKED.fullmatch(path)]
  more = [path for path in flat if path.startswith(head) and is_hosted(path)]
  return packed + more if packed else []


def place_of(shardings: Mapping[str, Any]) -> Any:
  """Where the buffers live, of the shardings of a packed tree by path; None if they do not say."""
  return next((where for path, where in shardings.items() if _PACKED.fullmatch(path)), None)


def unpacked_shardings(frozen: Params, shardings: Params) -> dict[str, Any]:
  """Shardings of a packed tree -> those of the tree `frozen`, layers whole on every device."""
  where = trees.flatten(shardings)
  layers = place_of(where).with_memory_kind('device')
  return trees.unflatten({path: where.get(path, layers) for path in trees.flatten(frozen)})


def pack_tree(frozen: Params, layout: Layout, sharding: Any = None) -> dict[str, Any]:
  """A frozen tree on the device, its layers stacked or not -> the tree with them packed.

  Layers pass through the host one after the other; what was on the device stays there meanwhile.
  """
  packer, flat = Packer(layout, sharding), trees.flatten(frozen)
  for i in range(layout.depth):
    layer = {}
    for path, leaf in flat.items():
      match = _LAYER.fullmatch(path)
      if match is not None and match[1] in (None, str(i)):
        layer[match[2]] = np.asarray(leaf[i] if match[1] is None else leaf)
    packer.put_layer(i, layer)
  rest = {path: leaf for path, leaf in flat.items() if not _LAYER.fullmatch(path)}
  return trees.unflatten({**rest, **packer.packed()})


def _dtype(name: DType) -> np.dtype:
  return np.dtype(jnp.dtype(name))


def _bits(dtype: np.dtype) -> int:
  """Of one element as devices hold it; numpy gives each small integer a byte."""
  return 4 if dtype == ml_dtypes.int4 else 8 * dtype.itemsize


def _elements(leaf: Leaf, own: np.dtype) -> int:
  """Elements of a row that a weight takes."""
  return -(-math.prod(leaf.shape) * _bits(_dtype(leaf.dtype)) // _bits(own))


def _bytes_of(value: np.ndarray) -> np.ndarray:
  """The bytes of a weight as devices hold them, [bytes] uint8."""
  flat = np.ascontiguousarray(value).reshape(-1)
  if _bits(flat.dtype) == 8 * flat.dtype.itemsize:
    return flat.view(np.uint8)
  nibbles = flat.view(np.uint8) & 0xF
  nibbles = np.pad(nibbles, (0, nibbles.size % 2)).reshape(-1, 2)
  return nibbles[:, 0] | nibbles[:, 1] << 4
