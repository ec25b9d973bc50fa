"""Which tensor of a file each parameter of ours is, by a family's table; and reading it as ours."""

import dataclasses
import difflib
import fnmatch
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.weights_lib.families import FAMILIES, REFUSED
from losa_scenic.weights_lib.family import Family
from losa_scenic.weights_lib.tensors import BFLOAT16, Tensor

Shape = tuple[int, ...]
_NORMS = ('norm', 'norm1', 'norm2', 'patch_norm', 'pre_norm', 'query_norm', 'key_norm')
_NORMS += ('attn_norm', 'mlp_norm')
_LEAVES = ('kernel', 'bias', 'scale', 'cls', 'registers', 'pos_embedding', 'probe')
_LEAVES += ('attn_scale', 'mlp_scale', 'relative_bias')
_FLOATS = (np.dtype('float16'), BFLOAT16, np.dtype('float32'), np.dtype('float64'))
_PART = re.compile(r'(.*)\[(\d)/(\d)\]')


@dataclasses.dataclass(frozen=True)
class Origin:
  """Where a parameter of ours stands.

  Attributes:
    name: the tensor, prefix included.
    part: (i, n): the i-th of n equal parts along its first axis.
    layer: the index along the first axis that comes before that, or None.
  """

  name: str
  part: tuple[int, int] = (0, 1)
  layer: int | None = None


@dataclasses.dataclass(frozen=True)
class Layout:
  """A file understood: its family, and an origin for each parameter.

  Attributes:
    family: what its names are like.
    prefix: what stands before every name of the encoder.
    origins: path of a parameter of ours, layers unrolled -> where it stands.
    left_out: the tensors that are no part of the encoder.
    depth: number of layers.
  """

  family: Family
  prefix: str
  origins: Mapping[str, Origin]
  left_out: tuple[str, ...]
  depth: int

  def name_of(self, path: str) -> str:
    """Name of a parameter in the file without prefix, or '' if the file has none."""
    origin = self.origins.get(path)
    return origin.name.removeprefix(self.prefix) if origin else ''

  def expected_name(self, path: str) -> str:
    """What the family calls a parameter that the file lacks, as in another layer if one has it."""
    table, start = self.family.model, self.prefix
    layer = re.match(r'encoder/layers_(\d+)/block/', path)
    if layer:
      table, start = self.family.block, self.prefix + self.family.layer.format(i=layer[1])
      path = path.removeprefix(layer[0])
      for i in range(self.depth):
        twin = self.origins.get(f'encoder/layers_{i}/block/{path}')
        if twin:
          return start + twin.name.removeprefix(self.prefix + self.family.layer.format(i=i))
    module, _, leaf = path.rpartition('/')
    if path in table or module not in table:
      return start + split(table[path][0])[0] if path in table else path
    return leaf_name(self.family, start + split(table[module][0])[0], leaf)


def find(tensors: Mapping[str, Tensor], prefix: str | None = None, family: str = 'auto') -> Layout:
  """Finds the family and the origin of every parameter.

  Args:
    tensors: a file's tensors by name.
    prefix: what stands before the encoder's names; found out when None. Other encoders of the file
      are left out then.
    family: name of the family, or 'auto'.

  Raises:
    errors.UserError: if no family or several fit, or a tensor has no place.
  """
  encoders = [(one, start) for one in FAMILIES for start in _prefixes(one, tensors)]
  found = [
    (one, start)
    for one, start in encoders
    if prefix in (None, start) and family in ('auto', one.name)
  ]
  if not found:
    raise errors.UserError(_no_family(tensors, prefix))
  if len(found) > 1:
    names = ', '.join(f"'{start}' ({one.name})" for one, start in found)
    raise errors.UserError(
      f'The file holds several encoders: {names}. Convert one of them: '
      'python -m losa_scenic.convert --from=... --to=... --prefix=...'
    )
  return _map(tensors, *found[0], [start for _, start in encoders])


def _prefixes(family: Family, names: Iterable[str]) -> list[str]:
  """Prefixes under which a file has a layer and a patch embedding of the family."""
  patch = leaf_name(family, family.model['patch/proj'][0], 'kernel')
  starts = (name[: -len(family.anchor)] for name in names if name.endswith(family.anchor))
  return [s for s in starts if (not s or s[-1] in './') and s + patch in names]


def _no_family(tensors: Mapping[str, Tensor], prefix: str | None) -> str:
  some = ', '.join(f'{name} {list(t.shape)}' for name, t in list(tensors.items())[:6])
  where = f" under the prefix '{prefix}'" if prefix else ''
  what = f'This is no ViT of a known family{where}: its {len(tensors)} tensors are {some} ...'
  for family in FAMILIES:
    for name in tensors:
      if name.endswith(family.anchor) and name[: -len(family.anchor)][-1:] in ('', '.', '/'):
        patch = leaf_name(family, family.model['patch/proj'][0], 'kernel')
        start = name.removesuffix(family.anchor)
        return (
          f'{what} {name} is as in {family.name}, but there is no patch embedding {start}{patch}.'
        )
  anchors = ', '.join(f'{family.anchor} ({family.name})' for family in FAMILIES)
  return f'{what} None of them is the first layer of one: {anchors}.'


