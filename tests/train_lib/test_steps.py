"""The train step mixes labels as the images of a batch were mixed, and only those."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from losa_scenic.adapt_lib.method import combine
from losa_scenic.dataset_lib import datasets
from losa_scenic.model_lib.classification_model import ClassificationModel
from losa_scenic.train_lib import run_config, steps
from losa_scenic.train_lib.state import TrainState

CLASSES, SIZE = 10, 8


def test_labels_are_mixed_by_hand():
  batch = {
    'inputs': jnp.zeros((3, 2, 2, 3)),
    'label': jnp.array([0, 2, 1]),
    'partner_label': jnp.array([1, 2, 3]),
    'label_share': jnp.array([0.25, 0.6, 1.0], jnp.float32),
    'batch_mask': jnp.ones(3),
  }
  mixed = steps.with_mixed_labels(batch, 4)
  expected = [[0.25, 0.75, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0]]
  np.testing.assert_allclose(mixed['label'], expected, atol=1e-7)
  assert mixed['label'].dtype == jnp.float32
  assert batch['label'].shape == (3,)  # What was given is not changed.
  for key in ('inputs', 'batch_mask'):
    assert mixed[key] is batch[key]


def test_what_is_not_mixed_stays_as_it_is():
  batch = {'inputs': jnp.zeros((3, 2, 2, 3)), 'label': jnp.array([0, 2, 1])}
  assert steps.with_mixed_labels(batch, 4) is batch


def made_step(method: str, **options):
  """(compiled step, its first state, frozen parameters, logits of a batch at that state)."""
  config = run_config.default_config()
  config.backbone, config.random_backbone, config.method = 'test/8', True, method
  config.lr_configs.base_learning_rate, config.num_training_steps = 0.1, 1
  config.label_smoothing = 0.1
  model = ClassificationModel(run_config.resolve(config), {'num_classes': CLASSES})
  trainable, frozen = model.init_params(jax.random.key(0))
  rng = np.random.default_rng(0)
  trainable = jax.tree.map(
    lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), trainable
  )
  tx = optax.sgd(0.1)
  compiled = functools.partial(
    steps.train_step,
    flax_model=model.flax_model,
    loss_fn=model.loss_function,
    metrics_fn=model.get_metrics_fn_jit('train'),
    tx=tx,
    **options,
  )
  variables = {'params': combine(trainable, frozen)}
  logits = functools.partial(model.flax_model.apply, variables, train=False)
  return jax.jit(compiled), TrainState.create(trainable, tx, jax.random.key(1)), frozen, logits


@pytest.fixture(scope='module')
def step():
  return made_step('linear')


@pytest.fixture(scope='module')
def mixed() -> dict[str, np.ndarray]:
  """A batch as the data set makes it."""
  dataset = datasets.build_dataset(
    'digits',
    batch_size=SIZE,
    eval_batch_size=SIZE,
    image_size=32,
    augment={'mixup_alpha': 1.0, 'flip': True},
  )
  return dataset.train_ds[0]


def test_losses_are_those_of_the_batch_mixed_by_hand(step, mixed):
  compiled, state, frozen, logits = step
  probabilities = np.zeros((SIZE, CLASSES), np.float32)
  for i in range(SIZE):
    probabilities[i, mixed['label'][i]] += mixed['label_share'][i]
    probabilities[i, mixed['partner_label'][i]] += 1 - mixed['label_share'][i]
  assert 0.01 < mixed['label_share'].min() < 0.99
  by_hand = {k: mixed[k] for k in ('inputs', 'batch_mask')} | {'label': probabilities}
  (one, metrics), (other, expected) = (compiled(state, frozen, batch) for batch in (mixed, by_hand))
  for name in expected:
    np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, err_msg=name)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one.trainable, other.trainable
  )
  # The loss itself: cross-entropy with smoothed probabilities.
  out = np.asarray(logits(mixed['inputs']), np.float64)
  log_probabilities = out - np.log(np.exp(out).sum(1, keepdims=True))
  losses = -((0.9 * probabilities + 0.1 / CLASSES) * log_probabilities).sum(1)
  assert float(metrics['loss'][0]) == pytest.approx(losses.mean(), rel=1e-4)


def test_whole_shares_are_the_labels_themselves(step, mixed):
  compiled, state, frozen, _ = step
  whole = mixed | {'label_share': np.ones(SIZE, np.float32)}
  plain = {key: mixed[key] for key in ('inputs', 'label', 'batch_mask', 'index')}
  swapped = mixed | {
    'label': mixed['partner_label'],
    'partner_label': mixed['label'],
    'label_share': np.zeros(SIZE, np.float32),
  }
  losses = [float(compiled(state, frozen, b)[1]['loss'][0]) for b in (plain, whole, swapped, mixed)]
  assert losses[0] == pytest.approx(losses[1], rel=1e-6)
  assert losses[0] == pytest.approx(losses[2], rel=1e-6)
  assert abs(losses[0] - losses[3]) > 0.01


@pytest.mark.parametrize('method', ['losa', 'bitfit'])
@pytest.mark.parametrize('parts', [2, 4])
def test_a_batch_in_parts_is_the_same_step(method, parts, mixed):
  # Masked examples make some parts lighter than others, and one empty.
  batch = mixed | {'batch_mask': np.array([1, 1, 0, 1, 0, 1, 0, 1], np.float32)}
  whole, state, frozen, _ = made_step(method)
  in_parts, *_ = made_step(method, accumulate=parts)
  want, want_metrics = whole(state, frozen, batch)
  have, metrics = in_parts(state, frozen, batch)
  # The gradient of alpha is a sum of large terms of both signs, here added up in another order.
  for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(have), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6)
  assert want_metrics.keys() == metrics.keys()
  for name, (value, weight) in want_metrics.items():
    np.testing.assert_allclose(metrics[name][0], value, rtol=1e-5, err_msg=name)
    assert metrics[name][1] == weight, name


def test_a_step_that_is_not_finite_moves_only_the_step(mixed):
  step, state, frozen, _ = made_step('linear', max_bad_steps=2)
  bad = mixed | {'inputs': np.full(mixed['inputs'].shape, np.nan, np.float32)}
  after, metrics = step(state, frozen, bad)
  assert (after.global_step, after.bad_steps) == (1, 1)
  assert metrics['bad_steps'][0] == 1 and np.isnan(metrics['loss'][0])
  for a, b in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(after.trainable), strict=True):
    np.testing.assert_array_equal(a, b)
  good, metrics = step(after, frozen, mixed)
  assert (good.global_step, good.bad_steps, metrics['bad_steps'][0]) == (2, 0, 0)
  # After as many as are allowed nothing moves any more, good or bad.
  halted, _ = step(after, frozen, bad)
  assert (halted.global_step, halted.bad_steps) == (2, 2)
  still, metrics = step(halted, frozen, mixed)
  assert (still.global_step, still.bad_steps, metrics['bad_steps'][0]) == (2, 2, 2)
  for a, b in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(still.trainable), strict=True):
    np.testing.assert_array_equal(a, b)
