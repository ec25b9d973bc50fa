"""LoSA's module against Eq. 3-6 written out in numpy, float64, one number at a time."""

import dataclasses
import itertools
import json
import math
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from losa_scenic.adapt_lib import inserts, losa, methods, mixers
from losa_scenic.adapt_lib import mixer as mixer_lib
from losa_scenic.adapt_lib.method import Run, partition, split_head
from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib import encoder, presets
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.encoder import Encoded, read_layers
from losa_scenic.model_lib.sites import Ctx
from losa_scenic.model_lib.vit import ViT

B, D, DEPTH, RANK = 2, 6, 5, 3
GOLDEN = json.loads(
  (pathlib.Path(__file__).parents[1] / 'golden' / 'param_counts.json').read_text()
)['rows']


def gelu(x, kind):
  if kind == 'erf':
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))
  return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def mix_vector(p, x, kind):
  """Eq. 4 for one vector: alpha * (GELU(x W_d + c_d) W_u + c_u)."""
  size, rank = p['down_kernel'].shape
  hidden = [
    gelu(sum(x[i] * p['down_kernel'][i, r] for i in range(size)) + p['down_bias'][r], kind)
    for r in range(rank)
  ]
  up = [
    sum(hidden[r] * p['up_kernel'][r, i] for r in range(rank)) + p['up_bias'][i]
    for i in range(size)
  ]
  return p['alpha'] * np.array(up)


def reference(params, stream, start, grid, mix_tokens, kind):
  """Eq. 3, 5 and 6 for a list of taps [b n d]."""
  params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  frames, space = grid[0], grid[1] * grid[2]
  y = np.array(start, np.float64)
  for i, tap in enumerate(stream):
    x, g = tap.astype(np.float64) + y, np.zeros_like(y)
    of = params[f'layers_{i // 2 if mix_tokens else i}'].__getitem__
    b, n, d = x.shape
    if not mix_tokens or i % 2 == 0:
      for image, token in itertools.product(range(b), range(n)):
        g[image, token] = mix_vector(of('channel'), x[image, token], kind)
    elif frames == 1:
      for image, channel in itertools.product(range(b), range(d)):
        g[image, :, channel] = mix_vector(of('token'), x[image, :, channel], kind)
    else:
      for image, channel in itertools.product(range(b), range(d)):
        for t in range(frames):
          at = slice(t * space, (t + 1) * space)
          g[image, at, channel] += mix_vector(of('spatial'), x[image, at, channel], kind)
        for s in range(space):
          at = slice(s, None, space)
          g[image, at, channel] += mix_vector(of('temporal'), x[image, at, channel], kind)
    y = g + y
  return y


def encoded(grid, prefix=0, names=('block',), seed=3):
  rng = np.random.default_rng(seed)
  shape = (B, prefix + math.prod(grid), D)
  layers = {n: rng.standard_normal((DEPTH, *shape)).astype(np.float32) for n in names}
  tokens, embedded = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
  return Encoded(tokens, embedded, layers, grid, prefix)


def run_of(given):
  same = lambda tokens, train=False: tokens  # noqa: E731

  def encode(inputs, train=False, read=None):
    depth = len(next(iter(given.layers.values())))
    values = given.layers if read is None else read_layers(given.layers, depth, read)
    return dataclasses.replace(given, layers=values)

  return Run(encode=encode, encode_twice=encode, normed=same, pooled=same)


@pytest.mark.parametrize('gelu_kind', ['tanh', 'erf'])
@pytest.mark.parametrize(
  ('fields', 'grid', 'prefix'),
  [
    ({'taps': range(5)}, (1, 2, 2), 1),
    ({'taps': range(5), 'mix_tokens': False}, (1, 2, 2), 0),
    ({'taps': [1, 4], 'start': 'b_0'}, (1, 2, 3), 0),
    ({'taps': [4]}, (1, 2, 2), 1),
    ({'taps': [2, 4], 'collect': ('mlp',)}, (1, 2, 2), 1),
    ({'taps': [2, 4], 'collect': ('attn',)}, (1, 2, 2), 1),
    ({'taps': [2, 4], 'collect': ('attn', 'mlp')}, (1, 2, 2), 1),
    ({'taps': range(5)}, (3, 2, 2), 0),
    ({'taps': [2, 4], 'mix_tokens': False, 'start': 'b_0'}, (2, 1, 3), 0),
  ],
  ids=['mixer', 'mlp', 'b_0', 'k1', 'mlp_out', 'mhsa', 'both', 'video', 'video_mlp'],
)
def test_side_network_equals_the_equations(fields, grid, prefix, gelu_kind, random_like):
  fields = {'collect': ('block',)} | fields | {'taps': tuple(fields['taps'])}
  if grid[0] == 1 or not fields.get('mix_tokens', True):
    fields['size'] = (prefix + math.prod(grid), D)
  given = encoded(grid, prefix, fields['collect'])
  module = mixers.Mixers(rank=RANK, gelu=gelu_kind, **fields)
  call = {'run': run_of(given), 'inputs': jnp.zeros((B, 1)), 'train': False}
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), **call))['params']
  params = random_like(shapes, scale=0.7)
  have = module.apply({'params': params}, **call)
  stream = [given.layers[name][tap] for tap in fields['taps'] for name in fields['collect']]
  start = given.embedded if fields.get('start') == 'b_0' else given.tokens
  want = reference(params, stream, start, grid, fields.get('mix_tokens', True), gelu_kind)
  np.testing.assert_allclose(have, want, rtol=2e-5, atol=2e-5)
  assert np.abs(want - start).max() > 0.1, 'the side network must matter in this test'


