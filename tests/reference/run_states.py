"""States of runs, small and without a run, and their checkpoints."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from losa_scenic.train_lib import checkpoints
from losa_scenic.train_lib.state import TrainState

IDENTITY = {'backbone': {'sha256': 'abc', 'spec': {'mean': (0.5, 0.5)}}, 'method': {'losa': {}}}


def state(step: int, seed: int = 0, width: int = 64) -> TrainState:
  """A state at that step; every step and seed has other numbers."""
  rng = np.random.default_rng(seed + step)
  trainable = {
    'a': {'kernel': jnp.asarray(rng.standard_normal((width, 64)), jnp.float32)},
    'b': jnp.asarray(rng.standard_normal(3), jnp.float32),
    'half': jnp.asarray(rng.standard_normal((2, 5)), jnp.bfloat16),
    'nothing': jnp.zeros((0, 4)),
  }
  made = TrainState.create(trainable, optax.adamw(0.1), jax.random.key(seed))
  opt_state = jax.tree.map(
    lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype) if a.ndim else a + step,
    made.opt_state,
  )
  return made.replace(global_step=jnp.int32(step), opt_state=opt_state)


def assert_same(one: TrainState, other: TrainState) -> None:
  """Same structure, shapes, dtypes and bits."""
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def opened(workdir: pathlib.Path, identity: dict = IDENTITY, **options) -> checkpoints.Checkpoints:
  """The checkpoints of a workdir."""
  return checkpoints.Checkpoints(workdir, identity, **options)


def save(workdir: pathlib.Path, *steps: int) -> None:
  """Saves these steps, the newest last, with notes {'sums': [0.1, step]}."""
  saver = opened(workdir)
  for step in steps:
    saver.save(state(step), {'sums': [0.1, step]})
  saver.close()


def names(workdir: pathlib.Path, kind: str = 'last') -> list[str]:
  """What lies in `<workdir>/checkpoints/<kind>`."""
  return sorted(folder.name for folder in (workdir / 'checkpoints' / kind).iterdir())
