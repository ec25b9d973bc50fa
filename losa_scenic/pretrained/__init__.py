"""Backbones that ship with the package (safetensors + JSON + model card)."""
