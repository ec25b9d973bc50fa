"""Backbone geometry: `BackboneSpec` and the table of named variants.

A name is `<variant>/<patch>`: 'B/16', 'g/14', 'Ti/8'; or, for clips, `vivit-<variant>/<patch>x<t>`
with tubelets of t frames: 'vivit-g/14x2'.
"""

import dataclasses
import re
from typing import Any

from losa_scenic.common_lib import errors

POOLS = ('cls', 'gap', 'map')
GELUS = ('tanh', 'erf')


@dataclasses.dataclass(frozen=True)
class BackboneSpec:
  """What a ViT's weights are; how it is executed (dtype, scan, remat) is not part of it.

  Attributes:
    name: preset or checkpoint name, for people.
    width: d, channels of the residual stream.
    depth: L, number of encoder blocks.
    mlp: hidden channels of a block's MLP.
    heads: attention heads; divides `width`.
    patch: side of a square patch in pixels.
    image_size: side of the square input in pixels; a multiple of `patch`.
    frames: frames of a clip, or 0 for images; a multiple of `tubelet`.
    tubelet: frames of a patch.
    pool: 'cls' (class token), 'gap' (mean over patch tokens) or 'map' (attention pooling).
    class_token: whether a class token is prepended before the position embedding.
    gelu: 'tanh' (the JAX checkpoints were trained with it) or 'erf'.
    norm_eps: LayerNorm epsilon.
    mean: per-channel mean of the input in [0, 1], subtracted first.
    std: per-channel divisor in [0, 1] units.
  """

  name: str
  width: int
  depth: int
  mlp: int
  heads: int
  patch: int
  image_size: int = 224
  frames: int = 0
  tubelet: int = 1
  pool: str = 'cls'
  class_token: bool = True
  gelu: str = 'tanh'
  norm_eps: float = 1e-6
  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  std: tuple[float, float, float] = (0.5, 0.5, 0.5)

  def __post_init__(self):
    errors.one_of('pooling', self.pool, POOLS)
    errors.one_of('gelu', self.gelu, GELUS)
    for field in ('width', 'depth', 'mlp', 'heads', 'patch', 'image_size', 'tubelet'):
      if getattr(self, field) < 1:
        raise errors.UserError(f'Backbone {field} must be at least 1, got {getattr(self, field)}.')
    if self.width % self.heads:
      raise errors.UserError(f'{self.heads} heads do not divide the width {self.width}.')
    if self.image_size % self.patch:
      raise errors.UserError(
        f'Image size {self.image_size} is not a multiple of the patch size {self.patch}.'
      )
    if self.frames < 0 or (self.frames or 1) % self.tubelet:
      raise errors.UserError(
        f'{self.frames} frames are not a multiple of the tubelet length {self.tubelet}.'
      )
    if self.pool == 'cls' and not self.class_token:
      raise errors.UserError("Pooling 'cls' needs class_token=True.")

  @property
  def grid(self) -> tuple[int, int, int]:
    """Token grid (t, h, w) of an input of `image_size`; t is 1 for images."""
    side = self.image_size // self.patch
    return ((self.frames or 1) // self.tubelet, side, side)

  @property
  def input_shape(self) -> tuple[int, ...]:
    """Shape of one input: [h w 3], or [t h w 3] of a clip."""
    image = (self.image_size, self.image_size, 3)
    return (self.frames, *image) if self.frames else image

  @property
  def prefix(self) -> int:
    """Leading tokens that are not on the grid."""
    return int(self.class_token)

  @property
  def tokens(self) -> int:
    """n, tokens the encoder sees, class token included."""
    t, h, w = self.grid
    return t * h * w + self.prefix

  def to_json(self) -> dict[str, Any]:
    """The spec as a JSON object; `from_json` reads it back."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, fields: dict[str, Any]) -> 'BackboneSpec':
    """Reads `to_json`'s object. Raises `UserError` for a missing or an unknown field."""
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key in fields:
      if key not in known:
        raise errors.unknown('backbone field', key, known)
    missing = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in fields]
    if missing:
      raise errors.UserError(f'The backbone description lacks: {", ".join(missing)}.')
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return cls(**values)


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
#   Mi: ours, small enough to train on two CPU cores.   test: ours, for tests only.
# Pooling: the paper's H, g, G, e carry a MAP head and no class token; the others a class token.
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
  fields.setdefault('class_token', fields['pool'] == 'cls')
  if variant in _IMAGE_SIZE:
    fields.setdefault('image_size', _IMAGE_SIZE[variant])
  return BackboneSpec(name=name, patch=int(patch), **fields)