def _map(
  tensors: Mapping[str, Tensor], family: Family, prefix: str, prefixes: Iterable[str]
) -> Layout:
  """The layout of the encoder under `prefix`, one of the `prefixes` of the file's encoders."""
  depth = _depth(tensors, family, prefix)
  origins = _origins(tensors, family, family.model, prefix, '', None)
  for i in range(depth):
    start = prefix + family.layer.format(i=i)
    layer = i if family.stacked else None
    table = {**family.block, **(family.packed if _packed(tensors, family, start) else {})}
    found = _origins(tensors, family, table, start, prefix, layer)
    origins |= {f'encoder/layers_{i}/block/{path}': origin for path, origin in found.items()}
  for origin in origins.values():
    if origin.layer is not None and tensors[origin.name].shape[:1] != (depth,):
      raise errors.UserError(
        f'{origin.name} {list(tensors[origin.name].shape)} does not hold {depth} layers.'
      )
  used = {origin.name for origin in origins.values()}
  rest = [name for name in tensors if name not in used]
  others = [start for start in prefixes if start != prefix]
  left_out = tuple(
    name
    for name in rest
    if _is_left_out(name, family, prefix) or _is_of_another(name, prefix, others)
  )
  unknown = sorted(set(rest) - set(left_out))
  if unknown:
    lines = [f'{name} {list(tensors[name].shape)}{_near(name, used)}' for name in unknown[:8]]
    more = f' ... and {len(unknown) - 8} more' if len(unknown) > 8 else ''
    raise errors.UserError(
      f"{len(unknown)} tensors have no place in a ViT of family '{family.name}' (prefix "
      f"'{prefix}'): {'; '.join(lines)}{more}.{_why(unknown, family, prefix)}"
    )
  return Layout(family, prefix, origins, left_out, depth)


def _near(name: str, known: Iterable[str]) -> str:
  near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
  return f' (nearest: {near[0]})' if near else ''


def _is_left_out(name: str, family: Family, prefix: str) -> bool:
  own = name.removeprefix(prefix)
  if any(fnmatch.fnmatchcase(own, pattern) for pattern in family.left_out):
    return True
  beside = (pattern[1:] for pattern in family.left_out if pattern.startswith('/'))
  return not _is_within(name, family, prefix) and any(fnmatch.fnmatchcase(name, p) for p in beside)


def _is_within(name: str, family: Family, prefix: str) -> bool:
  """Whether a name is the encoder's: without a prefix, if it begins as one of a table does."""
  if prefix:
    return name.startswith(prefix)
  tables = (split(entry)[0] for candidates in family.model.values() for entry in candidates)
  modules = {entry for entry in tables if not entry.startswith('/')}
  layers = family.layer.partition('{i}')[0]
  return name.startswith((layers, *(f'{m}{end}' for m in modules for end in './')))


def _is_of_another(name: str, prefix: str, others: Iterable[str]) -> bool:
  """Whether a name is of another encoder: of its possible prefixes, the longest counts."""
  own = len(prefix) if name.startswith(prefix) else -1
  return any(name.startswith(start) and len(start) > own for start in others)


def _why(unknown: Iterable[str], family: Family, prefix: str) -> str:
  """What is known of tensors without a place, as a sentence."""
  own = [name.removeprefix(prefix) for name in unknown]
  for pattern, why in REFUSED.get(family.name, {}).items():
    if fnmatch.filter(own, pattern):
      return f' It is a model of another kind: {why}.'
  return ''


def _depth(tensors: Mapping[str, Tensor], family: Family, prefix: str) -> int:
  if family.stacked:
    return tensors[prefix + family.anchor].shape[0]
  pattern = re.escape(prefix + family.layer).replace(r'\{i\}', r'(\d+)')
  layers = {int(match[1]) for name in tensors if (match := re.match(pattern, name))}
  if layers != set(range(len(layers))):
    raise errors.UserError(f'Layers are missing: the file has {sorted(layers)}.')
  return len(layers)


def _packed(tensors: Mapping[str, Tensor], family: Family, start: str) -> bool:
  """Whether the first matrix of the MLP is twice as tall as the second is wide."""
  if not family.packed:
    return False
  first, second = (tensors.get(f'{start}mlp.{name}.weight') for name in ('fc1', 'fc2'))
  return first is not None and second is not None and first.shape[0] == 2 * second.shape[1]


