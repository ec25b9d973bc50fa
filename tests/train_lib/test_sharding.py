"""Any mesh gives the same numbers; devices hold their part of the weights and nothing more."""

import functools
import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from losa_scenic.adapt_lib import methods
from losa_scenic.adapt_lib.method import partition
from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib import presets
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.classification_model import ClassificationModel
from losa_scenic.model_lib.vit import ViT
from losa_scenic.train_lib import sharding, steps
from losa_scenic.train_lib.state import TrainState
from losa_scenic.weights_lib import backbones

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import losses_of_meshes

SPEC = presets.preset('test/8')
KERNEL = 'backbone/encoder/layers/block/fc1/kernel'


def model_of(method, **execution):
  built = methods.build(method, SPEC)
  return Adapted(SPEC, built, 5, **{'scan': not built.unrolled, **execution})


def frozen_shapes(method, **execution):
  model = model_of(method, **execution)
  return partition(model.param_shapes(), model.method)[1]


@pytest.fixture(scope='module')
def stored(tmp_path_factory, random_like):
  """The path of a backbone's file."""
  shapes = jax.eval_shape(
    ViT(SPEC, {}, scan=True).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))
  )
  path = tmp_path_factory.mktemp('backbone') / 'small.json'
  backbones.save(path, SPEC, random_like(shapes['params']))
  return str(path)


@pytest.mark.parametrize(
  ('shape', 'sizes'),
  [
    ({}, (2, 1)),
    ({'data': -1, 'fsdp': 1}, (2, 1)),
    ({'fsdp': 2}, (1, 2)),
    ({'data': 1, 'fsdp': -1}, (1, 2)),
    ({'data': 2}, (2, 1)),
  ],
)
def test_a_mesh_has_all_devices_in_their_order(shape, sizes):
  mesh = sharding.make_mesh(shape)
  assert mesh.shape == dict(zip(('data', 'fsdp'), sizes, strict=True))
  assert list(mesh.devices.flat) == jax.devices()


@pytest.mark.parametrize(
  ('shape', 'message'),
  [
    ({'data': 3}, r'data=3, fsdp=1 .* devices, 2: give data=2, fsdp=1 or data=1, fsdp=2'),
    ({'fsdp': 4}, r'data=-1, fsdp=4 does not make up'),
    ({'data': 1, 'fsdp': 1}, 'does not make up'),
    ({'data': 2, 'fsdp': 2}, 'does not make up'),
    ({'data': -1, 'fsdp': -1}, 'only one axis can be -1'),
    ({'fsdp': 0}, r'mesh.fsdp must be a number of devices, or -1 .*, not 0'),
    ({'data': -2}, 'mesh.data must be'),
    ({'data': 1.0}, 'mesh.data must be'),
    ({'data': True}, 'mesh.data must be'),
    ({'fdsp': 2}, r"Unknown mesh axis 'fdsp'. Did you mean 'fsdp'"),
  ],
)
def test_a_mesh_that_cannot_be_is_refused(shape, message):
  with pytest.raises(errors.UserError, match=message):
    sharding.make_mesh(shape)


@pytest.mark.parametrize('scan', [True, False])
def test_frozen_weights_of_layers_are_split_and_no_others(scan):
  shapes = trees.flatten(frozen_shapes('losa', scan=scan))
  mesh = sharding.make_mesh({'fsdp': 2})
  table = trees.flatten(sharding.frozen_shardings(trees.unflatten(shapes), mesh))
  assert set(table) == set(shapes)
  lead = 1 if scan else 0  # The axis of layers stays whole.
  for path, where in table.items():
    whole = shapes[path].shape
    parts = list(whole)
    if path.startswith('backbone/encoder/layers'):
      parts[lead] //= 2
    assert where.shard_shape(whole) == tuple(parts), path
  assert sum(not where.is_fully_replicated for where in table.values()) > 10


def test_an_axis_that_cannot_be_divided_stays_whole():
  shapes = {
    name: jax.ShapeDtypeStruct(shape, np.float32)
    for name, shape in {'a': (2, 5, 6), 'b': (2, 5), 'c': (2, 4, 6)}.items()
  }
  tree = {'backbone': {'encoder': {'layers': shapes}}}
  table = sharding.frozen_shardings(tree, sharding.make_mesh({'fsdp': 2}))
  table = table['backbone']['encoder']['layers']
  have = {name: where.shard_shape(shapes[name].shape) for name, where in table.items()}
  assert have == {'a': (2, 5, 3), 'b': (2, 5), 'c': (2, 2, 6)}


def test_without_fsdp_nothing_is_split_and_no_layer_gathers():
  mesh = sharding.make_mesh({})
  table = sharding.frozen_shardings(frozen_shapes('lora'), mesh)
  assert all(where.is_fully_replicated for where in jax.tree.leaves(table))
  assert sharding.gather(table, mesh) is None


