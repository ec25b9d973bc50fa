"""HST against NumPy: the meta tokens in the backbone, and the pyramid beside it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from losa_scenic.adapt_lib import hst, methods
from losa_scenic.adapt_lib.method import partition, split_head
from losa_scenic.bench_lib import cost
from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib import presets, vit
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.sites import Ctx


def build(stages=3, meta_tokens=2, scan=False, **changes):
  spec = presets.preset('test/8', **changes)
  options = {'stages': stages, 'meta_tokens': meta_tokens}
  return Adapted(spec, methods.build('hst', spec, options), 5, scan=scan)


def linear(p, x):
  return x @ p['kernel'] + p['bias']


def norm(p, x, eps=1e-6):
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
  return x * p['scale'] + p['bias']


def gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def conv(p, x, padding):
  """Stride 2."""
  size, (b, h, w, _) = p['kernel'].shape[0], x.shape
  x = np.pad(x, ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
  shape = [(n + 2 * padding - size) // 2 + 1 for n in (h, w)]
  y = np.zeros((b, *shape, p['kernel'].shape[-1]))
  for i in range(shape[0]):
    for j in range(shape[1]):
      window = x[:, 2 * i : 2 * i + size, 2 * j : 2 * j + size]
      y[:, i, j] = np.einsum('bhwc,hwcd->bd', window, p['kernel'])
  return y + p.get('bias', 0)


def resize(x, size):
  """Bilinear, pixel centres at halves, what lies outside taken from the edge; [b n n c]."""
  n, y = x.shape[1], x
  for axis in (1, 2):
    at = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
    low = np.floor(at).astype(int)
    share = (at - low).reshape([-1 if a == axis else 1 for a in range(4)])
    high = np.minimum(low + 1, n - 1)
    y = (1 - share) * np.take(y, low, axis) + share * np.take(y, high, axis)
  return y


def attention(p, x, context, heads):
  split = lambda y: y.reshape(*y.shape[:2], heads, -1)  # noqa: E731
  q, k, v = (
    split(linear(p[n], u)) for n, u in (('query', x), ('key', context), ('value', context))
  )
  scores = np.exp(np.einsum('bqhe,bkhe->bhqk', q, k) / np.sqrt(q.shape[-1]))
  mixed = np.einsum('bhqk,bkhe->bqhe', scores / scores.sum(-1, keepdims=True), v)
  return linear(p['out'], mixed.reshape(x.shape))


def pyramid(p, stats, images, grids, metas, stages):
  """Eval mode; `grids` [b h w d] and `metas` [b m d] of every block, `stages` its stage."""
  p, stats = jax.tree.map(lambda a: np.asarray(a, np.float64), (p, stats))
  s = images.astype(np.float64)
  for stage in sorted(set(stages)):
    if stage == 0:
      s, bn = conv(p['stem']['conv1'], s, 1), stats['stem']['bn']
      s = (s - bn['mean']) / np.sqrt(bn['var'] + 1e-5)
      s = np.maximum(s * p['stem']['bn']['scale'] + p['stem']['bn']['bias'], 0)
      s = norm(p['stem']['norm'], conv(p['stem']['conv2'], s, 0))
    else:
      s = norm(p[f'down_norm_{stage}'], conv(p[f'down_{stage}'], s, 1))
    shape, bridge = s.shape, p[f'bridge_{stage}']
    s = s.reshape(shape[0], -1, shape[-1])
    for i in (i for i, of in enumerate(stages) if of == stage):
      block = p[f'block_{i}']
      features = linear(bridge, resize(grids[i], shape[1])).reshape(s.shape)
      meta = norm(p[f'meta_norm_{i}'], linear(bridge, metas[i]))
      context = np.concatenate([meta, features.mean(1, keepdims=True)], axis=1)
      s = s + attention(block, norm(block['norm1'], s), context, hst.HEADS[stage])
      s = s + features
      s = s + linear(block['fc2'], gelu(linear(block['fc1'], norm(block['norm2'], s))))
    s = norm(p[f'norm_{stage}'], s).reshape(shape)
  return (s.mean((1, 2)) - stats['bn']['mean']) / np.sqrt(stats['bn']['var'] + 1e-6)


def random_stats(model):
  rng = np.random.default_rng(5)
  return jax.tree.map(
    lambda a: rng.uniform(0.5, 1.5, a.shape).astype(np.float32), model.init_model_state()
  )


@pytest.mark.parametrize('scan', [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
  ('stages', 'stage_of', 'changes'),
  [(3, (0, 1, 2), {}), (2, (0, 0, 1), {'pool': 'map', 'image_size': 40})],
)
def test_side_network_equals_numpy(stages, stage_of, changes, scan, random_like):
  model = build(stages, scan=scan, **changes)
  params, state = random_like(model.param_shapes(), scale=0.3), random_stats(model)
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, model.input_shape(2)).astype(np.uint8)
  variables = {'params': params, **state}
  have = model.apply(variables, images, method=model.features)
  encoded = model.apply(variables, images, method=lambda m, x: m.backbone.encode(x))
  side = model.spec.image_size // 8
  tokens = [np.asarray(b, np.float64)[:, model.spec.prefix :] for b in encoded.layers['block']]
  assert {t.shape for t in tokens} == {(2, side * side, 32)}
  grids = [t.reshape(2, side, side, 32) for t in tokens]
  metas = [np.asarray(g, np.float64) for g in encoded.layers['meta']]
  assert {g.shape for g in metas} == {(2, 2, 32)}
  images = np.asarray(vit.normalize(jnp.asarray(images), model.spec))
  stats = state['batch_stats']['side']
  want = pyramid(params['side'], stats, images, grids, metas, stage_of)
  np.testing.assert_allclose(have, want, rtol=2e-4, atol=2e-4)


def test_meta_tokens_take_part_in_the_block_and_leave_it(random_like):
  x = np.random.default_rng(0).standard_normal((2, 5, 4)).astype(np.float32)
  mix = np.random.default_rng(1).standard_normal((8, 8)).astype(np.float32)
  seen = {}
  ctx = Ctx(grid=(1, 2, 2), prefix=1, record=seen.__setitem__)
  f = lambda x: jnp.einsum('nm,bmd->bnd', mix, x)  # noqa: E731
  module = hst.MetaTokens(3)
  p = random_like(jax.eval_shape(lambda: module.init(jax.random.key(0), f, x, ctx)))
  have = module.apply(p, f, x, ctx)
  meta = np.broadcast_to(p['params']['meta'], (2, 3, 4))
  want = np.einsum('nm,bmd->bnd', mix, np.concatenate([x, meta], axis=1))
  np.testing.assert_allclose(have, want[:, :5], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(seen['meta'], want[:, 5:], rtol=1e-5, atol=1e-5)


def test_blocks_see_the_meta_tokens_but_the_embedding_does_not(random_like, make_batch):
  model, images = build(meta_tokens=1), make_batch(2)['inputs']
  params = random_like(model.param_shapes())
  variables = {'params': params, **model.init_model_state()}
  ours = model.apply(variables, images, method=lambda m, x: m.backbone.encode(x))
  plain = vit.ViT(model.spec, {}, ('block',)).apply(
    {'params': params['backbone']}, images, method='encode'
  )
  assert np.abs(ours.tokens - plain.tokens).max() > 1e-2
  np.testing.assert_array_equal(ours.embedded, plain.embedded)


def test_what_trains():
  model = build()
  trainable, frozen = partition(model.param_shapes(), model.method)
  flat = trees.flatten(trainable['backbone'])
  layers = [f'encoder/layers_{i}' for i in range(3)]
  leaves = [f'norm{n}/{kind}' for n in (1, 2) for kind in ('scale', 'bias')]
  norms = {f'{layer}/block/{leaf}' for layer in layers for leaf in leaves}
  assert set(flat) == norms | {f'{layer}/insert_block/meta' for layer in layers}
  assert 'norm' in frozen['backbone'], 'the final norm stays frozen'
  assert trainable['output_projection']['kernel'].shape == (64, 5)


@pytest.mark.parametrize(
  ('backbone', 'stages', 'want'),
  [
    ('B/16', 4, (0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3)),
    ('Mi/8', 4, (0, 0, 1, 2, 2, 3)),
    ('Mi/8', 1, (0,) * 6),
  ],
)
def test_blocks_are_split_evenly_over_stages(backbone, stages, want):
  assert hst.build(presets.preset(backbone), stages=stages).side().stage_of == want


def test_parameter_count_formula():
  model, d, m = build(), 32, 2
  trainable, _ = partition(model.param_shapes(), model.method)
  widths = hst.WIDTHS[:3]
  want = sum(m * d + 4 * d + 12 * c * c + 15 * c + d * c + c + 2 * c for c in widths)
  want += 27 * 32 + 2 * 32 + 4 * 32 * 32 + 3 * 32
  want += sum(9 * c0 * c1 + 3 * c1 for c0, c1 in itertools.pairwise(widths))
  assert trees.count(split_head(trainable)[0]) == want


def test_training_normalises_over_the_batch_and_updates_running_means(random_like, make_batch):
  model, images = build(), make_batch(8)['inputs']
  params, state = random_like(model.param_shapes()), model.init_model_state()
  features, new = model.apply(
    {'params': params, **state},
    images,
    train=True,
    method=model.features,
    mutable=['batch_stats'],
  )
  np.testing.assert_allclose(features.mean(0), 0, atol=1e-4)
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 0, state, new)
  assert all(jax.tree.leaves(moved)) and len(jax.tree.leaves(moved)) == 4
  stem = new['batch_stats']['side']['stem']['bn']
  outputs = conv(params['side']['stem']['conv1'], images, 1)
  np.testing.assert_allclose(stem['mean'], 0.1 * outputs.mean((0, 1, 2)), rtol=1e-3, atol=1e-5)


def test_batch_norm_is_over_the_batch_of_all_devices(random_like, make_batch):
  model, images = build(), make_batch(8)['inputs']
  images[4:] += 2.0  # The halves differ: means of one device would be far from those of all.
  params, state = random_like(model.param_shapes()), model.init_model_state()

  @jax.jit
  def run(images):
    return model.apply(
      {'params': params, **state},
      images,
      train=True,
      method=model.features,
      mutable=['batch_stats'],
    )

  mesh = jax.sharding.Mesh(np.asarray(jax.devices('cpu')[:2]), ('data',))
  two = run(jax.device_put(images, jax.sharding.NamedSharding(mesh, jax.P('data'))))
  for one, both in zip(*map(jax.tree.leaves, (run(images), two)), strict=True):
    np.testing.assert_allclose(both, one, rtol=1e-3, atol=1e-3)
  stem = two[1]['batch_stats']['side']['stem']['bn']['mean']
  half = 0.1 * conv(params['side']['stem']['conv1'], images[:4], 1).mean((0, 1, 2))
  assert np.abs(stem - half).max() > 0.01


@pytest.mark.parametrize(
  ('options', 'changes', 'message'),
  [
    ({'meta_tokens': 0}, {}, 'meta_tokens must be at least 1, got 0'),
    ({'stages': 0}, {}, r'stages must be in 1\.\.4, got 0'),
    ({'stages': 5}, {}, r'stages must be in 1\.\.4, got 5'),
    ({}, {}, 'each of its 4 stages; this backbone has 3'),
    ({'stages': 3}, {'patch': 6, 'image_size': 30}, 'multiple of 4, not 30'),
    ({'stages': 3}, {'frames': 4}, 'cannot adapt a backbone for clips'),
  ],
)
def test_a_bad_option_is_a_user_error(options, changes, message):
  patch = changes.pop('patch', 8)
  spec = presets.preset(f'test/{patch}', **changes)
  with pytest.raises(errors.UserError, match=message):
    methods.build('hst', spec, options)


def test_training_keeps_activations_of_the_encoder_but_fewer_than_full_fine_tuning():
  spec = presets.preset('test/8')
  model, full = build(meta_tokens=1), Adapted(spec, methods.build('full', spec), 5)
  assert not model.method.spares_backbone and not model.method.first
  kept, most = (
    sum(sorted(shape) == sorted((8, n, spec.mlp)) for shape, _ in cost.residuals(m, 8))
    for m, n in ((model, spec.tokens + 1), (full, spec.tokens))
  )
  assert 0 < kept < most