def _origins(
  tensors: Mapping[str, Tensor],
  family: Family,
  table: Mapping[str, tuple[str, ...]],
  start: str,
  root: str,
  layer: int | None,
) -> dict[str, Origin]:
  """Origins of the parameters of one table; `start` stands before a name, `root` before '/name'."""
  origins: dict[str, Origin] = {}
  # An entry for a leaf alone counts before that of its module.
  for ours, candidates in sorted(table.items(), key=lambda entry: _is_leaf(entry[0])):
    module = ours.rsplit('/', 1)[-1]
    leaves = ['scale' if module in _NORMS else 'kernel', 'bias']
    for candidate in candidates:
      name, part = split(candidate)
      name = root + name[1:] if name.startswith('/') else start + name
      if _is_leaf(ours):
        found = {ours: name}
      else:
        found = {f'{ours}/{leaf}': leaf_name(family, name, leaf) for leaf in leaves}
      found = {path: Origin(full, part, layer) for path, full in found.items() if full in tensors}
      if found:
        origins |= found
        break
  for path, mask in family.masked.items():
    if start + mask in tensors:
      origins.pop(path, None)
  return origins


def _is_leaf(ours: str) -> bool:
  return ours.rsplit('/', 1)[-1] in _LEAVES


def split(candidate: str) -> tuple[str, tuple[int, int]]:
  """A table's name and the part that it names: 'x[1/3]' -> ('x', (1, 3)), 'x' -> ('x', (0, 1))."""
  match = _PART.fullmatch(candidate)
  return (match[1], (int(match[2]), int(match[3]))) if match else (candidate, (0, 1))


def leaf_name(family: Family, name: str, leaf: str) -> str:
  """Name of the tensor that holds a leaf ('kernel', 'scale' or 'bias') of a module of that name."""
  if family.jax:
    return f'{name}/{leaf}'
  return f'{name}.bias' if leaf == 'bias' else f'{name}.weight'


def locate(
  tensor: Tensor, origin: Origin, path: str, shape: Shape, heads: int | None
) -> tuple[slice | int, ...]:
  """Where in a tensor a parameter is, checked without reading it.

  Args:
    tensor: the tensor that `origin` names.
    origin: which part of it.
    path: the parameter's path.
    shape: the shape that ours has.
    heads: number of heads, if the file is JAX's: kernels [in, ..., out], heads an axis; else None.

  Returns:
    An index for `Tensor.read`.

  Raises:
    errors.UserError: if the file's shape or dtype cannot be this parameter's.
  """
  if tensor.dtype not in _FLOATS:
    raise errors.UserError(
      f'{origin.name} ({path}) is stored as {tensor.dtype}; weights in '
      f'{", ".join(str(d) for d in _FLOATS)} are read, quantised ones are not.'
    )
  lead = () if origin.layer is None else (origin.layer,)
  own = tensor.shape[len(lead) :]
  i, n = origin.part
  if n > 1 and (not own or own[0] % n):
    raise errors.UserError(f'{origin.name} {list(own)} cannot be cut into {n} parts ({path}).')
  rows = own[0] // n if own else 0
  stored = (rows, *own[1:]) if n > 1 else own
  if not _fits(stored, shape, path, heads):
    raise errors.UserError(
      f'{origin.name} {list(tensor.shape)} does not fit {path} {list(shape)}'
      + (f' as part {i + 1} of {n}.' if n > 1 else '.')
    )
  return (*lead, slice(i * rows, (i + 1) * rows)) if n > 1 else lead


def read(tensor: Tensor, origin: Origin, path: str, shape: Shape, heads: int | None) -> np.ndarray:
  """Reads a parameter as ours: kernels [in, out], a patch kernel [rows, d], heads joined.

  Args and errors are those of `locate`.
  """
  value = tensor.read(locate(tensor, origin, path, shape, heads))
  if path.endswith('kernel') and heads is None:
    # [d, 3, (t,) p, p] of a convolution -> [(t,) p, p, 3, d]; [out, in] -> [in, out].
    value = value.transpose(*range(2, value.ndim), 1, 0)
  return np.ascontiguousarray(value).reshape(shape)


def _fits(stored: tuple[int, ...], shape: tuple[int, ...], path: str, heads: int | None) -> bool:
  kernel = path.endswith('kernel')
  if heads is None and kernel:  # [out, in], and of patches [out, 3, p, p] or [out, p p 3].
    return stored[:1] == shape[1:] and math.prod(stored[1:]) == shape[0]
  if heads is not None and path.endswith('proj/kernel'):
    return stored[-1:] == shape[1:] and math.prod(stored[:-1]) == shape[0]
  if heads is not None and re.search(r'/(query|key|value)/(kernel|bias)$', path):
    shape = (*shape[:-1], heads, shape[-1] // heads)
  elif heads is not None and path.endswith('out/kernel'):
    shape = (heads, shape[0] // heads, shape[1])
  return stored == shape if kernel else _plain(stored) == _plain(shape)


def _plain(shape: Shape) -> Shape:
  """A shape without axes of one: a class token is [d] here and [1 1 d] there."""
  return tuple(n for n in shape if n != 1)
