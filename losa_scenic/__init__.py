"""LoSA (low-rank side adaptation, CVPR 2024) and its rivals for vision transformers, in JAX."""

__version__ = '0.1.0'
