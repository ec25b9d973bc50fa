"""The contract that every registered method keeps, on a tiny backbone."""

import functools
import inspect
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import kinds
from reference.kinds import batch_of

from losa_scenic.adapt_lib import methods
from losa_scenic.adapt_lib.method import BACKBONE, combine, partition, split_head
from losa_scenic.common_lib import config, errors, trees
from losa_scenic.model_lib import encoder, presets
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.classification_model import ClassificationModel
from losa_scenic.model_lib.vit import ViT
from losa_scenic.train_lib import run_config, sharding, steps
from losa_scenic.train_lib.checkpoints import Checkpoints
from losa_scenic.train_lib.state import TrainState

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / 'tests' / 'golden' / 'param_counts.json').read_text())['rows']
CLASSES = 5
NAMES = sorted(methods.METHODS)
# Options that fit a backbone of three layers, or compile faster than the defaults.
OPTIONS = {'hst': {'stages': 3}, 'temporal': {'depth': 1}}
FACTORISED = {'factorised': True}
VIDEO = 'vivit-test/8x2'  # with a MAP head and without a class token
BACKBONES = {'images': ('test/8', {}), 'clips': (VIDEO, {}), 'factorised': (VIDEO, FACTORISED)}


# (method, options, backbone, `BackboneSpec` changes). A new method appears by itself.
CASES = [
  *(
    (name, OPTIONS.get(name, {}), *backbone)
    for kind, backbone in BACKBONES.items()
    for name in NAMES
    if kind in kinds.of(name)
  ),
  ('losa', {}, 'test/8', {'pool': 'gap'}),
  ('full', {'token_keep': 0.5}, 'test/8', {'pool': 'cls'}),
  (
    'losa',
    {'adaptor': 'low_rank_mlp', 'num_layers': 2},
    'test/8',
    {'pool': 'gap', 'class_token': True},
  ),
  ('losa', {'activation': 'both', 'rank': 3}, 'test/8', {'pool': 'cls'}),
  ('losa', {'adaptor': 'transformer', 'transformer_width': 8}, 'test/8', {'pool': 'cls'}),
  ('losa', {'y0': 'b_0', 'activation': 'mhsa'}, 'test/8', {'pool': 'cls'}),
  ('losa', {'map_head_lora_rank': 2}, 'test/8', {'pool': 'map', 'class_token': True}),
]
# Compiling a training step takes seconds: of clips, a few methods always, all with -m slow.
QUICK = {
  'clips': ['full', 'linear', 'losa', 'st_adapter', 'vpt_deep'],
  'factorised': ['losa', 'st_adapter', 'temporal'],
}


def slow(case, untrained=()):
  """Whether only -m slow runs the case; of the kinds in `untrained` no step is compiled."""
  kind = next((kind for kind in ('clips', 'factorised') if case[2:] == BACKBONES[kind]), None)
  return kind is not None and kind not in untrained and case[0] not in QUICK[kind]


def every(untrained=()):
  """Parametrizes a test over all cases."""
  marks = [pytest.mark.slow if slow(case, untrained) else () for case in CASES]
  return pytest.mark.parametrize(
    ('method', 'options', 'backbone', 'changes'),
    [pytest.param(*case, marks=mark) for case, mark in zip(CASES, marks, strict=True)],
    ids=['-'.join([m, b.split('/')[0], *map(str, (o | c).values())]) for m, o, b, c in CASES],
  )


every_case, every_trained_case = every(untrained=('clips',)), every()
SAVED = ('full', 'hst', 'linear', 'losa', 'noah', 'repadapter', 'toast', 'vera', 'vpt_deep')
SHARED = ('adapter', 'full', 'hst', 'last_k', 'linear', 'lora', 'losa', 'noah', 'toast', 'vpt_deep')
one_case_per_method = pytest.mark.parametrize('method', NAMES)


