"""DTL's side stream against its recurrence written out in numpy, and what it keeps of a block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from losa_scenic.adapt_lib import dtl, methods
from losa_scenic.adapt_lib.method import combine, partition
from losa_scenic.bench_lib import cost
from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib import presets, sites
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.vit import ViT

BATCH = 2


def conv(x, kernel, grid, prefix):
  """Depthwise 'same' convolution of every frame of x [b n d], one output at a time."""
  k, (frames, height, width) = kernel.shape[0], grid
  y, low = x.copy(), (k - 1) // 2
  for t in range(frames):
    for row in range(height):
      for column in range(width):
        total = 0
        for i in range(k):
          for j in range(k):
            r, c = row + i - low, column + j - low
            if 0 <= r < height and 0 <= c < width:
              token = prefix + (t * height + r) * width + c
              total = total + x[:, token] * kernel[i, j]
        y[:, prefix + (t * height + row) * width + column] = total
  return y


def reference(params, x, blocks, first, beta, kernel, grid, prefix):
  """The recurrence of the module's docstring; `first` is M, blocks count from 1."""
  a = [pair for i in range(first - 1, len(blocks)) for pair in params[i]['a'].astype(np.float64)]
  b = [pair for i in range(first - 1, len(blocks)) for pair in params[i]['b'].astype(np.float64)]
  h, x = 0.0, x.astype(np.float64)
  for i, block in enumerate(blocks):
    h = h + x @ a[i] @ b[i]
    x = block(x)
    if i + 1 >= first:
      phi = h / (1 + np.exp(-beta * h))
      x = x + (phi if kernel is None else conv(phi, kernel, grid, prefix))
  return x


@pytest.mark.parametrize('first', [1, 2, 4, 5])
@pytest.mark.parametrize(
  ('kernel', 'clip'), [(0, False), (3, False), (4, False), (5, True)], ids=str
)
def test_side_stream_equals_the_equations(first, kernel, clip, random_like):
  frames = {'frames': 4, 'tubelet': 2} if clip else {}
  spec = presets.preset('test/8', depth=5, **frames)
  method = dtl.build(spec, rank=3, first_block=first, beta=2.0, kernel=kernel)
  rng = np.random.default_rng(0)
  weights = rng.standard_normal((5, spec.width, spec.width)) / np.sqrt(spec.width)
  blocks = [lambda x, w=w: np.tanh(x @ w) for w in weights]
  x = rng.standard_normal((BATCH, spec.tokens, spec.width)).astype(np.float32)
  shared = kernel_values = None
  if kernel:
    conv_module = method.shared()
    shapes = jax.eval_shape(lambda: conv_module.init(jax.random.key(0)))
    shared = conv_module.apply(random_like(shapes, seed=9))
    kernel_values = np.asarray(shared, np.float64)
  ctx = sites.Ctx(grid=spec.grid, prefix=spec.prefix, shared=shared)
  params, tokens = [], jnp.asarray(x)
  for i, w in enumerate(weights):
    module = sites.of_layer(method.inserts, i)['block']()
    f = lambda u, w=w: jnp.tanh(u @ jnp.asarray(w, jnp.float32))  # noqa: E731
    shapes = jax.eval_shape(
      lambda u, m=module, f=f: m.init(jax.random.key(0), f, u, ctx), tokens
    ).get('params', {})
    params.append(random_like(shapes, seed=i))
    tokens = module.apply({'params': params[-1]}, f, tokens, ctx)
  want = reference(params, x, blocks, first, 2.0, kernel_values, spec.grid, spec.prefix)
  assert tokens.shape == x.shape
  np.testing.assert_allclose(tokens, want, rtol=1e-4, atol=1e-4)
  plain = x.astype(np.float64)
  for block in blocks:
    plain = block(plain)
  assert np.abs(want - plain).max() > 0.1, 'the side stream must matter in this test'


@pytest.mark.parametrize('pool', ['cls', 'gap', 'map'])
def test_mean_pooling_is_the_norm_of_the_mean_of_the_grid(pool, random_like, make_batch):
  spec = presets.preset('test/8', pool=pool, class_token=True)
  model = Adapted(spec, dtl.build(spec, pool='mean'), 5)
  params, images = random_like(model.param_shapes()), make_batch(BATCH)['inputs']
  for path, leaf in trees.flatten(params).items():
    if path.endswith('insert_block/b'):
      leaf[:] = 0  # The encoder's output is the plain one.
  have = model.apply({'params': params}, images, method=model.features)
  plain = ViT(spec, {}).apply({'params': params['backbone']}, images, method='encode')
  mean = np.asarray(plain.tokens, np.float64)[:, spec.prefix :].mean(axis=1)
  mean = (mean - mean.mean(-1, keepdims=True)) / np.sqrt(mean.var(-1, keepdims=True) + 1e-6)
  norm = params['backbone']['norm']
  np.testing.assert_allclose(have, mean * norm['scale'] + norm['bias'], rtol=1e-4, atol=1e-4)


