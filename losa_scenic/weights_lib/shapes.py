"""Fields of `BackboneSpec` that the names and shapes of a checkpoint's tensors say.

What layers have in common is asked of all of them, and sizes are what most of them have: so if one
tensor is missing or of another size, it is that one which does not fit, and not all the others.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping

from losa_scenic.common_lib import errors
from losa_scenic.model_lib.spec import CHOICES
from losa_scenic.weights_lib.evidence import Fields
from losa_scenic.weights_lib.families import TRANSFORMERS
from losa_scenic.weights_lib.mapping import Layout
from losa_scenic.weights_lib.tensors import Tensor

Shape = tuple[int, ...]
_FIRST = 'encoder/layers_0/block/'


@dataclasses.dataclass(frozen=True)
class Shapes:
  """What names and shapes say.

  Attributes:
    layout: what the tensors are.
    tensors: the tensors.
  """

  layout: Layout
  tensors: Mapping[str, Tensor]

  def fields(self) -> Fields:
    """The fields.

    Raises:
      errors.UserError: if what every ViT has is missing, or patches or positions are of a kind that
        is not known.
    """
    for leaf in ('norm1/scale', 'query/kernel', 'fc2/kernel'):
      if not self._has(leaf):
        raise errors.UserError(f'No layer has {self.layout.expected_name(_FIRST + leaf)}.')
    width = _most(shape[-1:] for leaf in ('norm1/scale', 'norm2/scale') for shape in self._of(leaf))
    fields: Fields = {
      'width': width,
      'depth': self.layout.depth,
      'mlp': self._mlp(),
      'class_token': 'cls' in self.layout.origins,
      'registers': self._registers(),
      'gated': self._has('gate/kernel'),
      'norm': 'layer' if self._has('norm1/bias') or self._has('norm2/bias') else 'rms',
      'final_norm': self._final_norm(),
      'patch_norm': self._has_norm('patch_norm'),
      'pre_norm': self._has_norm('pre_norm'),
      'attn_norm': self._has('attn_norm/scale') or self._has('attn_norm/bias'),
      'mlp_norm': self._has('mlp_norm/scale') or self._has('mlp_norm/bias'),
      'qk_norm': self._qk_norm(width),
      'layer_scale': self._has('attn_scale') or self._has('mlp_scale'),
      'patch_bias': 'patch/proj/bias' in self.layout.origins,
      'qkv_bias': self._qkv_bias(),
      'linear_bias': any(self._has(f'{leaf}/bias') for leaf in ('out', 'fc1', 'fc2')),
      'positions': 'learned' if 'pos_embedding' in self.layout.origins else 'none',
      'relative_positions': self._has('relative_bias'),
    }
    if fields['relative_positions']:
      fields['heads'] = _most(shape[-1:] for shape in self._of('relative_bias'))
    elif self.layout.family.jax:
      kernels = (f'{leaf}/kernel' for leaf in ('query', 'key', 'value'))
      fields['heads'] = _most(s[-2:-1] for leaf in kernels for s in self._of(leaf))
    return fields | self._patch()

  def side(self, prefix: int, likely: int, times: int = 1) -> int | None:
    """Patches per side that the positions are for, or None if there are none of a fixed number.

    Which of the leading tokens a position embedding covers is told by the patches being a square;
    should several be, the side that the files beside the weights give is `likely`.

    Args:
      prefix: number of tokens before the patches.
      likely: a side.
      times: number of squares, one after the other in time.

    Raises:
      errors.UserError: if the positions are of no square grid.
    """
    if 'pos_embedding' in self.layout.origins:
      name, shape = self._named('pos_embedding')
      rows = shape[-2] if len(shape) > 1 else 0
      patches = [rows - covered for covered in sorted({prefix, 1, 0}, reverse=True)]
      patches = [n // times for n in patches if n > 0 and not n % times]
      sides = [math.isqrt(n) for n in patches if math.isqrt(n) ** 2 == n]
      if sides:
        return likely if likely in sides else sides[0]
      raise errors.UserError(f'{name} {list(shape)} has positions of no square grid.')
    for shape in self._of('relative_bias'):
      rows = shape[-2] if len(shape) > 1 else 0
      for extra in (3, 0):
        side = (math.isqrt(max(rows - extra, 0)) + 1) // 2
        if (2 * side - 1) ** 2 == rows - extra:
          return side
      raise errors.UserError(f'A table of {rows} relative positions is of no square grid.')
    return None

  def _of(self, leaf: str) -> list[Shape]:
    """Shapes of a block's parameter in the layers that have it; of all parts of a tensor alone."""
    found = []
    for i in range(self.layout.depth):
      origin = self.layout.origins.get(f'encoder/layers_{i}/block/{leaf}')
      if origin:
        shape = self.tensors[origin.name].shape
        shape = shape[1:] if origin.layer is not None else shape
        parts = origin.part[1]
        found.append((shape[0] // parts, *shape[1:]) if parts > 1 and shape else shape)
    return found

  def _has(self, leaf: str) -> bool:
    return bool(self._of(leaf))

  def _has_norm(self, module: str) -> bool:
    return any(f'{module}/{leaf}' in self.layout.origins for leaf in ('scale', 'bias'))

  def _named(self, path: str) -> tuple[str, Shape]:
    """Name and shape of the tensor of a parameter that there is once."""
    name = self.layout.origins[path].name
    return name, self.tensors[name].shape

  def _mlp(self) -> int:
    jax = self.layout.family.jax
    inputs = (s[:1] if jax else s[-1:] for s in self._of('fc2/kernel'))
    outputs = (s[-1:] if jax else s[:1] for s in self._of('fc1/kernel'))
    return _most([*inputs, *outputs])

  def _registers(self) -> int:
    if 'registers' not in self.layout.origins:
      return 0
    name, shape = self._named('registers')
    if len(shape) < 2:
      raise errors.UserError(f'{name} {list(shape)} holds no tokens.')
    return shape[-2]

  def _patch(self) -> Fields:
    name, shape = self._named('patch/proj/kernel')
    if len(shape) == 2:  # SigLIP 2's linear layer on flattened patches.
      return {'patch': math.isqrt(shape[1] // 3), 'tubelet': 1}
    space = shape[:-2] if self.layout.family.jax else shape[2:]
    if len(space) not in (2, 3) or space[-1] != space[-2]:
      raise errors.UserError(f'{name} {list(shape)}: only square patches are known.')
    if len(space) == 2:
      return {'patch': space[-1], 'tubelet': 1}
    if self.layout.family is not TRANSFORMERS:
      raise errors.UserError(f'{name} {list(shape)} is of clips; of those only ViViT is read.')
    return {'patch': space[-1], 'tubelet': space[0]}

  def _final_norm(self) -> str:
    if not self._has_norm('norm'):
      return 'none'
    names = (self.layout.name_of(f'norm/{leaf}') for leaf in ('scale', 'bias'))
    module = next(filter(None, names)).rpartition('.')[0]
    return 'pooled' if module in self.layout.family.pooled_norms else 'tokens'

  def _qk_norm(self, width: int) -> str:
    sizes = [s[-1:] for leaf in ('query_norm', 'key_norm') for s in self._of(f'{leaf}/scale')]
    if not sizes:
      return 'none'
    return 'width' if _most(sizes) == width else 'head'

  def _qkv_bias(self) -> str:
    names = ('query', 'key', 'value')
    have = ''.join(n[0] for n in names if self._has(f'{n}/bias')) or 'none'
    if have not in CHOICES['qkv_bias']:
      lacking = [f'{n}/bias' for n in names if n[0] not in have]
      raise errors.UserError(
        f'No layer has {", ".join(self.layout.expected_name(_FIRST + leaf) for leaf in lacking)}.'
      )
    return have


def _most(sizes: Iterable[Shape]) -> int:
  """The most frequent of some sizes, each in a tuple that is empty if there is none."""
  counts = collections.Counter(size[0] for size in sizes if size)
  if not counts:
    raise errors.UserError('The tensors of the layers are single numbers.')
  return counts.most_common(1)[0][0]
