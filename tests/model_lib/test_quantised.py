"""Quantised frozen layers: what is stored, what they compute, and which methods may use them."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from losa_scenic.adapt_lib import fold, methods
from losa_scenic.adapt_lib.method import combine, partition
from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib import layers, presets, quantised
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.classification_model import ClassificationModel
from losa_scenic.model_lib.vit import ViT
from losa_scenic.train_lib import sharding
from losa_scenic.weights_lib import backbones

SPEC = presets.preset('test/8', depth=2, image_size=16)
STORED = {'int8': jnp.int8, 'w8a8': jnp.int8, 'float8': jnp.float8_e4m3fn, 'int4': jnp.int4}
# Largest error of a weight in units of its channel's or group's largest: half a step.
HALF_STEP = {'int8': 0.5 / 127, 'w8a8': 0.5 / 127, 'float8': 1 / 28, 'int4': 0.5 / 7}


def random(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize('kind', quantised.KINDS)
def test_weights_are_off_by_at_most_half_a_step(kind):
  kernel = random(128, 24) * np.logspace(-3, 3, 24, dtype=np.float32)
  kernel[:, 3] = 0
  made = quantised.quantise(kernel, kind)
  assert made['kernel'].dtype == STORED[kind] and made['kernel_scale'].dtype == np.float32
  assert made['kernel_scale'].shape == ((2, 24) if kind == 'int4' else (24,))
  parts = kernel.reshape(2 if kind == 'int4' else 1, -1, 24)
  largest = np.broadcast_to(np.abs(parts).max(1, keepdims=True), parts.shape).reshape(kernel.shape)
  error = np.abs(np.asarray(quantised.dequantise(made['kernel'], made['kernel_scale'])) - kernel)
  assert (error <= largest * HALF_STEP[kind] * 1.001).all()
  assert error.max(0)[5] > 0  # It is rounding.
  on_device = quantised.quantise(jnp.asarray(kernel), kind)
  for name, value in made.items():
    np.testing.assert_allclose(np.float32(on_device[name]), np.float32(value), rtol=1e-6)


def test_int4_groups_divide_any_width():
  made = quantised.quantise(random(96, 8), 'int4')
  assert made['kernel_scale'].shape == (3, 8)  # Of 32 inputs each.


def test_weights_that_are_not_finite_are_an_error():
  kernel = random(8, 8)
  kernel[2, 3] = np.nan
  with pytest.raises(errors.UserError, match=r'encoder/layers_0/block/fc1/kernel.*not finite'):
    quantised.in_place_of('encoder/layers_0/block/fc1/kernel', kernel, 'int8')


def test_rounded_tokens_have_scales_of_their_own():
  x = random(2, 5, 16) * np.logspace(-6, 6, 5, dtype=np.float32)[:, None]
  x[1, 2] = 0
  rounded, scale = quantised.round_tokens(jnp.asarray(x))
  assert rounded.dtype == jnp.int8 and scale.shape == (2, 5, 1)
  error = np.abs(rounded.astype(jnp.float32) * scale - x)
  assert (error <= 0.501 * np.abs(x).max(-1, keepdims=True) / 127).all()
  assert np.abs(rounded).max(-1).tolist() == [[127] * 5, [127, 127, 0, 127, 127]]


@pytest.mark.parametrize('kind', quantised.KINDS)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.float16])
def test_the_layer_is_that_of_the_rounded_weights(kind, dtype):
  x, plain = jnp.asarray(random(2, 7, 64), dtype), layers.dense(48, dtype)
  params = plain.init(jax.random.key(0), x)['params'] | {'bias': random(48)}
  layer = layers.dense(48, dtype, kind)
  made = quantised.quantise(params['kernel'], kind) | {'bias': params['bias']}
  y = layer.apply({'params': made}, x)
  assert y.dtype == dtype
  kernel = np.float64(quantised.dequantise(made['kernel'], made['kernel_scale']))
  want = np.float64(x) @ kernel + np.float64(params['bias'])
  tolerance = 1e-5 if dtype == jnp.float32 else 6e-3
  if kind == 'w8a8':
    # Each of the 64 terms is off by half a step of its token, in a random direction.
    tolerance += 4 * np.abs(np.float32(x)).max() / 127 / np.sqrt(12) * np.sqrt((kernel**2).sum(0))
  assert (np.abs(np.float64(y) - want) <= tolerance).all()


@pytest.mark.parametrize(('kind', 'scan'), [('float8', False), ('int4', True)])
def test_random_layers_are_the_plain_ones_rounded(kind, scan):
  def init(key, kind):
    images = jnp.zeros((1, *SPEC.input_shape))
    params = ViT(SPEC, {}, scan=scan, quantisation=kind).init(key, images)['params']
    return trees.flatten(params['encoder'])

  made = {k: jax.jit(functools.partial(init, kind=k))(jax.random.key(3)) for k in (kind, None)}
  flat, want = made[kind], made[None]
  rounded = [path for path in want if quantised.is_kernel(path)]
  assert len(rounded) == 6 * (1 if scan else SPEC.depth)
  assert set(flat) - set(want) == {f'{path}_scale' for path in rounded}
  for path, leaf in want.items():
    if path not in rounded:
      np.testing.assert_array_equal(flat[path], leaf)
      continue
    rows = leaf if scan else leaf[None]
    for i, kernel in enumerate(rows):
      for name, value in quantised.quantise(np.asarray(kernel), kind).items():
        have = flat[path.removesuffix('kernel') + name]
        have = np.float32(have[i] if scan else have)
        np.testing.assert_allclose(have, np.float32(value), rtol=1e-6)


def test_gradients_pass_through_dequantised_weights_alone():
  method = methods.build('lora', SPEC, {'rank': 2})
  batch = jnp.asarray(random(2, 16, 16, 3))

  def gradient(kind, tree):
    model = Adapted(SPEC, method, 5, quantisation=kind)
    trainable, frozen = partition(tree, method)
    loss = jax.jit(lambda t: model.apply({'params': combine(t, frozen)}, batch).sum())
    return jax.grad(loss)(trainable)

  model = Adapted(SPEC, method, 5, quantisation='int8')
  tree = jax.jit(model.init)(jax.random.key(0), batch)['params']
  tree['output_projection'] |= {'kernel': jnp.asarray(random(SPEC.width, 5))}
  flat = trees.flatten(tree)
  for path in [p for p in flat if quantised.is_kernel(p)]:
    flat[path] = quantised.dequantise(flat[path], flat.pop(f'{path}_scale'))
  have = trees.flatten(gradient('int8', tree))
  want = trees.flatten(gradient(None, trees.unflatten(flat)))
  assert set(have) == set(want)
  for path, leaf in want.items():
    np.testing.assert_allclose(have[path], leaf, atol=1e-5 * np.abs(leaf).max(), err_msg=path)


def test_what_the_backward_pass_keeps_holds_no_float_weights():
  layer = layers.dense(512, jnp.float32, 'int8')
  x = jnp.asarray(random(2, 256))
  params = layer.init(jax.random.key(0), x)['params']
  _, kept = jax.eval_shape(lambda x: jax.vjp(lambda x: layer.apply({'params': params}, x), x), x)
  assert {leaf.dtype for leaf in jax.tree.leaves(kept) if leaf.shape == (256, 512)} == {
    jnp.dtype('int8')
  }


def test_rounded_activations_refuse_to_be_differentiated():
  layer = layers.dense(8, jnp.float32, 'w8a8')
  x = jnp.asarray(random(2, 8))
  params = layer.init(jax.random.key(0), x)
  with pytest.raises(ValueError, match="use 'int8'"):
    jax.grad(lambda x: layer.apply(params, x).sum())(x)


@pytest.mark.parametrize('method', ['losa', 'bitfit', 'lora', 'vpt_deep'])
def test_methods_that_leave_kernels_alone_take_int8_and_freeze_it(method):
  model = Adapted(SPEC, methods.build(method, SPEC, {}), 5, quantisation='int8')
  trainable, frozen = (trees.flatten(t) for t in partition(model.param_shapes(), model.method))
  names = {path for path in frozen if quantised.is_kernel(path)}
  assert len(names) == 6 * SPEC.depth
  assert {frozen[path].dtype for path in names} == {jnp.dtype('int8')}
  assert {leaf.dtype for leaf in trainable.values()} == {jnp.dtype('float32')}
  assert not any('kernel_scale' in path for path in trainable)


@pytest.mark.parametrize(
  ('method', 'kind', 'says'),
  [
    ('full', 'int8', 'trains weight matrices'),
    ('last_k', 'int8', 'trains weight matrices'),
    ('mlp_only', 'float8', 'trains weight matrices'),
    ('dora', 'int8', "needs the frozen weights themselves.*'int8'"),
    ('lora', 'w8a8', "use 'int8'"),
    ('bitfit', 'w8a8', "use 'int8'"),
    ('linear', 'int9', "Did you mean 'int8'"),
  ],
)
def test_what_cannot_be_says_why(method, kind, says):
  model = Adapted(SPEC, methods.build(method, SPEC, {}), 5, quantisation=kind)
  with pytest.raises(errors.UserError, match=says):
    model.param_shapes()


def test_a_quantised_backbone_is_not_merged():
  model = Adapted(SPEC, methods.build('lora', SPEC, {}), 5, quantisation='int8')
  with pytest.raises(errors.UserError, match='export_backbone'):
    fold.check_model(model)
  with pytest.raises(errors.UserError, match='export_backbone'):
    fold.fold(model, {})


def model_of(path, **config):
  config = {'backbone': str(path), 'method': 'losa', 'random_backbone': True, **config}
  return ClassificationModel(ml_collections.ConfigDict(config), {'num_classes': 5})


@pytest.fixture
def saved(tmp_path, random_like):
  images = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
  shapes = jax.eval_shape(ViT(SPEC, {}, scan=True).init, jax.random.key(0), images)['params']
  return backbones.save(tmp_path / 'small.json', SPEC, random_like(shapes)).weights.path


@pytest.mark.parametrize(('kind', 'loop'), [('int8', 'scan'), ('int4', 'unroll')])
def test_stored_weights_are_rounded_as_they_are_read(loop, kind, saved):
  config = {'layer_loop': loop, 'frozen_dtype_str': 'bfloat16'}
  rounded = model_of(saved, backbone_quantisation=kind, **config)
  frozen = trees.flatten(rounded.init_params(jax.random.key(0))[1])
  plain = trees.flatten(model_of(saved, layer_loop=loop).init_params(jax.random.key(0))[1])
  shapes = partition(rounded.flax_model.param_shapes(), rounded.flax_model.method)[1]
  planned = trees.flatten(quantised.stored(shapes, jnp.bfloat16))
  assert {p: (v.shape, v.dtype) for p, v in frozen.items()} == {
    p: (v.shape, v.dtype) for p, v in planned.items()
  }
  path = f'backbone/encoder/layers{"" if loop == "scan" else "_1"}/block/fc2/kernel'
  kernel = plain[path][1] if loop == 'scan' else plain[path]
  for name, want in quantised.quantise(np.asarray(kernel), kind).items():
    have = frozen[path.removesuffix('kernel') + name]
    assert have.dtype == want.dtype
    np.testing.assert_array_equal(np.float32(have[1] if loop == 'scan' else have), np.float32(want))
  assert frozen[path.replace('kernel', 'bias')].dtype == jnp.bfloat16


def test_the_float_weights_are_never_placed(saved, monkeypatch):
  placed = []
  put = jax.device_put
  monkeypatch.setattr(jax, 'device_put', lambda value, *a: placed.append(value.dtype) or put(value))
  model_of(saved, backbone_quantisation='int8').init_params(jax.random.key(0))
  assert placed.count(jnp.dtype('int8')) == 6 * SPEC.depth


def test_devices_may_share_them(saved, make_batch):
  config = {'method': 'lora', 'backbone_quantisation': 'int4'}
  batch = make_batch(4, image_size=16)['inputs']
  logits = []
  for fsdp in (1, 2):
    mesh = sharding.make_mesh({'fsdp': fsdp})
    model = model_of(saved, mesh={'fsdp': fsdp}, **config)
    trained, frozen = partition(model.flax_model.param_shapes(), model.flax_model.method)
    where = sharding.frozen_shardings(frozen, mesh)
    everywhere = jax.tree.map(lambda _, mesh=mesh: sharding.replicated(mesh), trained)
    trainable, frozen = model.init_params(jax.random.key(0), (everywhere, where))
    kernels = [v for p, v in trees.flatten(frozen).items() if quantised.is_kernel(p)]
    assert all(v.is_fully_replicated == (fsdp == 1) for v in kernels)
    flax_model = model.flax_model.clone(gather=sharding.gather(where, mesh))
    head = trainable['output_projection']
    head['kernel'] = jnp.asarray(random(*head['kernel'].shape))

    def loss(t, frozen, flax_model=flax_model):
      return (flax_model.apply({'params': combine(t, frozen)}, batch) ** 2).sum()

    logits.append(jax.jit(jax.value_and_grad(loss))(trainable, frozen))
  for a, b in zip(jax.tree.leaves(logits[0]), jax.tree.leaves(logits[1]), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4 * float(jnp.abs(b).max()) + 1e-9)


def test_checkpoints_know_the_kind(saved):
  identities = [model_of(saved, backbone_quantisation=k).identity() for k in (None, 'int8', 'w8a8')]
  assert [i['backbone'].get('quantisation') for i in identities] == [None, 'int8', 'w8a8']
  assert 'quantisation' not in identities[0]['backbone']


def test_features_are_near_those_of_floats(saved, make_batch):
  batch = make_batch(2, image_size=16)['inputs']
  features = {}
  for kind in (None, 'int8', 'w8a8', 'int4'):
    model = model_of(saved, backbone_quantisation=kind)
    params = combine(*model.init_params(jax.random.key(0)))
    encode = jax.jit(functools.partial(model.flax_model.apply, method='encode'))
    features[kind] = np.asarray(encode({'params': params}, batch).tokens)
  want = features.pop(None)
  error = {k: np.linalg.norm(v - want) / np.linalg.norm(want) for k, v in features.items()}
  assert 0 < error['int8'] < error['w8a8'] < error['int4'] < 0.5, error