def adapted(method, options=None, backbone='test/8', changes=None, **execution):
  """The model; its layers are scanned if they can be, unless `execution` says otherwise.

  Without `changes`, its backbone is of a kind that the method is for.
  """
  spec = presets.preset(backbone, **(kinds.changes(method) if changes is None else changes))
  built = methods.build(method, spec, OPTIONS.get(method) if options is None else options)
  return Adapted(spec, built, CLASSES, **{'scan': not built.unrolled, **execution})


def variables(model, params):
  """Parameters with the model's other variables at their start."""
  return {'params': params, **model.init_model_state()}


def of_plain_backbone(params):
  """The subtree of an adapted model's parameters that belongs to the plain backbone."""
  flat = trees.flatten(params[BACKBONE])
  plain = {p: v for p, v in flat.items() if not any(c.startswith('insert_') for c in p.split('/'))}
  return trees.unflatten(plain)


def count_without_head(model):
  return trees.count(split_head(partition(model.param_shapes(), model.method)[0])[0])


def train(model, trainable, frozen, batches, tx, mesh=None):
  """The state after the real train step on each batch."""
  state = TrainState.create(trainable, tx, jax.random.key(1), model.init_model_state())
  if mesh is not None:
    places = sharding.frozen_shardings(frozen, mesh)
    model = model.clone(gather=sharding.gather(places, mesh))
    state, frozen = sharding.replicate(state, mesh), jax.tree.map(sharding.place, frozen, places)
    batches = [sharding.put(batch, mesh) for batch in batches]
  classification = ClassificationModel(None, {'num_classes': CLASSES})
  step = jax.jit(
    functools.partial(
      steps.train_step,
      flax_model=model,
      loss_fn=classification.loss_function,
      metrics_fn=classification.get_metrics_fn_jit(),
      tx=tx,
    )
  )
  for batch in batches:
    state, _ = step(state, frozen, batch)
  return state, frozen


@pytest.fixture(scope='module')
def start(random_like):
  """`fn(method, options, backbone, changes)` -> (model, trainable, frozen), made once."""

  @functools.cache
  def make(key):
    model = adapted(*json.loads(key))
    trainable = model.init_trainable(jax.random.key(0))
    frozen = partition(model.param_shapes(), model.method)[1]
    return model, *jax.tree.map(np.asarray, (trainable, random_like(frozen)))

  return lambda *case: make(json.dumps(case))


@pytest.mark.parametrize('kind', kinds.KINDS)
@one_case_per_method
def test_a_backbone_of_a_kind_that_the_method_is_not_for_is_refused(method, kind):
  backbone, changes = BACKBONES[kind]
  spec = presets.preset(backbone, **changes)
  if kind in kinds.of(method):
    methods.build(method, spec, OPTIONS.get(method))
  else:
    with pytest.raises(errors.UserError, match=r'for (images|clips)|factorised'):
      methods.build(method, spec, OPTIONS.get(method))


@every_trained_case
def test_features_equal_the_frozen_models_at_init(
  method, options, backbone, changes, start, make_batch
):
  model, trainable, frozen = start(method, options, backbone, changes)
  params = combine(trainable, frozen)
  if model.scan:  # Scanned layers are compiled for each case, single operations once for all.
    model, params = model.clone(scan=False), encoder.unstack_layers(params)
  images = batch_of(model, make_batch, 2)['inputs']
  ours = model.apply(variables(model, params), images, method=model.features)
  plain = ViT(model.spec, {}).apply({'params': of_plain_backbone(params)}, images)
  # A compiler may order the sums of two programs differently; any weight that is not at its start
  # makes far more of a difference.
  same_shape = ours.shape == plain.shape
  difference = np.abs(ours - plain).max() / np.abs(plain).max() if same_shape else np.inf
  assert (difference < 1e-6) if model.method.exact_at_init else (difference > 1e-4)


