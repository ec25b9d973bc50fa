"""What timm's architectures have by name alone, and heads by the shape of published models."""

import re
from typing import Any

from losa_scenic.common_lib import errors

Fields = dict[str, Any]

# timm's architectures by name: all rows that match hold, the later ones before the earlier ones.
_ARCHITECTURES: tuple[tuple[str, Fields], ...] = (
  ('', {'activation': 'gelu_erf', 'norm_eps': 1e-6, 'rope': 'none', 'block_norm': 'pre'}),
  ('_tiny_', {'heads': 3}),
  ('_small_', {'heads': 6}),
  ('_base_', {'heads': 12}),
  ('_large_', {'heads': 16}),
  ('^aimv2_large', {'heads': 8}),
  ('_giantopt_', {'heads': 16}),
  ('_plus_(clip_)?2', {'heads': 14}),
  ('huge_plus.*dinov3', {'heads': 20}),
  ('_giant_.*radio', {'heads': 24}),
  ('_base_patch16_gap_', {'heads': 16}),
  ('^vit_.*_clip_', {'norm_eps': 1e-5}),
  ('^beit3_', {'norm_eps': 1e-5}),
  ('quickgelu', {'activation': 'quick_gelu'}),
  (
    'large_patch16_siglip.*_512|patch32_siglip|so400m_patch16_siglip|giantopt_patch16_siglip',
    {'activation': 'gelu_tanh'},
  ),
  ('^aimv2_', {'activation': 'silu', 'norm_eps': 1e-5}),
  ('giant_patch14.*(dinov2|tips)', {'activation': 'silu'}),
  (
    '^eva02_(tiny|small|base|large)|_rope_reg',
    {'rope': 'eva', 'rope_theta': 1e4, 'rope_grid': 16},
  ),
  ('^eva02_(tiny|small|base|large)', {'activation': 'silu'}),
  ('^eva02_enormous', {'block_norm': 'post'}),
  ('dinov3|lingbot', {'rope': 'dinov3', 'rope_theta': 100.0, 'norm_eps': 1e-5}),
  ('_plus_.*dinov3|7b.*dinov3|giant.*lingbot', {'activation': 'silu'}),
)
_UNKNOWN = re.compile('_pe_|_sapiens2|_rpn_|_18x2_|_xp_|pwee_|_rope_(mixed|ape|224)|naflex')

# Widths of published models whose heads have 64 channels.
_WIDTHS_OF_64 = (192, 256, 320, 384, 512, 576, 640, 768, 832, 896, 1024, 1280)
# (width, depth, hidden channels of the MLP, gated) -> heads, where a head has not 64 channels.
_HEADS: dict[tuple[int, int, int, bool], int | None] = {
  (1280, 32, 5120, False): 16,
  (1280, 32, 5120, True): None,  # 20 of DINOv3 H+, 16 of Sapiens 2.
  (1536, 40, 4096, True): 24,
  (1408, 40, 6144, False): 16,
  (1664, 48, 8192, False): 16,
  (1792, 56, 15360, False): 16,
  (1792, 64, 15360, False): 16,
  (1152, 27, 4304, False): 16,
  (1536, 40, 6144, False): None,  # 16 of SigLIP 2, 24 of RADIO.
  (1536, 48, 6144, False): 16,
  (1024, 24, 2816, True): 8,
  (1536, 24, 4096, True): 12,
  (2048, 24, 5632, True): 16,
  (3072, 24, 8192, True): 24,
  (3200, 45, 12800, False): 25,
  (3200, 48, 12800, False): 25,
  (4096, 40, 8192, True): 32,
}


def heads_of(width: int, depth: int, mlp: int, gated: bool) -> int | None:
  """Heads of a published geometry, or None if there is none of that shape, or several."""
  if (width, depth, mlp, gated) in _HEADS:
    return _HEADS[width, depth, mlp, gated]
  return width // 64 if width in _WIDTHS_OF_64 and depth >= 10 else None


def fields_of(name: str) -> Fields:
  """Fields of `BackboneSpec` that the architecture of that name sets.

  Raises:
    errors.UserError: for one whose blocks this encoder does not have.
  """
  if _UNKNOWN.search(name):
    raise errors.UserError(f"timm's architecture '{name}' has blocks that this encoder has not.")
  fields: Fields = {}
  for pattern, more in _ARCHITECTURES:
    if re.search(pattern, name):
      fields |= more
  return fields
