"""Measurement: parameter counts, FLOPs, sweeps and result tables."""
