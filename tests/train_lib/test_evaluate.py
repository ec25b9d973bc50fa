"""Evaluation counts every image once, whatever the batch size; the picture shows predictions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from losa_scenic.adapt_lib.method import combine
from losa_scenic.dataset_lib import datasets, digits
from losa_scenic.model_lib.classification_model import ClassificationModel
from losa_scenic.train_lib import evaluate, metrics, program, run_config
from losa_scenic.train_lib.writers import MultiWriter

SIDE, CLASSES = 32, 10


def settings(eval_batch_size: int):
  config = run_config.default_config()
  config.backbone, config.random_backbone, config.method = 'test/8', True, 'linear'
  config.lr_configs.base_learning_rate = 0.1
  config.num_training_steps = 1
  config.eval_batch_size = eval_batch_size
  return run_config.resolve(config)


class Notes(MultiWriter):
  """Keeps what it is given."""

  def __init__(self):
    super().__init__()
    self.scalars, self.images = {}, {}

  def write_scalars(self, step, scalars):
    self.scalars |= {(step, name): value for name, value in scalars.items()}

  def write_images(self, step, images):
    self.images |= images


def evaluated(eval_batch_size: int, metric: str = 'accuracy'):
  """(values, writer, program, state) of an untrained but not constant classifier."""
  config = settings(eval_batch_size)
  dataset = datasets.build_dataset(
    'digits',
    batch_size=64,
    eval_batch_size=eval_batch_size,
    image_size=SIDE,
    dataset_configs={'metric': metric},
  )
  made, state = program.build_program(
    rng=jax.random.key(0), config=config, model_cls=ClassificationModel, dataset=dataset
  )
  rng = np.random.default_rng(0)
  trainable = jax.tree.map(
    lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), state.trainable
  )
  state, writer = state.replace(trainable=trainable), Notes()
  return evaluate.evaluate(made, state, dataset, 'test', 7, writer), writer, made, state


@pytest.fixture(scope='module')
def by_hand() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(labels, predictions, losses) of all test images, in one plain pass without padding."""
  _, _, made, state = evaluated(64)
  images, labels = digits.splits(image_size=SIDE).test.fetch(np.arange(797))
  variables = {'params': combine(jax.device_get(state.trainable), jax.device_get(made.frozen))}
  logits = np.asarray(made.model.flax_model.apply(variables, images, train=False), np.float64)
  shifted = logits - logits.max(1, keepdims=True)
  log_probabilities = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
  return labels, logits.argmax(1), -log_probabilities[np.arange(797), labels]


# 797 test images: none of these divides them. The last is more than there are.
@pytest.mark.parametrize('batch_size', [14, 64, 1000])
def test_every_image_counts_once(batch_size, by_hand):
  labels, predictions, losses = by_hand
  values, writer, _, _ = evaluated(batch_size)
  right = int((labels == predictions).sum())
  assert 0 < right < 797
  assert values['test_accuracy'] == right / 797
  assert values['test_loss'] == pytest.approx(losses.mean(), rel=1e-4)
  assert writer.scalars == {(7, name): value for name, value in values.items()}


def test_per_class_metric(by_hand):
  labels, predictions, _ = by_hand
  values, _, _, _ = evaluated(64, metric='per_class')
  shares = [(predictions[labels == c] == c).mean() for c in range(CLASSES)]
  assert values['test_accuracy'] == pytest.approx(np.mean(shares), rel=1e-6)
  assert values['test_overall_accuracy'] == pytest.approx((labels == predictions).mean())
  assert values['test_accuracy'] != values['test_overall_accuracy']


def test_the_picture_is_written(by_hand):
  picture = evaluated(1000)[1].images['test_predictions']
  assert picture.shape == (1, 4 * 158, 6 * 128, 3)
  small = evaluated(2)[1].images['test_predictions']
  assert small.shape == (1, 158, 6 * 128, 3)


def test_sums_over_batches_and_absent_classes():
  parts = [
    {'a': (np.float32(1), np.float32(2)), 'v': (np.array([1.0, 0, 0]), np.array([2.0, 0, 1]))},
    {'a': (np.float32(2), np.float32(4)), 'v': (np.array([1.0, 0, 1]), np.array([2.0, 0, 1]))},
  ]
  values = metrics.normalize(metrics.accumulate(parts))
  assert values == {'a': 0.5, 'v': 0.5}  # The class in the middle never occurs.


@pytest.mark.parametrize('dtype', [np.uint8, np.float32])
def test_right_is_green_and_wrong_is_red(dtype):
  images = np.full((3, 8, 8, 3), 128, np.uint8)
  if dtype == np.float32:
    images = (images / 127.5 - 1).astype(np.float32)
  names = ['a', 'b', 'a name that does not fit into a cell']
  picture = evaluate.prediction_grid(
    images, np.array([0, 1, 2]), np.array([0, 2, 1]), names, columns=2, cell=64
  )
  assert picture.shape == (2 * 94, 2 * 64, 3)
  assert picture.dtype == np.uint8
  green, red = picture[0, 0].astype(int), picture[0, 64].astype(int)
  assert green[1] > green[0]
  assert red[0] > red[1]
  np.testing.assert_array_equal(picture[32, 32], 128)  # The image itself.
  assert (picture[94:, 64:] == 255).all()  # No fourth image.
