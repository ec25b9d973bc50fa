"""`BackboneSpec`: what a ViT's weights are, in fields that the one encoder reads."""

import dataclasses
from typing import Any, get_origin, get_type_hints

from losa_scenic.common_lib import errors
from losa_scenic.common_lib.activations import ACTIVATIONS

# Field -> the values it can have.
CHOICES: dict[str, tuple[str, ...]] = {
  'pool': ('cls', 'cls_dist', 'gap', 'map'),
  'activation': tuple(name for name in ACTIVATIONS if name != 'none'),
  'norm': ('layer', 'rms'),
  'block_norm': ('pre', 'post'),
  'final_norm': ('tokens', 'pooled', 'none'),
  'positions': ('learned', 'none'),
  'rope': ('none', 'eva', 'dinov3'),
  'qkv_bias': ('qkv', 'qv', 'none'),
  'qk_norm': ('none', 'head', 'width'),
  'interpolation': ('nearest', 'bilinear', 'bicubic', 'lanczos', 'box', 'hamming'),
}
_AT_LEAST_ONE = ('width', 'depth', 'mlp', 'heads', 'patch', 'image_size', 'tubelet')


@dataclasses.dataclass(frozen=True)
class BackboneSpec:
  """What a ViT's weights are; how it is executed (dtype, scan, remat) is not part of it.

  Fields after `name` are what a loader reads off a checkpoint. The defaults are the ViT of
  Dosovitskiy et al. 2021.

  Attributes:
    name: preset or checkpoint name, for people.
    width: d, channels of the residual stream.
    depth: L, number of encoder blocks.
    mlp: hidden channels of a block's MLP; of a gated one, of each of its two halves.
    heads: attention heads; divides `width`.
    patch: side of a square patch in pixels.
    image_size: side of the square input in pixels; a multiple of `patch`.
    frames: frames of a clip, or 0 for images; a multiple of `tubelet`.
    tubelet: frames of a patch.
    factorised: tokens of a clip attend only to those of their own tubelet index, as if each were an
      image with its own class token; the mean of the features over time is the clip's.
    pool: 'cls' (class token), 'cls_dist' (mean of the class token and the token after it: DeiT's
      distillation token), 'gap' (mean over patch tokens) or 'map' (attention pooling).
    class_token: whether a class token is prepended before the position embedding.
    registers: further learned tokens between the class token and the patches.
    activation: of the MLP, one of `activations.ACTIVATIONS`; the JAX checkpoints were trained with
      'gelu_tanh', PyTorch's mostly with 'gelu_erf'.
    gated: the MLP is fc2(act(gate(u)) * fc1(u)) (SwiGLU and its kin).
    norm: 'layer' (LayerNorm) or 'rms' (RMSNorm: no mean, no bias).
    norm_eps: epsilon of all norms.
    block_norm: 'pre', x + f(norm(x)), or 'post', x + norm(f(x)) (EVA-02-E).
    final_norm: 'tokens', 'pooled' (after pooling: BEiT's fc_norm), or 'none'.
    patch_norm: a norm of the patch embedding (AIMv2).
    pre_norm: a norm between the position embedding and the first block (CLIP).
    attn_norm: a norm of the attention's output before `out` (EVA-02).
    mlp_norm: a norm of the MLP's hidden units before `fc2` (EVA-02).
    qk_norm: a norm of queries and keys: 'head' (over the channels of each head), 'width' (over all
      channels: InternViT), or 'none'.
    layer_scale: each branch of a block ends in a learned factor per channel (CaiT, DINOv2).
    patch_bias: whether the patch embedding has a bias.
    qkv_bias: which of query, key and value have a bias: 'qkv', 'qv' or 'none'.
    linear_bias: whether `out` and the MLP's linears have one.
    positions: 'learned' (added to all tokens before the first block) or 'none'.
    rope: rotary position embedding of queries and keys at grid tokens: 'none', 'eva' or 'dinov3';
      see `positions`.
    rope_theta: its base.
    rope_grid: side of the grid that 'eva' coordinates are scaled to (the pretraining grid).
    relative_positions: each layer adds a learned bias per offset and head to the attention scores
      (BEiT).
    mean: per-channel mean of the input in [0, 1], subtracted first.
    std: per-channel divisor in [0, 1] units.
    interpolation: how the data pipeline resizes images, as in pretraining.
    position_resize: how the position embedding is resampled to another input size; one of
      `weights_lib.resize.METHODS`.
    inflation: how the patch kernel of an image checkpoint becomes that of tubelets, where `frames`
      makes a clip backbone of one; of `weights_lib.inflate.METHODS`.
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
  factorised: bool = False
  pool: str = 'cls'
  class_token: bool = True
  registers: int = 0
  activation: str = 'gelu_tanh'
  gated: bool = False
  norm: str = 'layer'
  norm_eps: float = 1e-6
  block_norm: str = 'pre'
  final_norm: str = 'tokens'
  patch_norm: bool = False
  pre_norm: bool = False
  attn_norm: bool = False
  mlp_norm: bool = False
  qk_norm: str = 'none'
  layer_scale: bool = False
  patch_bias: bool = True
  qkv_bias: str = 'qkv'
  linear_bias: bool = True
  positions: str = 'learned'
  rope: str = 'none'
  rope_theta: float = 100.0
  rope_grid: int = 16
  relative_positions: bool = False
  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  std: tuple[float, float, float] = (0.5, 0.5, 0.5)
  interpolation: str = 'bicubic'
  position_resize: str = 'bicubic_antialias'
  inflation: str = 'central_frame'

  def __post_init__(self):
    for field, allowed in CHOICES.items():
      errors.one_of(f'backbone {field}', getattr(self, field), allowed)
    for field in _AT_LEAST_ONE:
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
    if self.pool.startswith('cls') and not self.class_token:
      raise errors.UserError(f"Pooling '{self.pool}' needs class_token=True.")
    if self.registers < 0:
      raise errors.UserError(f'Backbone registers must be at least 0, got {self.registers}.')
    if self.pool == 'cls_dist' and not self.registers:
      raise errors.UserError("Pooling 'cls_dist' needs a register: the distillation token.")
    for field in ('norm_eps', 'rope_theta', 'rope_grid'):
      if not getattr(self, field) > 0:
        raise errors.UserError(f'Backbone {field} must be above 0, got {getattr(self, field)}.')
    if self.rope != 'none' and (self.width // self.heads) % 4:
      raise errors.UserError(
        f'Rotary positions need heads of a multiple of 4 channels, not {self.width // self.heads}.'
      )
    if len(self.mean) != 3 or len(self.std) != 3 or not min(self.std) > 0:
      raise errors.UserError(
        f'Backbone mean and std must be three numbers each, std above 0: {self.mean}, {self.std}.'
      )
    if self.factorised and not self.frames:
      raise errors.UserError('factorised=True is for clips: it needs frames.')
    in_space = self.rope != 'none' or self.relative_positions
    if self.frames and in_space and not self.factorised:
      raise errors.UserError(
        'Rotary and relative positions are for images, not for clips, unless factorised=True.'
      )
    if self.relative_positions and self.registers:
      raise errors.UserError('Relative positions know no register tokens.')

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
    return int(self.class_token) + self.registers

  @property
  def sequences(self) -> int:
    """In how many sequences, one after the other in time, the encoder sees one input."""
    return self.grid[0] if self.factorised else 1

  @property
  def sequence(self) -> int:
    """Tokens of one of those sequences: class token, registers, patches."""
    t, h, w = self.grid
    return t * h * w // self.sequences + self.prefix

  @property
  def tokens(self) -> int:
    """n, tokens the encoder sees of one input."""
    return self.sequences * self.sequence

  def has_bias(self, name: str) -> bool:
    """Whether a block's linear layer of that name has a bias."""
    if name in ('query', 'key', 'value'):
      return name[0] in self.qkv_bias.replace('none', '')
    return self.linear_bias

  @property
  def gelu(self) -> str:
    """The GELU, 'tanh' or 'erf', of networks beside the backbone."""
    return 'tanh' if self.activation == 'gelu_tanh' else 'erf'

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


def field_types() -> dict[str, type]:
  """{field of `BackboneSpec`: int, float, str, bool or tuple}."""
  hints = get_type_hints(BackboneSpec)
  return {name: get_origin(hint) or hint for name, hint in hints.items()}
