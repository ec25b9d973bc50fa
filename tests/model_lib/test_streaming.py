"""Layers in the host's memory compute what those on the device do, and train what those train."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import ml_dtypes
import numpy as np
import optax
import pytest

from losa_scenic.adapt_lib.method import combine
from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib import packing, presets, streaming
from losa_scenic.model_lib.classification_model import ClassificationModel
from losa_scenic.model_lib.vit import ViT
from losa_scenic.train_lib import run_config, sharding, steps
from losa_scenic.train_lib.state import TrainState
from losa_scenic.weights_lib import backbones

META = {'num_classes': 5}


def model_of(backbone, memory='host', **fields):
  config = {'backbone': backbone, 'random_backbone': True, 'method': 'losa'}
  return ClassificationModel(
    ml_collections.ConfigDict({**config, 'frozen_memory': memory, **fields}), META
  )


@pytest.fixture(scope='module')
def stored(tmp_path_factory, random_like):
  """The path of a backbone's file."""
  spec = presets.preset('test/8', pool='map')
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  shapes = jax.eval_shape(ViT(spec, {}, scan=True).init, jax.random.key(0), images)['params']
  path = tmp_path_factory.mktemp('backbone') / 'small.json'
  backbones.save(path, spec, random_like(shapes))
  return str(path)


def assert_same_pass(backbone, images, rtol=1e-6, **fields):
  """Both memories: equal parameters that train, equal outputs of all layers. -> Frozen ones."""
  passes = {}
  for memory in streaming.MEMORIES:
    own = fields if memory == 'host' else {k: v for k, v in fields.items() if 'stream' not in k}
    model = model_of(backbone, memory, **own)
    trainable, frozen = model.init_params(jax.random.key(0))
    assert trees.describe(frozen) == trees.describe(model.param_shapes()[1])
    encode = jax.jit(functools.partial(model.flax_model.apply, method='encode'))
    passes[memory] = trainable, encode({'params': combine(trainable, frozen)}, images)
  (trained, want), (trained_too, have) = passes.values()
  jax.tree.map(np.testing.assert_array_equal, trained, trained_too)
  assert jax.tree.structure(have) == jax.tree.structure(want)
  scale = float(np.abs(want.tokens).max())
  jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=0, atol=rtol * scale), want, have)
  assert not np.allclose(want.tokens, want.embedded)
  return frozen


@pytest.mark.parametrize(
  ('quantisation', 'loop', 'dtype'),
  [
    (None, 'scan', 'float32'),
    ('int4', 'auto', 'uint8'),
    pytest.param('int8', 'auto', 'uint8', marks=pytest.mark.slow),
    pytest.param('float8', 'auto', 'uint8', marks=pytest.mark.slow),
  ],
)
def test_a_stored_backbone_encodes_alike(stored, make_batch, quantisation, loop, dtype):
  frozen = assert_same_pass(
    stored, make_batch(2)['inputs'], layer_loop=loop, backbone_quantisation=quantisation
  )
  packed = frozen['backbone']['encoder']
  names = ['packed'] if loop == 'scan' else ['packed_0', 'packed_1', 'packed_2']
  assert sorted(packed) == names
  for buffer in packed.values():
    assert buffer.sharding.memory_kind == 'pinned_host' and buffer.dtype == dtype
    assert buffer.shape[:-1] == ((3, 1) if loop == 'scan' else (1,))


@pytest.mark.parametrize('loop', ['auto', pytest.param('scan', marks=pytest.mark.slow)])
def test_random_weights_are_those_of_the_device(make_batch, loop):
  assert_same_pass('test/8', make_batch(2)['inputs'], layer_loop=loop)


@pytest.mark.parametrize(('parts', 'dtype'), [(2, 'bfloat16'), (6, 'float32')])
def test_microbatches_give_the_taps_of_the_whole_batch(stored, make_batch, parts, dtype):
  images = make_batch(6)['inputs']
  options = {'losa': {'activation': 'both'}}  # Two taps a layer, neither the layer's output.
  fields = {'frozen_dtype_str': dtype, 'layer_loop': 'scan', 'method_configs': options}
  assert_same_pass(stored, images, stream_microbatches=parts, **fields)


@pytest.mark.slow
def test_microbatches_of_clips(make_batch):
  clips = np.repeat(make_batch(4)['inputs'][:, None], 4, axis=1)
  fields = {'backbone_configs': {'factorised': True, 'pool': 'gap'}, 'stream_microbatches': 2}
  assert_same_pass('vivit-test/8x2', clips, **fields)


def train(model, batch, mesh):
  """Metrics and trained parameters after two steps."""
  tx = optax.sgd(0.1)
  everywhere = sharding.replicated(mesh)
  trained, frozen = model.param_shapes()
  places = sharding.frozen_shardings(frozen, mesh)
  shardings = jax.tree.map(lambda _: everywhere, trained), places
  trainable, frozen = model.init_params(jax.random.key(0), shardings)
  have = jax.tree.map(lambda leaf: leaf.sharding.memory_kind, frozen)
  assert have == jax.tree.map(lambda where: where.memory_kind or 'device', places)
  step = jax.jit(
    functools.partial(
      steps.train_step,
      flax_model=model.flax_model,
      loss_fn=model.loss_function,
      metrics_fn=model.get_metrics_fn_jit(),
      tx=tx,
    ),
    in_shardings=(everywhere, places, sharding.batched(mesh)),
    out_shardings=everywhere,
  )
  state = TrainState.create(trainable, tx, jax.random.key(1))
  for _ in range(2):
    state, metrics = step(state, frozen, sharding.put(batch, mesh))
  return metrics, state.trainable, have


