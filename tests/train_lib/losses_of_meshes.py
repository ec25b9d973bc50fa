"""A program of its own: losses of a few steps on a mesh, in one process or as one of several.

`python losses_of_meshes.py '{"runs": [...], "address": ..., "count": ..., "index": ...}'`; each run
is {"method", "backbone", "mesh"[, "steps"]}. Prints one JSON line: a list of what `losses` returns.
"""

import json
import sys

import jax
import numpy as np

from losa_scenic.common_lib import trees
from losa_scenic.dataset_lib.dataset_utils import Dataset
from losa_scenic.model_lib.classification_model import ClassificationModel
from losa_scenic.train_lib import program, run_config, sharding

BATCH = 16
META = {'num_classes': 5, 'num_train_examples': 64, 'input_shape': (-1, 32, 32, 3)}


def build(method, backbone, mesh, steps=6):
  """(program, first state) of a tiny model."""
  config = run_config.default_config()
  config.backbone, config.random_backbone, config.method = backbone, True, method
  config.mesh.update(mesh)
  config.layer_loop = 'scan'  # A loop that is chosen by the mesh has other random weights.
  config.optimizer, config.lr_configs.base_learning_rate = 'momentum', 0.05
  config.batch_size, config.num_training_steps = BATCH, steps
  return program.build_program(
    rng=jax.random.key(0),
    config=run_config.resolve(config),
    model_cls=ClassificationModel,
    dataset=Dataset(meta_data=META),
  )


def batch(seed):
  """This process's part of a batch."""
  rng = np.random.default_rng(seed)
  whole = {
    'inputs': rng.integers(0, 256, (BATCH, 32, 32, 3)).astype(np.uint8),
    'label': rng.integers(0, 5, BATCH).astype(np.int32),
    'batch_mask': np.ones(BATCH, np.float32),
  }
  own = slice(*(BATCH * (jax.process_index() + i) // jax.process_count() for i in (0, 1)))
  return {name: value[own] for name, value in whole.items()}


def losses(made, state):
  """{'losses': of training steps and a last one of evaluation, 'frozen': digest, 'splits': ...}."""
  values = []
  for step in range(made.total_steps):
    state, metrics = made.train_step(state, made.frozen, sharding.put(batch(step), made.mesh))
    values.append(float(metrics['loss'][0]))
  metrics, predictions = made.eval_step(state, made.frozen, sharding.put(batch(99), made.mesh))
  assert np.asarray(predictions).shape == (BATCH,)
  leaves = jax.tree.leaves(made.frozen)
  return {
    'losses': [*values, float(metrics['loss'][0]) / BATCH],
    'frozen': trees.digest(sharding.fetch(made.frozen)),
    'splits': sum(not leaf.is_fully_replicated for leaf in leaves),
  }


if __name__ == '__main__':
  asked = json.loads(sys.argv[1])
  if asked.get('count', 1) > 1:
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(asked['address'], asked['count'], asked['index'])
  print(json.dumps([losses(*build(**run)) for run in asked['runs']]), flush=True)