@every_case
@pytest.mark.parametrize('scan', [False, True], ids=['unroll', 'scan'])
def test_frozen_paths_and_shapes_are_the_plain_backbones_minus_what_trains(
  method, options, backbone, changes, scan
):
  spec = presets.preset(backbone, **changes)
  if scan and methods.build(method, spec, options).unrolled:
    with pytest.raises(errors.UserError, match='treats layers differently'):
      adapted(method, options, backbone, changes, scan=True).param_shapes()
    return
  model = adapted(method, options, backbone, changes, scan=scan)
  plain = ViT(model.spec, {}, scan=scan)
  inputs = jax.ShapeDtypeStruct(model.input_shape(), jnp.float32)
  plain = trees.describe(jax.eval_shape(plain.init, jax.random.key(0), inputs)['params'])
  trainable, frozen = partition(model.param_shapes(), model.method)
  frozen = trees.describe(frozen.get(BACKBONE, {}))
  ours = {p: v for p, v in plain.items() if model.method.trains(p)}
  assert frozen == {p: v for p, v in plain.items() if p not in ours}
  assert trees.describe(of_plain_backbone({BACKBONE: {}} | trainable)) == ours


def golden_rows():
  """Of a large backbone and a method the first row always, all with -m slow: each takes seconds."""
  met = set()
  for row in GOLDEN:
    kind = (row['backbone'], row['method'])
    marks = pytest.mark.slow if kind in met and kind[0].startswith(('g/', 'vivit-')) else ()
    met.add(kind)
    name = '-'.join([*kind, *map(str, row['set'].values())])
    yield pytest.param(row, marks=marks, id=name)


@pytest.mark.parametrize('row', golden_rows())
def test_number_of_trainable_parameters(row):
  changes = row.get('backbone_options', {})
  model = adapted(row['method'], row['set'], row['backbone'], changes)
  assert count_without_head(model) == row['trainable_params']


@pytest.mark.parametrize('backbone', ['G/14', 'e/14'])
def test_number_of_trainable_parameters_of_the_largest_backbones(backbone):
  spec = presets.preset(backbone)
  options = {'rank': 64, 'map_head_lora_rank': 32}
  model = Adapted(spec, methods.build('losa', spec, options), CLASSES, scan=True)
  d, n, pairs = spec.width, 256, spec.depth // 2
  pair = (2 * d * 64 + 64 + d + 1) + (2 * n * 64 + 64 + n + 1)
  assert count_without_head(model) == pairs * pair + 5 * 2 * 32 * d


def test_every_method_has_a_known_parameter_count():
  assert {row['method'] for row in GOLDEN} == set(methods.METHODS)


@every_trained_case
def test_what_trains_moves_within_three_steps_and_nothing_else(
  method, options, backbone, changes, start, make_batch
):
  model, trainable, frozen = start(method, options, backbone, changes)
  batches = [batch_of(model, make_batch, 4, seed=i) for i in range(3)]
  tx = optax.adamw(1e-3, weight_decay=0.0)
  state, after = train(model, trainable, jax.tree.map(jnp.asarray, frozen), batches, tx)
  assert trees.digest(after) == trees.digest(frozen)
  check_moves(trainable, state)
  check_optimizer_state(trainable, state)


def check_moves(trainable, state):
  before, after = trees.flatten(trainable), trees.flatten(state.trainable)
  assert set(before) == set(after)
  # A bias on all keys shifts each row of logits by a constant, which the softmax does not see.
  ours = [path for path in before if not path.endswith('key/bias')]
  still = [path for path in ours if np.array_equal(before[path], after[path])]
  assert ours and not still
  assert all(np.isfinite(leaf).all() for leaf in after.values())