def test_training_on_two_devices_is_that_of_the_device_s_memory(stored, make_batch):
  mesh, batch = sharding.make_mesh({}), make_batch(8)
  fields = {'method_configs': {'losa': {'map_head_lora_rank': 2}}}
  want, trained, _ = train(model_of(stored, 'device', **fields), batch, mesh)
  have, trained_too, kinds = train(model_of(stored, stream_microbatches=2, **fields), batch, mesh)
  assert want['l2_grads'][0] > 1e-3
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, (have, trained_too), (want, trained))
  head = trees.flatten(kinds['backbone'].pop('map_head'))
  assert {path for path, kind in head.items() if kind == 'pinned_host'} == {
    f'{name}/kernel' for name in ('query', 'key', 'value', 'out', 'fc1', 'fc2')
  }
  flat = trees.flatten(kinds)
  hosted = {path for path in flat if flat[path] != 'device'}
  assert hosted == {f'backbone/encoder/packed_{i}' for i in range(3)}


def test_a_row_holds_weights_of_all_dtypes():
  rng = np.random.default_rng(0)
  values = {
    'a': rng.integers(-128, 128, (33, 7)).astype(np.int8),
    'b': rng.standard_normal((5,)).astype(np.float32),
    'c': rng.standard_normal((3, 3)).astype(ml_dtypes.bfloat16),
    'd/e': rng.standard_normal((2, 9)).astype(ml_dtypes.float8_e4m3fn),
    'f': rng.integers(-8, 8, (3, 7)).astype(ml_dtypes.int4),  # An odd number of half bytes.
    'g': rng.standard_normal(()).astype(np.float32),
  }
  for own, dtype in (('a', 'uint8'), ('b', 'uint32'), ('c', 'uint16'), ('f', 'uint8')):
    some = {**values, own: np.tile(values[own].reshape(-1), 400)}
    layout = packing.layout_of(some, depth=2)
    assert layout.dtype == dtype and layout.shape == (2, 1, layout.size)
    cut = trees.flatten(jax.jit(layout.cut)(layout.pack(some)))
    assert trees.describe(cut) == trees.describe(some)
    for path, value in some.items():
      np.testing.assert_array_equal(
        np.asarray(cut[path]).astype(np.float32), value.astype(np.float32)
      )


def test_weights_that_do_not_fit_are_refused():
  layout = packing.layout_of({'a': np.zeros(2), 'b': np.zeros((2, 2))}, depth=2)
  packer = packing.Packer(layout)
  assert not packer.put('patch/proj/kernel', np.ones(2))
  assert packer.put('encoder/layers_1/b', np.ones((2, 2)))
  assert packer.put('encoder/layers_1/a', np.ones(2))
  packer.put('encoder/layers_0/a', np.ones(2))
  with pytest.raises(errors.UserError, match=r"missing.*\{0: \['a'\]\}"):
    packer.packed()
  with pytest.raises(errors.UserError, match=r'b: expected \[\[2, 2\].*found \[\[4\]'):
    packer.put('encoder/layers_0/b', np.ones(4))


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'frozen_memory': 'hots'}, "Unknown frozen_memory 'hots'. Did you mean 'host'"),
    ({'method': 'lora'}, 'frozen_memory .* losa or linear; this one needs gradients inside it'),
    ({'method': 'full'}, 'this one needs gradients inside it'),
    ({'mesh': {'fsdp': 2}}, 'mesh.fsdp=2 splits frozen weights .* use one of the two'),
    ({'stream_microbatches': 0}, 'stream_microbatches must be an integer of at least 1'),
    ({'frozen_memory': 'device', 'stream_microbatches': 2}, 'would have no effect'),
  ],
)
def test_what_cannot_be_streamed_is_refused(fields, message):
  with pytest.raises(errors.UserError, match=message):
    model_of('test/8', **{'memory': fields.pop('frozen_memory', 'host'), **fields})


def test_microbatches_divide_the_batch_of_each_device(make_batch):
  with pytest.raises(
    errors.UserError, match=r'batch_size 6 .* 2 devices x 3 grad_accum_steps x 2 stream_micro'
  ):
    sharding.check_batch_size('batch_size', 6, sharding.make_mesh({}), 3, 2)
  model = model_of('test/8', stream_microbatches=2)
  variables = {'params': combine(*model.init_params(jax.random.key(0)))}
  with pytest.raises(errors.UserError, match='stream_microbatches 2 must divide the batch of 3'):
    model.flax_model.apply(variables, make_batch(3)['inputs'])


def test_a_run_may_change_its_memory_but_not_export_from_the_host():
  assert {'frozen_memory', 'stream_microbatches'} <= set(run_config.MAY_CHANGE)
  config = run_config.default_config()
  config.update({'num_training_steps': 1, 'frozen_memory': 'host', 'export_backbone': 'tuned.json'})
  with pytest.raises(errors.UserError, match=r"export_backbone .* continued with .*'device'"):
    run_config.check(config)
