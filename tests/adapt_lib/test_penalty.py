"""A method's penalty is part of the loss that training minimises, and of nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from losa_scenic.adapt_lib.method import Method, partition
from losa_scenic.adapt_lib.union import union
from losa_scenic.common_lib import trees
from losa_scenic.model_lib import presets
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.classification_model import ClassificationModel
from losa_scenic.train_lib import steps
from losa_scenic.train_lib.state import TrainState


def half_square(trainable):
  """Its gradient is the classifier's kernel itself."""
  return 0.5 * jnp.square(trainable['output_projection']['kernel']).sum()


def step_with(penalty, random_like, make_batch):
  """(parameters before, after a step of SGD with rate 1, metrics, metrics of evaluation)."""
  spec = presets.preset('test/8')
  model = Adapted(spec, Method(penalty=penalty), 5)
  trainable, frozen = random_like(partition(model.param_shapes(), model.method))
  classification = ClassificationModel(None, {'num_classes': 5})
  tx, batch = optax.sgd(1.0), make_batch(4)
  state = TrainState.create(jax.tree.map(jnp.asarray, trainable), tx, jax.random.key(0))
  of_model = {'flax_model': model, 'metrics_fn': classification.get_metrics_fn_jit()}
  step = functools.partial(
    steps.train_step, loss_fn=classification.loss_function, tx=tx, **of_model
  )
  after, metrics = jax.jit(step)(state, frozen, batch)
  evaluation, _ = steps.eval_step(state, frozen, batch, **of_model)
  return trees.flatten(trainable), trees.flatten(after.trainable), metrics, evaluation


def test_training_minimises_the_loss_with_the_penalty(random_like, make_batch):
  before, plain, metrics, evaluation = step_with(None, random_like, make_batch)
  _, ours, our_metrics, our_evaluation = step_with(half_square, random_like, make_batch)
  kernel = before['output_projection/kernel']
  # A step of rate 1 down the penalty's gradient takes the kernel away once more.
  name = 'output_projection/kernel'
  np.testing.assert_allclose(plain[name] - ours[name], kernel, rtol=1e-4, atol=1e-5)
  assert np.array_equal(plain['output_projection/bias'], ours['output_projection/bias'])
  more = our_metrics['loss'][0] - metrics['loss'][0]
  assert more == pytest.approx(0.5 * np.square(kernel).sum(), rel=1e-4)
  assert our_metrics['accuracy'] == metrics['accuracy']
  assert our_evaluation['loss'] == evaluation['loss'], 'evaluation leaves it out'


def test_a_union_adds_penalties_up():
  tree = {'output_projection': {'kernel': np.full((2, 3), 2.0, np.float32)}}
  one, two = Method(penalty=half_square), Method(penalty=lambda trainable: jnp.float32(5.0))
  assert union({'one': one, 'two': two}).penalty(tree) == 12 + 5
  assert union({'one': one, 'none': Method()}).penalty(tree) == 12
  assert union({'a': Method(), 'b': Method()}).penalty is None
