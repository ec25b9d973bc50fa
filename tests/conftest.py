"""Two fake CPU devices and quick compilation for all tests, and shared fixtures."""

import importlib.util
import os
import pathlib
import sys

# Before anything imports jax.
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '')
  + ' --xla_force_host_platform_device_count=2 --xla_cpu_use_fusion_emitters=false'
).strip()
# Nearly all time goes into compiling programs that run for milliseconds: halves the time of a run.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
# The processes of a run, and the next run, share what was compiled.
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR', str(pathlib.Path(__file__).parents[1] / '.pytest_cache' / 'jax')
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

# For the helpers in tests/reference: in pytest's import mode 'importlib' it is on no path.
sys.path.insert(0, str(pathlib.Path(__file__).parent))


_HAS_PLUGIN = importlib.util.find_spec('jax_plugins') and importlib.util.find_spec(
  'jax_plugins.xla_cuda12'
)


def pytest_runtest_setup(item: pytest.Item) -> None:
  """Skips what compiles for GPUs that are not there, where nothing can."""
  if item.get_closest_marker('plan') and not _HAS_PLUGIN:
    pytest.skip("JAX's CUDA plugin is not installed: pip install 'losa_scenic[plan]'")


@pytest.fixture(scope='module', autouse=True)
def _forget_compiled_programs() -> Iterator[None]:
  """Thousands of compiled programs take gigabytes, and no module uses another's."""
  yield
  jax.clear_caches()


@pytest.fixture(scope='session')
def random_like() -> Callable[..., Any]:
  """`fn(tree, seed=0, scale=0.2)`: normal float32 arrays with the tree's structure and shapes.

  No leaf is zero and nothing is at its initial value, so that every term of an equation counts.
  """

  def fill(tree: Any, seed: int = 0, scale: float = 0.2) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
      lambda leaf: (scale * rng.standard_normal(leaf.shape)).astype(np.float32), tree
    )

  return fill


@pytest.fixture(scope='session')
def make_batch() -> Callable[..., dict[str, np.ndarray]]:
  """`fn(size, image_size=32, num_classes=5, seed=0)`: normalised random images with labels."""

  def make(
    size: int, image_size: int = 32, num_classes: int = 5, seed: int = 0
  ) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
      'inputs': rng.standard_normal((size, image_size, image_size, 3)).astype(np.float32),
      'label': rng.integers(0, num_classes, size).astype(np.int32),
      'batch_mask': np.ones(size, np.float32),
    }

  return make
