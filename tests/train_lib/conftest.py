"""Tiny runs through the program's own entry point, in this process and in others."""

import contextlib
import io
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from losa_scenic import app
from losa_scenic.main import main

ROOT = pathlib.Path(__file__).parents[2]
TINY = (
  f'--config={ROOT / "configs" / "quickstart.py"}',
  '--config.dataset_name=digits',
  '--config.backbone=test/8',
  '--config.random_backbone=True',
  '--config.batch_size=16',
  '--config.eval_batch_size=100',
  '--config.num_training_steps=4',
  '--config.lr_configs.warmup_steps=2',
)


@pytest.fixture(scope='session')
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Compiled programs, shared by this process and those that tests start."""
  return tmp_path_factory.mktemp('compilation_cache')


@pytest.fixture(scope='session', autouse=True)
def _warm_compilation(cache_dir: pathlib.Path) -> Iterator[None]:
  before = {
    name: getattr(jax.config, name)
    for name in (
      'jax_compilation_cache_dir',
      'jax_persistent_cache_min_compile_time_secs',
      'jax_persistent_cache_min_entry_size_bytes',
    )
  }
  for name, value in zip(before, (str(cache_dir), 0, -1), strict=True):
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture(scope='session')
def tiny() -> tuple[str, ...]:
  """Command line of a run that takes seconds."""
  return TINY


@pytest.fixture(scope='session')
def cli() -> Callable[..., tuple[int, str]]:
  """`fn(*overrides, workdir)` runs the tiny command here: (exit status, all that was printed)."""

  def run(*overrides: str, workdir: pathlib.Path) -> tuple[int, str]:
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
      try:
        app.run(main, ['main', *TINY, *overrides, f'--workdir={workdir}'])
        status = 0
      except SystemExit as e:
        status = e.code
    return status, printed.getvalue()

  return run


@pytest.fixture(scope='session')
def spawn(cache_dir: pathlib.Path) -> Callable[..., subprocess.Popen]:
  """`fn(*overrides, workdir)` starts the tiny command in a process of its own."""

  def start(*overrides: str, workdir: pathlib.Path, cached: bool = True) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(('JAX_', 'XLA_'))}
    environment |= {
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': '--xla_force_host_platform_device_count=2',
      'PYTHONPATH': str(ROOT),
    }
    if cached:
      environment |= {
        'JAX_COMPILATION_CACHE_DIR': str(cache_dir),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
      }
    return subprocess.Popen(
      [sys.executable, '-m', 'losa_scenic.main', *TINY, *overrides, f'--workdir={workdir}'],
      env=environment,
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  return start
