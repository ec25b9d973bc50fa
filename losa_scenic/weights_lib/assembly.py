"""Tensors of a public file put together from our parameters, by their places there."""

import collections
import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.model_lib.spec import BackboneSpec
from losa_scenic.weights_lib import spelling
from losa_scenic.weights_lib.spelling import Place
from losa_scenic.weights_lib.stored import DTYPES


@dataclasses.dataclass(frozen=True)
class Assembly:
  """A file to be: its tensors, each made when it is asked for.

  Attributes:
    spec: the backbone, with biases of 0 where the format has some and the backbone has none.
    params: the backbone's parameters.
    spelling: places of the parameters of `spec`.
    added: paths of biases of 0.
  """

  spec: BackboneSpec
  params: Mapping[str, Any]
  spelling: spelling.Spelling
  added: frozenset[str] = frozenset()

  @functools.cached_property
  def tensors(self) -> dict[str, list[tuple[str, Place]]]:
    """Tensor -> what it is made of."""
    found = collections.defaultdict(list)
    for path, place in self.spelling.places.items():
      found[place.name].append((path, place))
    return dict(found)

  def shape(self, name: str) -> tuple[int, ...]:
    """Shape of a tensor."""
    place = self.tensors[name][0][1]
    rows = (place.shape[0] * place.part[1], *place.shape[1:]) if place.shape else ()
    return rows if place.layer is None else (self.spec.depth, *rows)

  def tensor(self, name: str, dtype: np.dtype) -> np.ndarray:
    """A tensor. Raises `UserError` if its values do not fit the dtype, or contradict each other."""
    whole, filled = np.zeros(self.shape(name), dtype), set()
    for path, place in self.tensors[name]:
      value = spelling.as_stored(self._value(path), place, path, self.spelling.jax)
      with np.errstate(over='ignore'):
        value = value.astype(dtype)
      if not np.isfinite(value.astype(np.float32)).all():
        raise errors.UserError(f'{path} is not finite in {dtype.name}. Nothing is written.')
      i, n = place.part
      rows = slice(i * place.shape[0], (i + 1) * place.shape[0]) if n > 1 else ...
      at = (rows,) if place.layer is None else (place.layer, rows)
      if (place.layer, i) in filled and not np.array_equal(whole[at], value):
        raise errors.UserError(
          f'{name} is shared by all layers of the file that the backbone was converted from, but '
          f'{path} is no longer the same in all: write it without `like`.'
        )
      whole[at] = value
      filled.add((place.layer, i))
    return whole

  def _value(self, path: str) -> np.ndarray:
    """A parameter, with the positions that the file has no row for in the tokens themselves."""
    if path in self.added:
      return np.zeros(self.spelling.places[path].shape, np.float32)
    value = np.asarray(self.params[path])
    covered, prefix = self.spelling.covered, self.spec.prefix
    if self.spec.positions != 'learned' or covered >= prefix:
      return value
    if path == 'pos_embedding':
      return np.concatenate([value[:, :covered], value[:, prefix:]], axis=1)
    if path not in ('cls', 'registers'):
      return value
    rows = np.array(self.params['pos_embedding'][:, :prefix], np.float32)
    rows[:, :covered] = 0
    own = int(self.spec.class_token)
    rows = rows[:, :own] if path == 'cls' else rows[:, own:]
    return value.astype(np.float32) + rows if rows.any() else value


def write_safetensors(stream: BinaryIO, file: Assembly, dtype: np.dtype) -> None:
  """Writes a safetensors file, one tensor after the other. `dtype` is one of `DTYPES`."""
  code = DTYPES[dtype.name]
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}  # transformers looks for it.
  position = 0
  for name in file.tensors:
    size = int(np.prod(file.shape(name))) * dtype.itemsize
    offsets = [position, position + size]
    header[name] = {'dtype': code, 'shape': list(file.shape(name)), 'data_offsets': offsets}
    position += size
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)
  stream.write(len(text).to_bytes(8, 'little') + text)
  for name in file.tensors:
    stream.write(file.tensor(name, dtype).reshape(-1).view(np.uint8).data)