def test_the_two_gelus_differ(random_like):
  x = 2 * np.random.default_rng(0).standard_normal((4, D)).astype(np.float32)
  module = mixer_lib.MixerWeights(RANK)
  shapes = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), D)[0])
  weights = random_like(shapes, scale=1.0)
  tanh, erf = (mixer_lib.mix(weights, x, -1, kind) for kind in ('tanh', 'erf'))
  assert 1e-6 < np.abs(tanh - erf).max() < 1e-1


@pytest.mark.parametrize('kind', ['tanh', 'erf'])
def test_build_takes_the_backbones_gelu(kind):
  spec = presets.preset('test/8', activation=f'gelu_{kind}')
  assert losa.build(spec).side().gelu == kind


def test_mixer_starts_as_zero_with_alpha_as_given():
  x = np.ones((2, 4, D), np.float32)
  module = mixer_lib.MixerWeights(RANK, alpha_init=0.3)
  weights, variables = module.init_with_output(jax.random.key(0), 4)
  params = variables['params']
  assert not np.any(mixer_lib.mix(weights, x, 1, 'tanh'))
  assert params['alpha'] == np.float32(0.3)
  assert np.any(params['down_kernel']) and params['down_kernel'].shape == (4, RANK)


@pytest.mark.parametrize(
  ('depth', 'k', 'want'),
  [
    (12, 12, tuple(range(12))),
    (12, 1, (11,)),
    (12, 2, (5, 11)),
    (12, 4, (2, 5, 8, 11)),
    (40, 8, (4, 9, 14, 19, 24, 29, 34, 39)),
    (12, 5, (1, 4, 6, 9, 11)),  # 2.4 4.8 7.2 9.6 12
    (3, 2, (1, 2)),  # 1.5 is rounded up
    (5, 2, (2, 4)),  # so is 2.5, where Python's round would go to the even 2
  ],
)
def test_tap_indices(depth, k, want):
  assert losa.tap_indices(depth, k) == want


def test_tap_indices_are_increasing_and_end_with_the_last_block():
  for depth in range(1, 60):
    for k in range(1, depth + 1):
      taps = losa.tap_indices(depth, k)
      assert len(set(taps)) == k and list(taps) == sorted(taps)
      assert taps[0] >= 0 and taps[-1] == depth - 1


@pytest.mark.parametrize('activation', ['block', 'mlp', 'mhsa', 'both'])
@pytest.mark.parametrize('scan', [False, True])
def test_model_wires_the_backbones_outputs_into_the_side_network(
  activation, scan, random_like, make_batch
):
  spec = presets.preset('test/8')
  method = losa.build(spec, rank=RANK, activation=activation, num_layers=2)
  model = Adapted(spec, method, 5, scan=scan)
  params, images = random_like(model.param_shapes()), make_batch(2)['inputs']
  have = model.apply({'params': params}, images, method=model.features)
  names = {'mhsa': ('attn',), 'both': ('attn', 'mlp')}.get(activation, (activation,))
  plain = ViT(spec, {}, names, scan=scan)
  backbone = {'params': params['backbone']}
  given = plain.apply(backbone, images, method='encode')
  stream = [np.asarray(given.layers[name][tap]) for tap in (1, 2) for name in names]
  side = encoder.unstack_layers(params['side'])
  y = reference(side, stream, given.tokens, spec.grid, True, 'tanh')
  want = plain.apply(backbone, jnp.asarray(y, jnp.float32), method='features')
  np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4)


