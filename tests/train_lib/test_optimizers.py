"""Optimizers against a few lines of numpy; what weight decay leaves alone; clipping."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from losa_scenic.adapt_lib import methods
from losa_scenic.adapt_lib.method import partition
from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib import presets
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.train_lib import optimizers

STEPS = 5


def rate(step):
  return 0.1 / (1 + step)


def optimizer(name: str, max_grad_norm: float | None = None, **options):
  config = ml_collections.ConfigDict({'optimizer': name, 'optimizer_configs': options})
  if max_grad_norm:
    config.max_grad_norm = max_grad_norm
  return optimizers.get_optimizer(config, rate)


def problem() -> tuple[dict, list[dict]]:
  """Parameters, one decayed and one not, and the gradients of each step."""
  rng = np.random.default_rng(0)

  def draw() -> dict:
    return {'kernel': rng.standard_normal((3, 2)), 'bias': rng.standard_normal(2)}

  return draw(), [draw() for _ in range(STEPS)]


def updated(tx: optax.GradientTransformation) -> dict[str, np.ndarray]:
  params, grads = problem()
  params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
  state = tx.init(params)
  for grad in grads:
    grad = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), grad)
    updates, state = tx.update(grad, state, params)
    params = optax.apply_updates(params, updates)
  return {name: np.asarray(leaf) for name, leaf in params.items()}


@pytest.mark.parametrize('nesterov', [False, True])
def test_momentum_against_numpy(nesterov):
  params, grads = problem()
  trace = {key: np.zeros_like(value) for key, value in params.items()}
  for step, grad in enumerate(grads):
    for key in params:
      g = grad[key] + (0.3 * params[key] if key == 'kernel' else 0)
      trace[key] = g + 0.8 * trace[key]
      params[key] = params[key] - rate(step) * (g + 0.8 * trace[key] if nesterov else trace[key])
  have = updated(optimizer('momentum', momentum=0.8, weight_decay=0.3, nesterov=nesterov))
  for key in params:
    np.testing.assert_allclose(have[key], params[key], rtol=1e-5, atol=1e-6)


def test_sgd_against_numpy():
  params, grads = problem()
  for step, grad in enumerate(grads):
    for key in params:
      decay = 0.3 * params[key] if key == 'kernel' else 0
      params[key] = params[key] - rate(step) * (grad[key] + decay)
  have = updated(optimizer('sgd', weight_decay=0.3))
  for key in params:
    np.testing.assert_allclose(have[key], params[key], rtol=1e-5, atol=1e-6)


def test_adamw_against_numpy():
  params, grads = problem()
  first = {key: np.zeros_like(value) for key, value in params.items()}
  second = {key: np.zeros_like(value) for key, value in params.items()}
  for step, grad in enumerate(grads):
    for key, g in grad.items():
      first[key] = 0.8 * first[key] + 0.2 * g
      second[key] = 0.95 * second[key] + 0.05 * g**2
      m = first[key] / (1 - 0.8 ** (step + 1))
      v = second[key] / (1 - 0.95 ** (step + 1))
      decay = 0.3 * params[key] if key == 'kernel' else 0
      params[key] = params[key] - rate(step) * (m / (np.sqrt(v) + 1e-6) + decay)
  have = updated(optimizer('adamw', beta1=0.8, beta2=0.95, epsilon=1e-6, weight_decay=0.3))
  for key in params:
    np.testing.assert_allclose(have[key], params[key], rtol=1e-5, atol=1e-6)


def test_gradients_are_clipped_by_their_global_norm():
  grads = {'kernel': jnp.full((3, 2), 3.0), 'bias': jnp.full(2, 3.0)}
  params = jax.tree.map(jnp.zeros_like, grads)
  for limit, expected in ((1.0, 1.0), (100.0, float(optax.tree.norm(grads)))):
    tx = optimizer('momentum', max_grad_norm=limit, momentum=0.0)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert float(optax.tree.norm(updates)) == pytest.approx(0.1 * expected, rel=1e-5)
  direction = updates['bias'][0] / updates['kernel'][0, 0]
  assert float(direction) == pytest.approx(1.0)


def shapes(method: str, scan: bool, pool: str, **options) -> dict:
  spec = presets.preset('test/8', pool=pool)
  model = Adapted(
    spec=spec,
    method=methods.build(method, spec, options),
    num_classes=5,
    dtype=jnp.float32,
    scan=scan,
  )
  return partition(model.param_shapes(), model.method)[0]


def decayed(params: dict) -> dict[str, bool]:
  return trees.flatten(optimizers.decay_mask(params))


@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.parametrize('pool', ['cls', 'map'])
@pytest.mark.parametrize('method', ['full', 'losa'])
def test_only_matrices_are_decayed(method, scan, pool):
  table = decayed(shapes(method, scan, pool))
  for path, decays in table.items():
    name = path.split('/')[-1]
    assert decays == (name.endswith('kernel')), path
  assert any(table.values())
  assert not all(table.values())


@pytest.mark.parametrize(
  ('method', 'spared', 'decays'),
  [
    ('vera', ('lambda_d', 'lambda_b'), ()),
    ('ssf', ('scale', 'shift'), ()),
    ('dora', ('magnitude_bias',), ('a', 'b')),
    ('vpt_deep', (), ('prompts',)),
  ],
)
def test_vectors_of_methods_are_not_decayed_and_prompts_are(method, spared, decays):
  table = decayed(shapes(method, True, 'cls'))
  ours = {path: on for path, on in table.items() if 'insert_' in path}
  names = {path.split('/')[-1]: on for path, on in ours.items()}
  assert names == dict.fromkeys(spared, False) | dict.fromkeys(decays, True)


@pytest.mark.parametrize('pool', ['cls', 'map'])
def test_decay_does_not_depend_on_how_layers_are_run(pool):
  stacked = decayed(shapes('full', True, pool))
  unrolled = decayed(shapes('full', False, pool))
  names = {}
  for path, decays in unrolled.items():
    parts = ['layers' if part.startswith('layers_') else part for part in path.split('/')]
    names.setdefault('/'.join(parts), set()).add(decays)
  assert {path: {decays} for path, decays in stacked.items()} == names


@pytest.mark.parametrize(
  'name,options,part',
  [
    ('adamW', {}, "Did you mean 'adamw'"),
    ('momentum', {'beta1': 0.9}, "option of optimizer 'momentum' 'beta1'"),
    ('adamw', {'weight_deca': 0.9}, "Did you mean 'weight_decay'"),
  ],
)
def test_refused(name, options, part):
  with pytest.raises(errors.UserError, match=part):
    optimizer(name, **options)
