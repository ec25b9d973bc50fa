"""Evaluation counts every image once, whatever the batch size; the picture shows predictions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from losa_scenic.adapt_lib.method import combine
from losa_scenic.dataset_lib import contact_sheet, datasets, digits, resize, sources
from losa_scenic.dataset_lib.augment import Augment
from losa_scenic.dataset_lib.clip_reader import ClipReader, Sampling
from losa_scenic.dataset_lib.dataset_utils import Pipeline, make_dataset
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
  found = evaluate.evaluate(made, state, dataset, 'test')
  found.write(7, writer)
  return found.values, writer, made, state


@pytest.fixture(scope='module')
def by_hand() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(labels, predictions, losses) of all test images, in one plain pass without padding."""
  _, _, made, state = evaluated(64)
  test = digits.splits().test
  images = np.stack([resize.resize(test[i].image, SIDE) for i in range(797)])
  labels = np.array([test[i].label for i in range(797)])
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


class Holed:
  """A source some of whose images cannot be read."""

  def __init__(self, source: sources.Source, gone: range) -> None:
    self.source, self.gone = source, gone

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int) -> sources.Record:
    if index in self.gone:
      raise sources.BadImage(f'digit {index}', 'gone')
    return self.source[index]


def test_unreadable_images_are_not_counted_and_not_shown(by_hand, monkeypatch):
  labels, predictions, losses = by_hand
  _, _, made, state = evaluated(64)
  parts, gone = digits.splits(), range(3, 797, 100)
  dataset = make_dataset(
    sources.Splits(parts.train, None, Holed(parts.test, gone), parts.class_names),
    Pipeline(64, 64, 0, 'uint8', resize.View(SIDE), max_bad_fraction=0.02),
  )
  grids = []
  monkeypatch.setattr(evaluate, 'prediction_grid', lambda *args: grids.append(args) or np.zeros(1))
  values = evaluate.evaluate(made, state, dataset, 'test').values
  kept = np.setdiff1d(np.arange(797), gone)
  assert values['test_accuracy'] == (labels == predictions)[kept].mean()
  assert values['test_loss'] == pytest.approx(losses[kept].mean(), rel=1e-4)
  inputs, shown_labels, shown_predictions, names = grids[0]
  assert names == parts.class_names
  np.testing.assert_array_equal(shown_labels, labels[kept[:24]])
  np.testing.assert_array_equal(shown_predictions, predictions[kept[:24]])
  assert len(inputs) == 24 and inputs.reshape(24, -1).any(1).all()


class Noise:
  """Clips of noise in memory."""

  def __len__(self) -> int:
    return 5

  def __getitem__(self, index: int) -> sources.Record:
    pixels = np.random.default_rng(index).integers(0, 256, (11, 20, 30, 3), np.uint8)
    return sources.Record(pixels, index % 3, f'noise {index}')


@pytest.mark.parametrize('views', [(1, 1), (2, 3)])
def test_logits_of_several_views_are_averaged(views, monkeypatch):
  clips, crops = views
  config = run_config.default_config()
  config.update(backbone='test/8', random_backbone=True, method='linear', num_training_steps=1)
  config.backbone_configs.update(frames=4, tubelet=2)
  config.lr_configs.base_learning_rate, config.eval_batch_size = 0.1, 4
  config = run_config.resolve(config)
  sampling = Sampling(4, num_test_clips=clips, num_test_crops=crops)
  view = resize.View(SIDE, central_crop=0.9)
  dataset = make_dataset(
    sources.Splits(Noise(), Noise(), Noise(), tuple('abc'), clips=True),
    Pipeline(4, 4, 0, 'uint8', view, sampling),
  )
  made, state = program.build_program(
    rng=jax.random.key(0), config=config, model_cls=ClassificationModel, dataset=dataset
  )
  rng = np.random.default_rng(0)
  trainable = jax.tree.map(
    lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), state.trainable
  )
  state = state.replace(trainable=trainable)
  grids = []
  monkeypatch.setattr(evaluate, 'prediction_grid', lambda *args: grids.append(args) or np.zeros(1))
  values = evaluate.evaluate(made, state, dataset, 'test').values

  # Five clips in batches of four: every clip by itself, every view by itself.
  reader = ClipReader(Noise(), view, sampling, Augment(), split='test')
  variables = {'params': combine(jax.device_get(state.trainable), jax.device_get(made.frozen))}
  apply = jax.jit(functools.partial(made.model.flax_model.apply, variables, train=False))
  logits, strips = [], []
  for index in range(5):
    shown = reader.show(index, 0)[0].reshape(clips * crops, 4, SIDE, SIDE, 3)
    logits.append(np.mean([np.asarray(apply(view[None])[0], np.float64) for view in shown], 0))
    strips.append(contact_sheet.strip(shown[clips * crops // 2]))
  logits, labels = np.array(logits), np.arange(5) % 3
  shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  losses = -np.log(shares[np.arange(5), labels])
  assert values['test_loss'] == pytest.approx(losses.mean(), rel=1e-5)
  assert values['test_accuracy'] == pytest.approx((logits.argmax(1) == labels).mean())
  inputs, shown_labels, predictions, _ = grids[0]
  np.testing.assert_array_equal(predictions, logits.argmax(1)[:4])
  np.testing.assert_array_equal(shown_labels, labels[:4])
  np.testing.assert_array_equal(inputs, strips[:4])
  # Validation shows one view only.
  if clips > 1:
    one = evaluate.evaluate(made, state, dataset, 'valid').values
    assert one['valid_loss'] != pytest.approx(values['test_loss'], rel=1e-4)


@pytest.mark.parametrize('dtype', [np.uint8, np.float32])
def test_a_clip_is_shown_as_frames_of_its_middle_view(dtype):
  rng = np.random.default_rng(0)
  images, views = rng.random((2, 8, 8, 3)).astype(dtype), rng.random((2, 3, 9, 8, 8, 3))
  views = (views * (255 if dtype == np.uint8 else 1)).astype(dtype)
  assert evaluate.pictures(images, 3) is images
  shown = evaluate.pictures(views, 4)
  assert shown.dtype == dtype and shown.shape[:2] == (2, 8)
  for picture, clip in zip(shown, views[:, 1], strict=True):
    np.testing.assert_array_equal(picture, contact_sheet.strip(clip))
    np.testing.assert_array_equal(picture[:, :8], clip[0])
    np.testing.assert_array_equal(picture[:, -8:], clip[-1])
  np.testing.assert_array_equal(evaluate.pictures(views[:, 1], 4), shown)
  sheet = evaluate.prediction_grid(
    shown, np.array([0, 1]), np.array([0, 0]), ('a', 'b'), columns=6, cell=64
  )
  # Strips are wide: two in a row, where there would be six images.
  assert sheet.shape[0] < 2 * 64 + 60 and sheet.shape[1] > 2 * 3 * 64


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