def test_map_head_lora_equals_numpy(random_like, make_batch):
  spec = presets.preset('test/8', pool='map')
  model = Adapted(spec, losa.build(spec, map_head_lora_rank=2), 5)
  params = random_like(model.param_shapes(), scale=0.4)
  tokens = np.random.default_rng(1).standard_normal((2, spec.tokens, spec.width), np.float32)
  have = model.apply({'params': params}, tokens, method=lambda m, x: m.backbone.features(x))
  backbone = jax.tree.map(lambda a: np.asarray(a, np.float64), params['backbone'])
  head = backbone['map_head']

  def linear(p, x):
    return x @ p['kernel'] + p['bias']

  def low_rank(name, x):
    return x @ backbone[f'insert_pool_{name}']['a'] @ backbone[f'insert_pool_{name}']['b']

  def norm(p, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + spec.norm_eps)
    return x * p['scale'] + p['bias']

  x = norm(backbone['norm'], tokens.astype(np.float64))
  probe = np.broadcast_to(head['probe'], (2, 1, spec.width))
  q, k, v = (
    (linear(head[n], u) + low_rank(n, u)).reshape(2, -1, spec.heads, spec.width // spec.heads)
    for n, u in (('query', probe), ('key', x), ('value', x))
  )
  scores = np.exp(np.einsum('bqhe,bkhe->bhqk', q, k) / np.sqrt(spec.width // spec.heads))
  pooled = np.einsum('bhqk,bkhe->bqhe', scores / scores.sum(-1, keepdims=True), v)
  pooled = pooled.reshape(2, 1, spec.width)
  z = linear(head['out'], pooled) + low_rank('out', pooled)
  u = norm(head['norm'], z)
  mlp = linear(head['fc2'], np.vectorize(gelu)(linear(head['fc1'], u), 'tanh'))
  want = (z + mlp + low_rank('mlp', u))[:, 0]
  np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  'row',
  [r for r in GOLDEN if r['method'] == 'losa' and r['backbone'].startswith('vivit')],
  ids=lambda r: r['backbone'],
)
def test_video_parameter_counts(row):
  spec, grid = presets.preset(row['backbone']), (16, 16, 16)
  tap = jax.ShapeDtypeStruct((1, 4096, spec.width), jnp.float32)
  module = losa.build(spec, rank=row['set']['rank']).side()

  def init(tap):
    given = Encoded(tap, tap, {'block': [tap] * spec.depth}, grid, 0)
    return module.init(jax.random.key(0), run_of(given), tap, train=False)

  count = trees.count(jax.eval_shape(init, tap)['params'])
  head = 10 * spec.width * row['set']['map_head_lora_rank']
  assert count + head == row['trainable_params']


@pytest.mark.parametrize('k', [1, 2, 3])
@pytest.mark.parametrize('adaptor', ['low_rank_mixer', 'low_rank_mlp'])
@pytest.mark.parametrize('activation', ['block', 'both'])
def test_parameter_count_formula(k, adaptor, activation):
  spec, r = presets.preset('test/8', pool='map'), 3
  options = {'rank': r, 'num_layers': k, 'adaptor': adaptor, 'activation': activation}
  method = methods.build('losa', spec, options | {'map_head_lora_rank': 2})
  trainable, _ = partition(Adapted(spec, method, 5, scan=True).param_shapes(), method)
  d, n, taps = spec.width, spec.tokens, k * (2 if activation == 'both' else 1)
  token = taps // 2 if adaptor == 'low_rank_mixer' else 0
  want = (taps - token) * (2 * d * r + r + d + 1) + token * (2 * n * r + r + n + 1) + 10 * d * 2
  assert trees.count(split_head(trainable)[0]) == want


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'rank': 0}, 'rank must be at least 1, got 0'),
    ({'num_layers': 0}, r'num_layers must be in 1\.\.3, got 0'),
    ({'num_layers': 4}, r'num_layers must be in 1\.\.3, got 4'),
    ({'adaptor': 'low_rank_mixr'}, "'low_rank_mixr'. Did you mean 'low_rank_mixer'"),
    ({'activation': 'mlps'}, "Did you mean 'mlp'"),
    ({'y0': 'b_1'}, "Unknown LoSA y0 'b_1'"),
    ({'alpha_init': 0.0}, 'alpha_init must not be 0'),
    ({'map_head_lora_rank': -1}, 'must not be negative'),
    ({'map_head_lora_rank': 2}, "pools by 'map'; this one: 'cls'"),
    ({'mix_time': False}, 'mix_time=False has no effect: it is for clips'),
    ({'rnk': 4}, "Unknown option of method 'losa' 'rnk'. Did you mean 'rank'"),
  ],
)
def test_a_bad_option_is_a_user_error(options, message):
  with pytest.raises(errors.UserError, match=message):
    methods.build('losa', presets.preset('test/8'), options)


def test_low_rank_insert_equals_numpy(random_like):
  x = np.random.default_rng(0).standard_normal((2, 3, D)).astype(np.float32)
  module, ctx = inserts.LowRank(rank=2, scale=0.5), Ctx(grid=(1, 1, 3))
  dense = nn.Dense(4)
  frozen = random_like(jax.eval_shape(dense.init, jax.random.key(0), x))
  f = lambda u: dense.apply(frozen, u)  # noqa: E731
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), f, x, ctx))
  p = random_like(shapes)
  want = f(x) + 0.5 * (x @ p['params']['a']) @ p['params']['b']
  np.testing.assert_allclose(module.apply(p, f, x, ctx), want, rtol=1e-5, atol=1e-6)