def test_backbone_pooling_is_exact_at_the_start_and_mean_is_not():
  spec = presets.preset('test/8')
  assert dtl.build(spec).exact_at_init and not dtl.build(spec, pool='mean').exact_at_init


@pytest.mark.parametrize(('depth', 'want'), [(12, 7), (24, 14), (3, 2), (6, 4), (1, 1), (40, 23)])
def test_default_first_block_is_seven_twelfths_of_the_depth(depth, want):
  method = dtl.build(presets.preset('test/8', depth=depth))
  assert method.first == want and method.memory_class == 'B'


@pytest.mark.parametrize('remat', [False, True])
def test_only_blocks_after_the_first_injection_keep_activations(remat):
  depth, kept = 4, {}
  spec = presets.preset('test/8', depth=depth)
  for first in range(1, depth + 1):
    model = Adapted(spec, dtl.build(spec, first_block=first), 5, remat=remat)
    assert model.method.first == first
    shapes = [shape for shape, _ in cost.residuals(model, BATCH)]
    hidden = shapes.count((BATCH, spec.tokens, spec.mlp))
    attention = sum(len(shape) > 3 for shape in shapes)
    streams = [s for s in shapes if len(s) == 3 and s[0] == BATCH and s[2] == spec.width]
    kept[first] = (hidden, attention, sum(s[1] for s in streams) / spec.tokens)
  assert kept[depth][:2] == (0, 0), 'no block is differentiated'
  # A needs the input of every block, phi needs h, and the final norm and the pooling some more.
  assert depth <= kept[depth][2] <= depth + 6
  per_block = kept[depth - 1][:2]
  assert min(per_block) > 0 or remat
  for first in range(1, depth):
    assert kept[first][:2] == tuple((depth - first) * n for n in per_block)


def test_a_step_costs_less_the_later_the_side_stream_comes_back():
  spec = presets.preset('test/8', depth=4)
  models = [Adapted(spec, dtl.build(spec, first_block=first), 5) for first in (1, 4)]
  early, late = (cost.step_flops(model, 8) for model in models)
  forward = cost.forward_flops(models[0], 8)
  # Three blocks of four are, or are not, passed backward, which costs as much as forward.
  assert 0.5 * forward < early - late < forward
  assert late < 1.4 * forward


def test_another_method_in_the_early_blocks_still_gets_its_gradients(random_like, make_batch):
  spec = presets.preset('test/8')
  method = methods.build('bitfit+dtl', spec, {})
  assert method.first == 0
  model = Adapted(spec, method, 5)
  trainable, frozen = random_like(partition(model.param_shapes(), method))
  images = make_batch(BATCH)['inputs']

  def loss(trainable):
    return jnp.square(model.apply({'params': combine(trainable, frozen)}, images)).sum()

  gradients = trees.flatten(jax.grad(loss)(trainable))
  assert {p for p, g in gradients.items() if not np.abs(g).max() and 'key/bias' not in p} == set()
  assert any('layers_0/block/fc1' in p for p in gradients)


@pytest.mark.parametrize('kernel', [0, 4])
def test_parameter_count_and_names(kernel):
  spec = presets.preset('test/8')
  model = Adapted(spec, dtl.build(spec, rank=3, kernel=kernel), 5)
  trainable = trees.flatten(partition(model.param_shapes(), model.method)[0])
  ours = {p: leaf.shape for p, leaf in trainable.items() if not p.startswith('output_projection')}
  d, layers = spec.width, 'backbone/encoder/layers_'
  want = {
    f'{layers}1/insert_block/a': (2, d, 3),
    f'{layers}1/insert_block/b': (2, 3, d),
    f'{layers}2/insert_block/a': (1, d, 3),
    f'{layers}2/insert_block/b': (1, 3, d),
  }
  assert ours == want | ({'shared/conv_kernel': (4, 4, d)} if kernel else {})


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'rank': 0}, 'rank must be at least 1, got 0'),
    ({'first_block': 0}, r'first_block must be in 1\.\.3, got 0'),
    ({'first_block': 4}, r'first_block must be in 1\.\.3, got 4'),
    ({'beta': 0.0}, 'beta must be positive, got 0.0'),
    ({'kernel': 2}, r'kernel must be one of \(0, 3, 4, 5\)'),
    ({'pool': 'meen'}, "Did you mean 'mean'"),
    ({'first_blok': 1}, "Did you mean 'first_block'"),
  ],
)
def test_a_bad_option_is_a_user_error(options, message):
  with pytest.raises(errors.UserError, match=message):
    methods.build('dtl', presets.preset('test/8'), options)
