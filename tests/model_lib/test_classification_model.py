"""The model class: loss and metrics against numpy, and how it gets its parameters."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib import encoder, presets
from losa_scenic.model_lib.classification_model import ClassificationModel
from losa_scenic.model_lib.vit import ViT
from losa_scenic.weights_lib import backbones

CLASSES = 4


def make_model(metric='accuracy', **fields):
  config = {'backbone': 'test/8', 'method': 'losa', 'random_backbone': True} | fields
  meta_data = {'num_classes': CLASSES, 'metric': metric}
  return ClassificationModel(ml_collections.ConfigDict(config), meta_data)


@pytest.fixture
def logits():
  return 2 * np.random.default_rng(0).standard_normal((6, CLASSES)).astype(np.float32)


@pytest.fixture
def batch():
  mask = np.array([1, 1, 0, 1, 1, 0], np.float32)
  return {'label': np.array([0, 3, 1, 1, 3, 2], np.int32), 'batch_mask': mask}


def cross_entropy(logits, target):
  """Per example, in float64."""
  logits = logits.astype(np.float64)
  log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  return -(target * log_p).sum(1)


@pytest.mark.parametrize('smoothing', [None, 0.0, 0.1])
@pytest.mark.parametrize('soft', [False, True], ids=['ids', 'probabilities'])
def test_loss_equals_numpy(smoothing, soft, logits, batch):
  target = np.eye(CLASSES)[batch['label']]
  if soft:
    target = np.random.default_rng(1).dirichlet(np.ones(CLASSES), 6)
    batch['label'] = target.astype(np.float32)
  s = smoothing or 0.0
  losses = cross_entropy(logits, (1 - s) * target + s / CLASSES)
  want = (losses * batch['batch_mask']).sum() / 4
  have = make_model(label_smoothing=smoothing).loss_function(logits, batch)
  np.testing.assert_allclose(have, want, rtol=1e-5)


def test_loss_of_a_batch_of_padding_is_zero(logits, batch):
  batch['batch_mask'] = np.zeros(6, np.float32)
  assert make_model().loss_function(logits, batch) == 0


def test_metrics_equal_numpy_and_do_not_see_padding(logits, batch):
  have = make_model(label_smoothing=0.1).get_metrics_fn_jit()(logits, batch)
  real = batch['batch_mask'] > 0
  correct = (logits.argmax(1) == batch['label'])[real]
  losses = cross_entropy(logits, np.eye(CLASSES)[batch['label']])[real]
  assert set(have) == {'accuracy', 'loss'}
  np.testing.assert_allclose(have['accuracy'], (correct.sum(), 4))
  np.testing.assert_allclose(have['loss'], (losses.sum(), 4), rtol=1e-5)
  logits[~real], batch['label'][~real] = 77, 0
  again = make_model().get_metrics_fn_jit()(logits, batch)
  np.testing.assert_array_equal(again['loss'], have['loss'])
  np.testing.assert_array_equal(again['accuracy'], have['accuracy'])


def test_per_class_accuracy_equals_numpy(logits, batch):
  sums, counts = make_model('per_class').get_metrics_fn_jit()(logits, batch)['per_class_accuracy']
  want = np.zeros((2, CLASSES))
  for i, label in enumerate(batch['label']):
    if batch['batch_mask'][i]:
      want[0, label] += logits[i].argmax() == label
      want[1, label] += 1
  np.testing.assert_array_equal((sums, counts), want)
  assert want[1].tolist() == [1, 1, 0, 2], 'a class that occurs only as padding has no examples'


@pytest.mark.parametrize('mapped', ['vmap', 'pmap'])
def test_metrics_are_summed_over_the_mapped_axis(mapped, logits, batch):
  if mapped == 'pmap' and len(jax.devices()) < 2:
    pytest.skip('one device')
  model = make_model('per_class')
  want = model.get_metrics_fn_jit()(logits, batch)
  halves = jax.tree.map(lambda a: a.reshape(2, 3, *a.shape[1:]), (logits, batch))
  transform = functools.partial(getattr(jax, mapped), axis_name='batch')
  have = transform(model.get_metrics_fn('validation'))(*halves)
  for name, pair in want.items():
    for h, w in zip(have[name], pair, strict=True):
      np.testing.assert_allclose(h[0], w, rtol=1e-6)
      np.testing.assert_array_equal(h[0], h[1])


def test_a_frozen_random_backbone_is_refused():
  model = make_model(random_backbone=False)
  with pytest.raises(errors.UserError, match=r"'test/8' has random weights and method 'losa'"):
    model.init_params(jax.random.key(0))


def test_training_a_random_backbone_from_scratch_is_allowed():
  model = make_model(method='full', random_backbone=False, layer_loop='scan')
  trainable, frozen = model.init_params(jax.random.key(0))
  assert not frozen and trees.count(trainable) == trees.count(model.flax_model.param_shapes())


@pytest.fixture
def stored(tmp_path, random_like):
  """(path of a stored backbone, its parameters)."""
  spec = presets.preset('test/8')
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  shapes = jax.eval_shape(ViT(spec, {}, scan=True).init, jax.random.key(0), images)['params']
  params = random_like(shapes)
  return str(backbones.save(tmp_path / 'stored.json', spec, params).weights.path), params


@pytest.mark.parametrize('method', ['losa', 'full'])
@pytest.mark.parametrize('loop', ['scan', 'unroll'])
def test_stored_weights_are_used_where_they_train_and_where_not(method, loop, stored):
  path, params = stored
  model = make_model(backbone=path, method=method, layer_loop=loop, random_backbone=False)
  trainable, frozen = model.init_params(jax.random.key(0))
  have = trees.flatten((frozen if method == 'losa' else trainable)['backbone'])
  want = trees.flatten(params if loop == 'scan' else encoder.unstack_layers(params))
  assert set(have) == set(want)
  assert all(np.array_equal(have[path], want[path]) for path in want)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_frozen_weights_are_cast_once_and_trainable_ones_stay_float32(dtype, stored):
  model = make_model(backbone=stored[0], frozen_dtype_str=dtype)
  trainable, frozen = model.init_params(jax.random.key(0))
  assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype(dtype)}
  assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {jnp.dtype('float32')}


def test_another_pooling_that_needs_other_weights_is_refused(stored):
  model = make_model(backbone=stored[0], backbone_configs={'pool': 'gap'})
  trainable, frozen = model.init_params(jax.random.key(0))
  assert model.flax_model.spec.pool == 'gap' and 'cls' in frozen['backbone']
  assert trees.count(trainable) < trees.count(frozen)
  with pytest.raises(errors.UserError, match='no MAP head'):
    make_model(backbone=stored[0], backbone_configs={'pool': 'map'})


def test_stored_weights_of_another_geometry_are_refused(stored):
  model = make_model(backbone=stored[0])
  other = presets.preset('test/8', mlp=128)
  model.backbone = backbones.Backbone(other, model.backbone.weights)
  model.flax_model = model.flax_model.clone(spec=other)
  with pytest.raises(errors.UserError, match=r'do not fit the model.*other shape.*fc1'):
    model.init_params(jax.random.key(0))


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('model_dtype_str', 'float64', "Unknown model_dtype_str 'float64'"),
    ('layer_loop', 'loop', "Unknown layer_loop 'loop'"),
    ('method', 'lossa', r"Unknown method 'lossa'\. Did you mean 'losa'"),
    ('backbone', 'tset/8', "Unknown backbone 'tset/8'"),
  ],
)
def test_bad_config_values_are_user_errors(field, value, message):
  with pytest.raises(errors.UserError, match=message):
    make_model(**{field: value})


@pytest.mark.parametrize(
  ('method', 'loop', 'scan'),
  [('losa', 'auto', False), ('full', 'auto', True), ('losa', 'scan', True)],
)
def test_layers_are_scanned_where_a_gradient_passes(method, loop, scan):
  assert make_model(method=method, layer_loop=loop).flax_model.scan == scan


def test_default_config_makes_a_tiny_model():
  model = ClassificationModel(None, {'num_classes': 3})
  assert (model.flax_model.spec.name, model.flax_model.num_classes) == ('test/8', 3)
