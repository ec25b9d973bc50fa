"""Backbones: one encoder with named sites, the models made of it, their presets and weights."""
