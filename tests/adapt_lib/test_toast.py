"""TOAST's two passes against a ViT in NumPy."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from losa_scenic.adapt_lib import inserts, methods
from losa_scenic.adapt_lib.method import Method, partition, split_head
from losa_scenic.bench_lib import cost
from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib import presets
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.vit import ViT


def build(method='toast', scan=False, pool='cls', **options):
  spec = presets.preset('test/8', pool=pool)
  return Adapted(spec, methods.build(method, spec, options), 5, scan=scan)


def linear(p, x):
  return x @ p['kernel'] + p['bias']


def norm(p, x):
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
  return x * p['scale'] + p['bias']


def block(p, x, heads, fed_back):
  u = norm(p['norm1'], x)
  split = lambda y: y.reshape(*u.shape[:2], heads, -1)  # noqa: E731
  q, k, v = split(linear(p['query'], u)), split(linear(p['key'], u)), linear(p['value'], u)
  v = split(v + fed_back)
  scores = np.exp(np.einsum('bqhe,bkhe->bhqk', q, k) / np.sqrt(q.shape[-1]))
  mixed = np.einsum('bhqk,bkhe->bqhe', scores / scores.sum(-1, keepdims=True), v)
  x = x + linear(p['out'], mixed.reshape(u.shape))
  x_ = linear(p['fc1'], norm(p['norm2'], x))
  x_ = 0.5 * x_ * (1 + np.tanh(np.sqrt(2 / np.pi) * (x_ + 0.044715 * x_**3)))
  return x + linear(p['fc2'], x_)


def encode(p, x, heads, fed_back):
  for i, t in enumerate(fed_back):
    x = block(p['encoder'][f'layers_{i}']['block'], x, heads, t)
  return norm(p['norm'], x)


def matrices(p, name, depth):
  """A_l or B_l of every layer."""
  if f'{name}_kernel' in p:
    return p[f'{name}_kernel']
  low_rank = np.einsum('ldr,lre->lde', p[f'{name}_down_kernel'], p[f'{name}_up_kernel'])
  return low_rank + np.eye(low_rank.shape[-1]) if name == 'a' else low_rank


@pytest.mark.parametrize('value_bias', [False, True])
@pytest.mark.parametrize(('method', 'options'), [('toast', {}), ('toast_lite', {'rank': 2})])
def test_features_equal_the_equations(method, options, value_bias, random_like, make_batch):
  model, images = build(method, value_bias=value_bias, **options), make_batch(2)['inputs']
  params, depth = random_like(model.param_shapes(), scale=0.3), model.spec.depth
  params['side'] = random_like(params['side'], scale=0.7 if method == 'toast_lite' else 0.3)
  plain = ViT(model.spec, {})
  embedded = plain.apply({'params': params['backbone']}, images, method='encode').embedded
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  p, side, x = p['backbone'], p['side'], np.asarray(embedded, np.float64)
  first = encode(p, x, model.spec.heads, [0.0] * depth)
  # Between two tokens, so that it selects some and not others.
  one, other = (token / np.linalg.norm(token) for token in first[0, :2])
  params['side']['xi'] = (one - other).astype(np.float32)
  side['xi'] = np.asarray(params['side']['xi'], np.float64)
  have = model.apply({'params': params}, images, method=model.features)
  length = np.linalg.norm(first, axis=-1) * np.linalg.norm(side['xi'])
  w = np.clip((first @ side['xi']) / length, 0, 1)
  assert 0 < (w > 0).mean() < 1
  z = (w[..., None] * first) @ side.get('p_kernel', np.eye(model.spec.width))
  fed_back = [0.0] * depth
  for i in reversed(range(depth)):
    z = z @ matrices(side, 'a', depth)[i]
    value = p['encoder'][f'layers_{i}']['block']['value']
    fed_back[i] = z @ matrices(side, 'b', depth)[i] @ value['kernel'] + value_bias * value['bias']
  want = encode(p, x, model.spec.heads, fed_back)[:, 0]
  np.testing.assert_allclose(have, want, rtol=1e-3, atol=1e-3)
  assert np.abs(want - first[:, 0]).max() > 0.1, 'the feedback must matter in this test'


@pytest.mark.parametrize('method', ['toast', 'toast_lite'])
@pytest.mark.parametrize('pool', ['gap', 'map'])
@pytest.mark.parametrize('scan', [False, True])
def test_starts_as_the_frozen_model(method, pool, scan, random_like, make_batch):
  model, images = build(method, scan, pool), make_batch(2)['inputs']
  params = random_like(model.param_shapes()) | model.init_trainable(jax.random.key(0))
  have = model.apply({'params': params}, images, method=model.features)
  plain = ViT(model.spec, {}, scan=scan)
  assert model.method.exact_at_init
  assert np.array_equal(have, plain.apply({'params': params['backbone']}, images))


def test_with_the_value_bias_it_starts_with_twice_that_bias(random_like, make_batch):
  model, images = build(value_bias=True), make_batch(2)['inputs']
  params = random_like(model.param_shapes()) | model.init_trainable(jax.random.key(0))
  have = model.apply({'params': params}, images, method=model.features)
  doubled = {
    path: (2 if path.endswith('value/bias') else 1) * leaf
    for path, leaf in trees.flatten(params['backbone']).items()
  }
  want = ViT(model.spec, {}).apply({'params': trees.unflatten(doubled)}, images)
  np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)
  assert not model.method.exact_at_init


def test_released_initialisation_is_random():
  side = build(init='released').init_trainable(jax.random.key(0))['side']
  assert all(0.015 < np.std(side[name]) < 0.025 for name in ('a_kernel', 'b_kernel'))
  assert not build(init='released').method.exact_at_init


def test_identity_without_a_tuned_decoder():
  side = build().init_trainable(jax.random.key(0))['side']
  assert np.array_equal(side['a_kernel'], np.broadcast_to(np.eye(32), (3, 32, 32)))
  assert not np.any(side['b_kernel'])
  assert set(side) == {'a_kernel', 'b_kernel', 'xi'}, 'P does not train'
  lite = build('toast_lite').init_trainable(jax.random.key(0))['side']
  assert np.array_equal(lite['p_kernel'], np.eye(32))


def test_parameter_count_formulas():
  d, depth, r = 32, 3, 2
  wanted = {'toast': 2 * depth * d * d + d, 'toast_lite': 4 * depth * d * r + d * d + d}
  for method, want in wanted.items():
    model = build(method, **({'rank': r} if method == 'toast_lite' else {}))
    trainable, _ = partition(model.param_shapes(), model.method)
    assert trees.count(split_head(trainable)[0]) == want
    assert set(trainable) == {'side', 'output_projection'}


@pytest.mark.parametrize(
  ('method', 'options', 'message'),
  [
    ('toast', {'init': 'zeros'}, "Did you mean 'zero'"),
    ('toast', {'rank': 4}, "Unknown option of method 'toast' 'rank'"),
    ('toast_lite', {'rank': 0}, 'rank must be at least 1, got 0'),
  ],
)
def test_a_bad_option_is_a_user_error(method, options, message):
  with pytest.raises(errors.UserError, match=message):
    build(method, **options)


def test_the_first_pass_keeps_no_activations():
  spec = presets.preset('test/8')
  one_pass = Method(inserts={'value': functools.partial(inserts.LowRank, 2)})
  hidden = (8, spec.tokens, spec.mlp)
  kept = [
    collections.Counter(shape for shape, _ in cost.residuals(model, 8))[hidden]
    for model in (build(), Adapted(spec, one_pass, 5))
  ]
  assert kept[0] == kept[1] > 0
  assert build().method.memory_class == 'C'


def test_feedback_reaches_bfloat16_compute_in_that_dtype(random_like, make_batch):
  model = build().clone(dtype=jnp.bfloat16)
  params = random_like(model.param_shapes())
  features = model.apply({'params': params}, make_batch(2)['inputs'], method=model.features)
  assert features.dtype == jnp.bfloat16