def check_optimizer_state(before, state):
  """No moments of frozen leaves."""
  moments = [leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim or leaf.size > 1]
  scalars = [leaf for leaf in jax.tree.leaves(before) if not leaf.ndim]
  assert sorted(moments) == sorted(
    2 * [leaf.shape for leaf in jax.tree.leaves(before) if leaf.ndim]
  )
  others = len(jax.tree.leaves(state.opt_state)) - len(moments) - 2 * len(scalars)
  assert 1 <= others <= 2, 'step counters'


@pytest.mark.parametrize(
  'method',
  # What is saved is two trees, whatever the method: a few always, those with states of their own.
  [pytest.param(m, marks=() if m in SAVED else pytest.mark.slow) for m in NAMES],
)
def test_checkpoint_round_trip_holds_no_backbone(method, tmp_path, random_like, make_batch):
  model = adapted(method, changes={'mlp': 4096, **kinds.changes(method)})
  trainable, frozen = random_like(partition(model.param_shapes(), model.method))
  tx, images = optax.adamw(1e-3), batch_of(model, make_batch, 2)['inputs']
  more = model.init_model_state()
  state = TrainState.create(jax.tree.map(jnp.asarray, trainable), tx, jax.random.key(0), more)
  writer = Checkpoints(tmp_path, {'backbone': 'test/8', 'method': method})
  writer.save(state)
  writer.close()
  reader = Checkpoints(tmp_path, {'backbone': 'test/8', 'method': method})
  zeros = jax.tree.map(jnp.zeros_like, (state.trainable, more))
  like = TrainState.create(zeros[0], tx, jax.random.key(9), zeros[1])
  restored, _ = reader.restore(like)
  reader.close()
  logits = [
    model.apply({'params': combine(tree, frozen), **other}, images)
    for tree, other in ((trainable, more), (restored.trainable, restored.model_state))
  ]
  assert np.array_equal(*logits) and np.ptp(logits[0]) > 0
  size = sum(path.stat().st_size for path in tmp_path.rglob('*') if path.is_file())
  overhead = 200_000  # JSON
  assert size < 3 * 4 * trees.count(trainable) + overhead
  if trees.count(frozen) > 16 * trees.count(trainable):
    assert size < 4 * trees.count(frozen) / 4, 'the test could not tell if the backbone were in it'


@pytest.mark.parametrize(
  'method',
  # Two programs each. How weights are shared is not the methods' affair: one of each sort always.
  [pytest.param(m, marks=() if m in SHARED else pytest.mark.slow) for m in NAMES],
)
def test_one_device_equals_two(method, random_like, make_batch):
  model = adapted(method, {'rank': 2} if method == 'losa' else None)
  trainable, frozen = random_like(partition(model.param_shapes(), model.method))
  # SGD, because Adam turns the rounding of a gradient that should be 0 into a step of full size.
  tx, batches = optax.sgd(1e-2), [batch_of(model, make_batch, 4, seed=i) for i in range(3)]
  # HST divides by the standard deviation of four images: that amplifies rounding.
  tolerance = 1e-4 if method == 'hst' else 1e-5
  # The two share the frozen weights of the layers, if there are any.
  shared = any(path.startswith('backbone/encoder/layers') for path in trees.flatten(frozen))
  states = []
  for n in (1, 2):
    mesh = sharding.make_mesh({'fsdp': n if shared else 1}, jax.devices('cpu')[:n])
    assert mesh.size == n
    states.append(train(model, trainable, frozen, batches, tx, mesh)[0].trainable)
  for one, two, start in zip(*map(jax.tree.leaves, (*states, trainable)), strict=True):
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=tolerance)
    assert one.shape == start.shape


@one_case_per_method
def test_method_is_registered_in_config_and_readme(method):
  build = methods.METHODS[method]
  block = run_config.default_config().method_configs[method]
  assert set(block) == config.options(build), 'method_configs and the options of the method'
  assert method in run_config.default_config().method_learning_rates
  assert f'`{method}`' in (ROOT / 'README.md').read_text()
  assert inspect.getdoc(build), 'a docstring names the options'