def test_fsdp_with_nothing_to_split_is_refused():
  mesh = sharding.make_mesh({'fsdp': 2})
  with pytest.raises(errors.UserError, match=r'mesh.fsdp=2 .* this method trains them all'):
    sharding.frozen_shardings(frozen_shapes('full'), mesh)
  odd = {'backbone': {'encoder': {'layers': {'b': jax.ShapeDtypeStruct((2, 5), np.float32)}}}}
  with pytest.raises(errors.UserError, match='no axis of them can be divided'):
    sharding.frozen_shardings(odd, mesh)


def test_batch_sizes_are_multiples_of_all_devices():
  mesh = sharding.make_mesh({'fsdp': 2})
  sharding.check_batch_size('batch_size', 4, mesh)
  for size in (0, 3, -2):
    with pytest.raises(errors.UserError, match=f'batch_size {size} .* of 2 devices'):
      sharding.check_batch_size('batch_size', size, mesh)


def test_what_is_placed_is_what_is_fetched():
  mesh = sharding.make_mesh({'fsdp': 2})
  value = np.arange(12, dtype=np.float32).reshape(3, 4)
  table = {'split': jax.P(None, 'fsdp'), 'whole': jax.P()}
  placed = {
    name: sharding.place(value, jax.sharding.NamedSharding(mesh, spec))
    for name, spec in table.items()
  }
  parts = [np.asarray(shard.data) for shard in placed['split'].addressable_shards]
  assert np.array_equal(parts, [value[:, :2], value[:, 2:]])
  fetched = sharding.fetch({**placed, 'host': value})
  assert all(type(leaf) is np.ndarray and np.array_equal(leaf, value) for leaf in fetched.values())
  copies = sharding.replicate({'a': value, 'b': jnp.float32(3)}, mesh)
  assert all(len(leaf.addressable_shards) == 2 for leaf in copies.values())
  assert float(copies['b']) == 3 and np.array_equal(copies['a'].addressable_data(1), value)
  batch = sharding.put({'label': np.arange(4)}, mesh)['label']
  assert np.array_equal(batch.addressable_data(1), [2, 3])


@pytest.mark.parametrize(
  ('method', 'is_stored'), [('lora', True), pytest.param('losa', False, marks=pytest.mark.slow)]
)
def test_a_program_gives_the_same_numbers_on_both_axes(method, is_stored, stored):
  backbone = stored if is_stored else 'test/8'
  of_all, shared = (
    losses_of_meshes.losses(*losses_of_meshes.build(method, backbone, mesh))
    for mesh in ({}, {'fsdp': 2})
  )
  assert of_all['splits'] == 0 and shared['splits'] > 10
  assert of_all['frozen'] == shared['frozen']
  np.testing.assert_allclose(of_all['losses'], shared['losses'], rtol=0, atol=1e-5)
  assert np.ptp(of_all['losses'][:-1]) > 0.01


@pytest.mark.parametrize(
  ('method', 'is_stored', 'fsdp', 'scan'),
  [
    ('losa', True, 1, False),
    ('losa', True, 2, True),
    ('losa', False, 2, False),  # Its random weights are those of any mesh.
    ('vpt_deep', False, 1, True),
    ('vpt_deep', False, 2, True),
    ('noah', True, 2, False),  # Its layers differ.
  ],
)
def test_where_devices_share_weights_layers_are_scanned(method, is_stored, fsdp, scan, stored):
  config = ClassificationModel(None, {'num_classes': 5}).config
  config.update({'method': method, 'mesh': {'fsdp': fsdp}})
  config.backbone = stored if is_stored else 'test/8'
  assert ClassificationModel(config, {'num_classes': 5}).flax_model.scan == scan


@functools.cache
def compiled(method):
  """(text of the compiled train step of two devices that share weights, trainable shapes)."""
  model, mesh = model_of(method), sharding.make_mesh({'fsdp': 2})
  trainable, frozen = partition(model.param_shapes(), model.method)
  places = sharding.frozen_shardings(frozen, mesh)
  head, tx = ClassificationModel(None, {'num_classes': 5}), optax.sgd(0.1)
  step = functools.partial(
    steps.train_step,
    flax_model=model.clone(gather=sharding.gather(places, mesh)),
    loss_fn=head.loss_function,
    metrics_fn=head.get_metrics_fn_jit(),
    tx=tx,
  )
  state = jax.eval_shape(lambda t: TrainState.create(t, tx, jax.random.key(0)), trainable)
  batch = {
    'inputs': jax.ShapeDtypeStruct(model.input_shape(6), jnp.float32),
    'label': jax.ShapeDtypeStruct((6,), jnp.int32),
    'batch_mask': jax.ShapeDtypeStruct((6,), jnp.float32),
  }
  where = (sharding.replicated(mesh), places, sharding.batched(mesh))
  text = jax.jit(step, in_shardings=where, out_shardings=where[0]).lower(state, frozen, batch)
  return text.compile().as_text(), [leaf.shape for leaf in jax.tree.leaves(trainable)]


