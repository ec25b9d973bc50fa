"""How a model is executed (scan, remat, dtype) does not change what it computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import kinds
from reference.kinds import batch_of

from losa_scenic.adapt_lib import methods
from losa_scenic.adapt_lib.method import combine, partition
from losa_scenic.common_lib import trees
from losa_scenic.model_lib import encoder, presets
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.classification_model import ClassificationModel
from losa_scenic.train_lib import steps
from losa_scenic.train_lib.state import TrainState

METHODS = sorted(methods.METHODS)
# One that only reads the weights, and those that compute with them in their own way.
FEW = ('linear', 'full', 'losa', 'dora', 'toast', 'noah')
# And one of each sort of insert.
MORE = (*FEW, 'adapter', 'fact_tk', 'lora', 'repadapter', 'ssf', 'st_adapter', 'vera', 'vpt_deep')
CLASSES = 5


OPTIONS = {'hst': {'stages': 3}, 'temporal': {'depth': 1}}  # for a backbone of three layers


def adapted(method, pool='cls', **execution):
  """The model; layers that cannot be scanned are unrolled, whatever `execution` says."""
  spec = presets.preset('test/8', pool=pool, **kinds.changes(method))
  options = dict(OPTIONS.get(method, {}))
  if method == 'losa' and pool == 'map':
    options['map_head_lora_rank'] = 2
  built = methods.build(method, spec, options)
  execution['scan'] = execution.get('scan', False) and not built.unrolled
  return Adapted(spec, built, CLASSES, **execution)


def logits_and_gradients(model, trainable, frozen, batch):
  variables = model.init_model_state()

  def loss(trainable):
    params = combine(trainable, frozen)
    logits = model.apply({'params': params, **variables}, batch['inputs'])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
    return losses.mean(), logits

  gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(trainable)
  return logits, trees.flatten(encoder.unstack_layers(gradients))


def close(have, want, tolerance):
  """Largest difference relative to the largest value."""
  have, want = np.asarray(have, np.float32), np.asarray(want, np.float32)
  return np.abs(have - want).max() <= tolerance * max(np.abs(want).max(), 1e-3)


# The class token never sees what ST-Adapter does before the last MLP.
POOL = {'st_adapter': 'gap'}


@pytest.mark.parametrize(
  ('method', 'pool'),
  [
    pytest.param(m, POOL.get(m, 'cls'), marks=() if m in MORE else pytest.mark.slow)
    for m in METHODS
  ]
  + [('losa', 'map')],
)
def test_scanned_and_rematerialised_equals_unrolled(method, pool, random_like, make_batch):
  stacked = adapted(method, pool, scan=True, remat=True)
  trainable, frozen = random_like(partition(stacked.param_shapes(), stacked.method))
  batch = batch_of(stacked, make_batch, 3)
  want_logits, want = logits_and_gradients(stacked, trainable, frozen, batch)
  assert all(np.abs(g).max() > 0 for path, g in want.items() if 'key/bias' not in path)
  model = adapted(method, pool)
  same = model.scan == stacked.scan
  trees_ = (trainable, frozen) if same else map(encoder.unstack_layers, (trainable, frozen))
  logits, have = logits_and_gradients(model, *trees_, batch)
  assert close(logits, want_logits, 1e-5)
  assert set(have) == set(want)
  assert not [path for path in want if not close(have[path], want[path], 1e-4)]


@pytest.mark.parametrize('method', METHODS)
def test_stack_and_unstack_are_inverse_and_fit_the_models(method):
  stacked, unrolled = adapted(method, scan=True), adapted(method, scan=False)
  if not stacked.scan:
    pytest.skip('this method treats layers differently: it is never scanned')
  values = jax.tree.map(lambda s: np.random.default_rng(0).random(s.shape), stacked.param_shapes())
  apart = encoder.unstack_layers(values)
  have = {path: shape for path, (shape, _) in trees.describe(apart).items()}
  assert have == {p: shape for p, (shape, _) in trees.describe(unrolled.param_shapes()).items()}
  again = jax.tree.map(np.asarray, trees.flatten(encoder.stack_layers(apart)))
  assert set(again) == set(trees.flatten(values))
  assert all(np.allclose(again[p], v) for p, v in trees.flatten(values).items())


# Each dtype compiles every method once more: a few always, all with -m slow.
HALF = [
  pytest.param(
    *(dtype, tolerance, method),
    marks=() if method in (MORE if dtype == 'bfloat16' else FEW) else pytest.mark.slow,
  )
  for dtype, tolerance in (('bfloat16', 0.02), ('float16', 0.004))
  for method in METHODS
]


@pytest.mark.parametrize(('dtype', 'tolerance', 'method'), HALF)
def test_half_precision_compute_is_close(method, dtype, tolerance, random_like, make_batch):
  exact, half = adapted(method, scan=True), adapted(method, scan=True, dtype=jnp.dtype(dtype))
  params, images = random_like(exact.param_shapes()), batch_of(exact, make_batch, 3)['inputs']
  variables = {'params': params, **exact.init_model_state()}
  want = jax.jit(exact.apply)(variables, images)
  have = jax.jit(half.apply)(variables, images)
  assert have.dtype == jnp.float32
  assert close(have, want, tolerance)
  assert not close(have, want, 1e-6), 'half precision was not used'


@pytest.mark.parametrize('method', FEW)
def test_frozen_weights_may_be_stored_in_half_precision(
  method, random_like, make_batch, dtype='bfloat16'
):
  model = adapted(method, scan=True)
  trainable, frozen = random_like(partition(model.param_shapes(), model.method))
  stored = jax.tree.map(lambda a: jnp.asarray(a, dtype), frozen)
  rounded = jax.tree.map(lambda a: a.astype(jnp.float32), stored)
  more = model.init_model_state()
  forward = jax.jit(lambda f, x: model.apply({'params': combine(trainable, f), **more}, x))
  images = make_batch(2)['inputs']
  np.testing.assert_allclose(forward(stored, images), forward(rounded, images), atol=1e-6)


@pytest.mark.parametrize('method', METHODS)
def test_train_step_in_bfloat16_keeps_trainable_parameters_in_float32(
  method, random_like, make_batch
):
  model = adapted(method, scan=True, dtype=jnp.bfloat16)
  trainable, frozen = random_like(partition(model.param_shapes(), model.method))
  frozen = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), frozen)
  state, step = _step(model, trainable, optax.adamw(1e-3))
  state, metrics = jax.eval_shape(step, state, frozen, batch_of(model, make_batch, 2))
  assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {jnp.dtype('float32')}
  floats = [a for a in jax.tree.leaves(state.opt_state) if jnp.issubdtype(a.dtype, jnp.floating)]
  assert {leaf.dtype for leaf in floats} == {jnp.dtype('float32')}
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(metrics))


@pytest.mark.parametrize(
  ('method', 'pool'), [(m, 'gap') for m in METHODS] + [(m, 'map') for m in FEW]
)
def test_float32_step_never_promotes_a_dtype(method, pool, random_like, make_batch):
  model = adapted(method, pool)
  trainable, frozen = random_like(partition(model.param_shapes(), model.method))
  # Flax's LayerNorm promotes bfloat16 inputs and optax's Adam its counter: SGD in float32.
  with jax.numpy_dtype_promotion('strict'):
    state, step = _step(model, trainable, optax.sgd(1e-2))
    jax.eval_shape(step, state, frozen, batch_of(model, make_batch, 2))


def _step(model, trainable, tx):
  classification = ClassificationModel(None, {'num_classes': CLASSES})
  step = functools.partial(
    steps.train_step,
    flax_model=model,
    loss_fn=classification.loss_function,
    metrics_fn=classification.get_metrics_fn_jit(),
    tx=tx,
  )
  trainable = jax.tree.map(jnp.asarray, trainable)
  return TrainState.create(trainable, tx, jax.random.key(0), model.init_model_state()), step
