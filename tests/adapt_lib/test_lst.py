"""The ladder of LST, and the transformer that LoSA compares itself with, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from losa_scenic.adapt_lib import ladder, losa, methods
from losa_scenic.adapt_lib.method import partition, split_head
from losa_scenic.bench_lib import cost
from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib import presets
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.vit import ViT


def linear(p, x):
  return x @ p['kernel'] + p['bias']


def norm(p, x):
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
  return x * p['scale'] + p['bias']


def gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def transformer_block(p, x, heads):
  u = norm(p['norm1'], x)
  q, k, v = (
    linear(p[name], u).reshape(*u.shape[:2], heads, -1) for name in ('query', 'key', 'value')
  )
  scores = np.exp(np.einsum('bqhe,bkhe->bhqk', q, k) / np.sqrt(q.shape[-1]))
  mixed = np.einsum('bhqk,bkhe->bqhe', scores / scores.sum(-1, keepdims=True), v)
  x = x + linear(p['out'], mixed.reshape(u.shape))
  return x + linear(p['fc2'], gelu(linear(p['fc1'], norm(p['norm2'], x))))


def climb(p, y, stream, heads):
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), p)
  h = linear(p['down_0'], np.asarray(y, np.float64))
  for i, b in enumerate(stream, start=1):
    mu = 1 / (1 + np.exp(-p['gate'][i - 1] / 0.1))
    h = mu * h + (1 - mu) * linear(p[f'down_{i}'], np.asarray(b, np.float64))
    h = transformer_block(p[f'block_{i}'], h, heads)
  return linear(p['up'], norm(p['norm'], h))


@pytest.mark.parametrize(
  ('method', 'options', 'backbone', 'sites', 'taps', 'heads'),
  [
    ('lst', {'width': 6, 'heads': 3, 'mlp_dim': 10}, 'test/8', ['block'], [0, 1, 2], 3),
    ('lst', {}, 'vivit-test/8x2', ['block'], [0, 1, 2], 2),
    ('losa', {'num_layers': 2, 'transformer_width': 6}, 'test/8', ['block'], [1, 2], 2),
    ('losa', {'num_layers': 1, 'y0': 'b_0'}, 'test/8', ['block'], [2], 2),
    ('losa', {'activation': 'both', 'num_layers': 2}, 'test/8', ['attn', 'mlp'], [1, 2], 2),
  ],
  ids=['lst', 'lst_clips', 'losa', 'losa_b_0', 'losa_both'],
)
@pytest.mark.parametrize('scan', [False, True])
def test_ladder_equals_numpy(method, options, backbone, sites, taps, heads, scan, random_like):
  spec = presets.preset(backbone)
  given = {'adaptor': 'transformer', **options} if method == 'losa' else options
  model = Adapted(spec, methods.build(method, spec, given), 5, scan=scan)
  params = random_like(model.param_shapes(), scale=0.4)
  inputs = np.random.default_rng(0).standard_normal(model.input_shape(2)).astype(np.float32)
  have = model.apply({'params': params}, inputs, method=model.features)
  plain = ViT(spec, {}, tuple(sites), scan=scan)
  backbone = {'params': params['backbone']}
  encoded = plain.apply(backbone, inputs, method='encode')
  from_the_top = method == 'losa' and options.get('y0') != 'b_0'
  y = encoded.tokens if from_the_top else encoded.embedded
  stream = [encoded.layers[site][tap] for tap in taps for site in sites]
  want = jnp.asarray(climb(params['side'], y, stream, heads), jnp.float32)
  want = plain.apply(backbone, want, method='pooled')
  np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  ('backbone', 'options', 'width', 'mlp', 'heads'),
  [
    ('B/16', (None, '4w', None), 96, 384, 12),
    ('g/14', (48, 'backbone', None), 48, 6144, 16),
    ('B/16', (96, '7', None), 96, 7, 12),
    ('B/16', (96, 7, 4), 96, 7, 4),
    ('B/16', (10, '4w', None), 10, 40, 10),
    ('test/8', (7, '4w', None), 7, 28, 1),
  ],
)
def test_geometry_of_the_side_blocks(backbone, options, width, mlp, heads):
  side = ladder.side_spec(presets.preset(backbone), *options)
  assert (side.width, side.mlp, side.heads) == (width, mlp, heads)


@pytest.mark.parametrize(
  ('method', 'options', 'message'),
  [
    ('lst', {'width': 0}, 'at least 1, got 0'),
    ('lst', {'width': 6, 'heads': 4}, '4 heads do not divide the side width 6'),
    ('lst', {'heads': 0}, '0 heads do not divide'),
    ('lst', {'mlp_dim': 0}, 'mlp_dim must be at least 1, got 0'),
    ('lst', {'mlp_dim': '0'}, 'mlp_dim must be at least 1, got 0'),
    ('lst', {'mlp_dim': 'backbon'}, "'backbon'. Did you mean 'backbone'"),
    ('lst', {'mlp_dim': '-3'}, "Unknown mlp_dim .* '-3'"),
    ('losa', {'adaptor': 'transformer', 'transformer_width': 0}, 'at least 1, got 0'),
    ('losa', {'adaptor': 'transfomer'}, "Did you mean 'transformer'"),
  ],
)
def test_a_bad_option_is_a_user_error(method, options, message):
  with pytest.raises(errors.UserError, match=message):
    methods.build(method, presets.preset('test/8'), options)


@pytest.mark.parametrize('k', [1, 3])
def test_parameter_count_formula(k):
  spec, w, m = presets.preset('test/8'), 6, 64
  options = {'adaptor': 'transformer', 'transformer_width': w, 'num_layers': k}
  method = methods.build('losa', spec, options)
  trainable, _ = partition(Adapted(spec, method, 5).param_shapes(), method)
  d = spec.width
  rung = d * w + w + 4 * w * w + 4 * w + 2 * w * m + m + w + 4 * w + 1
  assert trees.count(split_head(trainable)[0]) == k * rung + (d * w + w) + 2 * w + (w * d + d)


def test_the_side_network_and_the_head_train_and_gates_start_at_one_half():
  spec = presets.preset('test/8')
  model = Adapted(spec, methods.build('lst', spec), 5)
  trainable = model.init_trainable(jax.random.key(0))
  assert set(trainable) == {'side', 'output_projection'}
  assert trainable['side']['gate'].shape == (3,) and not np.any(trainable['side']['gate'])


def test_losa_with_a_transformer_does_not_start_as_the_frozen_model():
  spec = presets.preset('test/8')
  assert losa.build(spec).exact_at_init
  assert not losa.build(spec, adaptor='transformer').exact_at_init


@pytest.mark.parametrize(
  ('method', 'options'),
  [
    # With the default of d / 8 = 4 channels here, softmax and norms outweigh the matrix products,
    # and the count of operations, which knows only of those, no longer tells.
    pytest.param('lst', {'width': 8}, marks=pytest.mark.slow),  # See the contract of all methods.
    ('losa', {'adaptor': 'transformer'}),
  ],
)
def test_training_runs_the_encoder_forward_only(method, options):
  spec = presets.preset('test/8')
  model = Adapted(spec, methods.build(method, spec, options), 5)
  assert model.method.spares_backbone
  cost.check_spares_backbone(model, batch_size=8)


@pytest.mark.parametrize('scan', [False, True])
def test_training_keeps_no_activation_of_the_encoder(scan):
  spec = presets.preset('test/8')
  cost.check_residuals(Adapted(spec, methods.build('lst', spec), 5, scan=scan), batch_size=8)
