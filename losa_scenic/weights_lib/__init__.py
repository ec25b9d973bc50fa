"""Public checkpoint files turned into parameters of our models."""
