"""A run's state as flat tables of arrays on the host, which is what a checkpoint holds."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from losa_scenic.common_lib import trees
from losa_scenic.train_lib import sharding
from losa_scenic.train_lib.state import TrainState


def describe(state: TrainState) -> dict[str, list]:
  """{path: [shape, dtype name]} of all leaves, arrays or shapes, e.g. 'trainable/head/kernel'."""
  return trees.describe(_to_tree(state))


def to_host(state: TrainState) -> dict[str, np.ndarray]:
  """Copies in C order of all leaves by path; each must be whole on this process's devices."""
  flat = trees.flatten(_to_tree(state))
  for leaf in flat.values():
    leaf.copy_to_host_async()
  # Copies: on a CPU np.asarray is a view of the buffer, which the next step writes into.
  return {path: np.array(leaf, order='C') for path, leaf in flat.items()}


def from_host(arrays: Mapping[str, np.ndarray], like: TrainState) -> TrainState:
  """The state of these arrays by path, with the structure and the shardings of `like`."""
  pairs, structure = jax.tree_util.tree_flatten_with_path(_to_tree(like))
  tree = jax.tree.unflatten(
    structure,
    [
      sharding.place(arrays['/'.join(key.key for key in path)], leaf.sharding)
      for path, leaf in pairs
    ],
  )
  leaves = [tree['opt_state'][key] for key in sorted(tree['opt_state'])]
  opt_state = jax.tree.unflatten(jax.tree.structure(like.opt_state), leaves)
  return TrainState(**tree | {'opt_state': opt_state})


def _to_tree(state: TrainState) -> dict[str, Any]:
  # Names in optax's states are its own business: their leaves are numbered.
  tree = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
  leaves = jax.tree.leaves(state.opt_state)
  return tree | {'opt_state': {f'{i:04}': leaf for i, leaf in enumerate(leaves)}}
