"""The tiny run of the tests of training, here too."""

from train_lib.conftest import _warm_compilation, cache_dir, cli, tiny  # noqa: F401
