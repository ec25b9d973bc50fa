"""The table of named backbone variants.

A name is `<variant>/<patch>`: 'B/16', 'g/14', 'Ti/8'; or, for clips, `vivit-<variant>/<patch>x<t>`
with tubelets of t frames: 'vivit-g/14x2'.
"""

import dataclasses
import re
from typing import Any

from losa_scenic.common_lib import errors
from losa_scenic.model_lib.spec import BackboneSpec


@dataclasses.dataclass(frozen=True)
class _Variant:
  width: int
  depth: int
  mlp: int
  heads: int
  pool: str


# Source of the rows:
#   Ti: DeiT (Touvron et al. 2021, Table 1), also big_vision's 'Ti'.
#   S: DeiT, also big_vision's 'S'.        B, L, H: ViT (Dosovitskiy et al. 2021, Table 1).
#   g, G: Scaling Vision Transformers (Zhai et al. 2022, Table 2); the MLP is not 4 x width.
#   e: PaLI (Chen et al. 2022), geometry as in big_vision's 'e'; patch 14.
#   22B: Dehghani et al. 2023, Table 1; our blocks are in a row, theirs attend and compute the MLP
#        side by side, without biases of query, key and value; the size and the work are the same.
#   Mi: ours, small enough to train on two CPU cores.   test: ours, for tests only.
# Pooling: H, g, G, e, 22B carry a MAP head and no class token, as published; the others the token.
_VARIANTS = {
  'test': _Variant(32, 3, 64, 2, 'cls'),
  'Mi': _Variant(96, 6, 384, 3, 'cls'),
  'Ti': _Variant(192, 12, 768, 3, 'cls'),
  'S': _Variant(384, 12, 1536, 6, 'cls'),
  'B': _Variant(768, 12, 3072, 12, 'cls'),
  'L': _Variant(1024, 24, 4096, 16, 'cls'),
  'H': _Variant(1280, 32, 5120, 16, 'map'),
  'g': _Variant(1408, 40, 6144, 16, 'map'),
  'G': _Variant(1664, 48, 8192, 16, 'map'),
  'e': _Variant(1792, 56, 15360, 16, 'map'),
  '22B': _Variant(6144, 48, 24576, 48, 'map'),
}
PUBLISHED_PATCH = {
  'test': 8,
  'Mi': 8,
  'Ti': 16,
  'S': 16,
  'B': 16,
  'L': 16,
  'H': 14,
  'g': 14,
  'G': 14,
  'e': 14,
  '22B': 14,
}

_IMAGE_SIZE = {'test': 32, 'Mi': 64}  # the others: 224


_FRAMES = {'test': 4}  # the others: 32


def names() -> list[str]:
  """The presets at their published patch size, e.g. 'B/16'; any other patch size works too."""
  images = [f'{variant}/{patch}' for variant, patch in PUBLISHED_PATCH.items()]
  return images + [f'vivit-{name}x2' for name in images if _VARIANTS[name.split('/')[0]].depth > 6]


def preset(name: str, **changes: Any) -> BackboneSpec:
  """The spec of a named preset.

  Args:
    name: '<variant>/<patch>', e.g. 'B/16', or 'vivit-<variant>/<patch>x<tubelet>': clips of 32
      frames, no class token, MAP head (as in Table 2 of the LoSA paper).
    **changes: fields to change, e.g. image_size=64 or pool='gap'. Without an explicit
      `class_token`, it is kept exactly when the pooling is 'cls'.

  Raises:
    errors.UserError: for an unknown variant or field.
  """
  match = re.fullmatch(r'(?P<video>vivit-)?(\w+)/(\d+)(?(video)x(\d+))', name)
  if not match or match[2] not in _VARIANTS:
    raise errors.unknown('backbone', name, names())
  _, variant, patch, tubelet = match.groups()
  fields = dataclasses.asdict(_VARIANTS[variant])
  if tubelet:
    fields |= {'pool': 'map', 'frames': _FRAMES.get(variant, 32), 'tubelet': int(tubelet)}
  fields |= changes
  for key in changes:
    errors.one_of('backbone field', key, (f.name for f in dataclasses.fields(BackboneSpec)))
  fields.setdefault('class_token', fields['pool'].startswith('cls'))
  if variant in _IMAGE_SIZE:
    fields.setdefault('image_size', _IMAGE_SIZE[variant])
  return BackboneSpec(name=name, patch=int(patch), **fields)
