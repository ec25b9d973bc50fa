"""What is kept of an input is enough: every method whose encoder is frozen computes from it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import kinds

from losa_scenic.adapt_lib import methods
from losa_scenic.adapt_lib.method import Method, combine, partition
from losa_scenic.common_lib import errors
from losa_scenic.model_lib import presets
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.train_lib import feature_layout, feature_trace

OPTIONS = {'hst': {'stages': 3}, 'temporal': {'depth': 1}}


def spares(name: str) -> bool:
  spec = presets.preset('test/8', **kinds.changes(name))
  return methods.build(name, spec, OPTIONS.get(name, {})).spares_backbone


METHODS = sorted(filter(spares, methods.METHODS))


def made(name, dtype='float32', changes=None, **options):
  spec = presets.preset('test/8', **(kinds.changes(name) if changes is None else changes))
  method = methods.build(name, spec, OPTIONS.get(name, {}) | options)
  model = Adapted(spec, method, num_classes=5)
  return model, feature_trace.of_model(model, dtype)


class Linear(nn.Module):
  """A side network with a parameter, which reads the last tokens."""

  @nn.compact
  def __call__(self, run, inputs, *, train):
    features = run.features(run.encode(inputs, train=train).tokens, train=train)
    return features + self.param('shift', nn.initializers.zeros, ())


def names(layout):
  return [leaf.name for leaf in layout.leaves]


def test_there_are_such_methods():
  assert {'head2toe', 'last', 'linear', 'losa', 'lst', 'temporal'} <= set(METHODS)


@pytest.fixture
def with_weights(random_like):
  """`fn(name)`: a model, its layout, random trainable and frozen parameters, and inputs."""

  def make(name):
    model, layout = made(name)
    inputs = jax.random.normal(jax.random.key(1), model.input_shape(2))
    return model, layout, *partition(random_like(model.param_shapes()), model.method), inputs

  return make


@pytest.mark.parametrize(
  'name',
  [n if n in ('linear', 'losa') else pytest.param(n, marks=pytest.mark.slow) for n in METHODS],
)
def test_every_method_computes_from_rows(name, with_weights):
  model, layout, trainable, frozen, inputs = with_weights(name)
  variables = {'params': combine(trainable, frozen)}

  @jax.jit
  def both(inputs):
    reads = feature_layout.RowModel(model, layout)
    rows = layout.encode(model, frozen, inputs)
    return reads.apply(variables, inputs), reads.apply(variables, rows, train=True), rows

  wanted, got, rows = both(inputs)
  assert rows.shape == (2, layout.items) and rows.nbytes == 2 * layout.row_bytes
  assert layout.row_bytes % 64 == 0 and np.ptp(wanted, axis=0).max() > 1e-3
  np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('name', METHODS)
def test_gradients_from_rows(name, with_weights):
  model, layout, trainable, frozen, inputs = with_weights(name)

  def found(inputs, layout):
    reads = feature_layout.RowModel(model, layout)

    def loss(trainable):
      variables = {'params': combine(trainable, frozen)}
      return jnp.square(reads.apply(variables, inputs, train=True)).sum()

    return jax.jit(jax.grad(loss))(trainable)

  wanted = found(inputs, layout)
  largest = max(np.abs(x).max() for x in jax.tree.leaves(wanted))
  for dtype, close in (('float32', 1e-5), ('bfloat16', 0.05), ('int8', 0.1)):
    layout = feature_layout.Layout(layout.leaves, dtype, layout.encoded, layout.places)
    rows = jax.jit(functools.partial(layout.encode, model))(frozen, inputs)
    got = found(rows, layout)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
      np.testing.assert_allclose(a, b, atol=close * largest)


def test_only_what_is_read_is_kept_and_nothing_twice():
  blocks = [f'layers/block/{i}' for i in range(3)]
  assert names(made('losa')[1]) == ['tokens', *blocks[:2]]  # The last block's output is b_L.
  assert names(made('losa', num_layers=1)[1]) == ['tokens']
  assert names(made('losa', y0='b_0', num_layers=2)[1]) == ['embedded', blocks[1], blocks[2]]
  assert names(made('losa', activation='both', num_layers=1)[1]) == [
    'tokens',
    'layers/attn/2',
    'layers/mlp/2',
  ]
  assert names(made('linear')[1]) == ['features']
  # Of a factorised encoder both are put together from the tokens of all times.
  assert names(made('losa', changes=kinds.KINDS['factorised'])[1]) == ['tokens', *blocks[:2]]


def test_a_row_has_a_byte_for_each_value_and_a_scale_for_each_token():
  model, layout = made('losa', 'int8')
  n, d = model.spec.tokens, model.spec.width
  used = 3 * n * (d + 4)
  assert layout.items == layout.row_bytes == -(-used // 64) * 64
  assert made('linear', 'float32')[1].row_bytes == 4 * d


def test_int8_is_within_half_a_scale(random_like):
  leaves = (feature_layout.Leaf('a', (3, 8), 'float32'), feature_layout.Leaf('b', (5,), 'float32'))
  layout = feature_layout.Layout(leaves, 'int8')
  a, b = random_like([np.zeros((2, 3, 8)), np.zeros((2, 5))], scale=30.0)
  a[0, 1] = 0  # A token of zeros has no scale.
  a[1, 2, 3] = 1e4
  for value, back in zip((a, b), layout.unpack(layout.pack([a, b])), strict=True):
    most = np.abs(value).max(-1, keepdims=True)
    assert (np.abs(back - value) <= most / 254 * 1.001).all()
    assert np.abs(np.asarray(back) - value).max() > 1e-3
  assert not layout.unpack(layout.pack([a, b]))[0][0, 1].any()


def test_values_that_are_not_finite_stay_so():
  layout = feature_layout.Layout((feature_layout.Leaf('a', (2, 4), 'float32'),), 'int8')
  a = np.ones((1, 2, 4), np.float32)
  a[0, 0, 0] = np.inf
  (back,) = layout.unpack(layout.pack([a]))
  assert not np.isfinite(back[0, 0]).any() and np.isfinite(back[0, 1]).all()


def test_16_bit_models_get_their_dtype_back():
  spec = presets.preset('test/8')
  model = Adapted(spec, methods.build('losa', spec, {}), num_classes=5, dtype=jnp.bfloat16)
  layout = feature_trace.of_model(model, 'int8')
  assert {leaf.dtype for leaf in layout.leaves} == {'bfloat16'}
  rows = np.zeros((2, layout.items), np.int8)
  assert {x.dtype for x in layout.unpack(rows)} == {jnp.dtype('bfloat16')}


def test_what_cannot_be_cached_is_refused():
  with pytest.raises(errors.UserError, match=r'memory class A.*class C'):
    made('lora')
  with pytest.raises(errors.UserError, match=r"Unknown feature_cache.dtype 'int9'.*int8"):
    made('losa', 'int9')
  spec = presets.preset('test/8')
  scanned = Adapted(spec, methods.build('losa', spec, {}), num_classes=5, scan=True)
  with pytest.raises(errors.UserError, match="layer_loop 'unroll'"):
    feature_trace.of_model(scanned, 'int8')

  class Looks(Linear):
    def __call__(self, run, inputs, *, train):
      return super().__call__(run, inputs, train=train) + inputs.mean()

  for side, allowed in ((Linear, True), (Looks, False)):
    model = Adapted(spec, Method(side=side), num_classes=5)
    if allowed:
      assert names(feature_trace.of_model(model, 'int8')) == ['tokens']
    else:
      with pytest.raises(errors.UserError, match='also reads the images'):
        feature_trace.of_model(model, 'int8')