def collectives(text):
  """[(computation, operation, shapes of its results)]."""
  found, computation = [], ''
  for line in text.splitlines():
    if line and not line[0].isspace() and '{' in line:
      computation = line.removeprefix('ENTRY ').split()[0]
    match = re.match(r'\s+\S.* = (.*?) (all-\w+|reduce-scatter|collective-permute)[\w-]*\(', line)
    if match:
      shapes = re.findall(r'\w+\[([\d,]*)\]', match[1])
      found.append(
        (computation, match[2], [tuple(map(int, s.split(',') if s else ())) for s in shapes])
      )
  return found


@pytest.mark.parametrize('method', ['losa', 'lora', 'dora'])
def test_weights_are_gathered_layer_by_layer_and_only_gradients_are_summed(method):
  text, trainable = compiled(method)
  loops = set(re.findall(r'body=(%[\w.-]+)', text))
  gathers = [(c, shapes) for c, kind, shapes in collectives(text) if kind == 'all-gather']
  assert len(gathers) >= 16 and {computation for computation, _ in gathers} <= loops
  depth = SPEC.depth
  of_one_layer = {1, SPEC.width, SPEC.mlp}
  assert all(of_one_layer.issuperset(shape) for _, shapes in gathers for shape in shapes)
  # The forward loop gathers; where gradients pass through the layers, the backward loop does again.
  assert len({computation for computation, _ in gathers}) == (1 if method == 'losa' else 2)

  def size(shape):
    return tuple(sorted(n for n in shape if n > 1))

  trained = {size(shape) for shape in trainable}
  trained |= {size(shape[1:]) for shape in trainable if shape[:1] == (depth,)}
  if method == 'losa':  # Weights of all mixers of an axis are stacked, and sums those of one.
    trained |= {size(shape[1:]) for shape in trainable}
  sums = [
    shape for _, kind, shapes in collectives(text) if kind == 'all-reduce' for shape in shapes
  ]
  assert sums and {size(shape) for shape in sums} <= trained | {()}
  assert {kind for _, kind, _ in collectives(text)} == {'all-gather', 'all-reduce'}


@pytest.mark.parametrize('method', ['losa', 'lora', 'dora'])
def test_no_device_ever_holds_the_weights_of_all_layers(method):
  text, _ = compiled(method)
  depth, width, mlp = SPEC.depth, SPEC.width, SPEC.mlp
  assert f'f32[{depth},{width // 2},{mlp}]' in text
  assert f'f32[{depth},{width},{mlp}]' not in text


def run(devices, runs, **process):
  """Starts `losses_of_meshes` on so many devices."""
  keep = {k: v for k, v in os.environ.items() if not k.startswith(('JAX_', 'XLA_'))}
  environment = keep | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    'PYTHONPATH': str(pathlib.Path(__file__).parents[2]),
  }
  return subprocess.Popen(
    [sys.executable, losses_of_meshes.__file__, json.dumps({'runs': runs, **process})],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def results(process):
  out, err = process.communicate(timeout=600)
  assert process.returncode == 0, err
  return json.loads(out.splitlines()[-1])


def free_port():
  with socket.socket() as s:
    s.bind(('localhost', 0))
    return s.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize('method', ['losa', 'linear', 'lora', 'full', 'vpt_deep'])
def test_one_device_equals_eight_and_two_processes(method, stored):
  meshes = [{}] if method == 'full' else [{}, {'fsdp': 2}, {'fsdp': -1, 'data': 1}]

  def asked(meshes):
    pairs = [('test/8', meshes[-1]), *((stored, mesh) for mesh in meshes)]
    return [{'method': method, 'backbone': backbone, 'mesh': mesh} for backbone, mesh in pairs]

  ones = results(run(1, asked([{}])))
  eight = results(run(8, asked(meshes)))
  address = f'localhost:{free_port()}'
  processes = [run(2, asked(meshes), address=address, count=2, index=index) for index in range(2)]
  first, second = map(results, processes)
  assert first == second
  for many in (eight, first):
    for i, result in enumerate(many):
      one, splits = ones[min(i, 1)], i != 1 and len(meshes) > 1
      np.testing.assert_allclose(result['losses'], one['losses'], rtol=0, atol=1e-5)
      assert result['frozen'] == one['frozen']
      assert (result['splits'] > 10) == splits
