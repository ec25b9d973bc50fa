"""Sites: every one is reached, stands where it should, and costs nothing when unused."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from losa_scenic.common_lib import errors, trees
from losa_scenic.common_lib.activations import GELU
from losa_scenic.model_lib import attention, encoder, layers, presets, sites
from losa_scenic.model_lib.block import Block
from losa_scenic.model_lib.vit import ViT


class Scale(nn.Module):
  """f(a * x) * b + c with fixed numbers: tells the input side from the output side."""

  @nn.compact
  def __call__(self, f, x, ctx):
    unused = self.param('unused', nn.initializers.ones, ())
    return around(f)(x) + 0 * unused


def around(f):
  return lambda x: f(jax.tree.map(lambda a: 1.25 * a, x)) * 0.75 + 0.125


def manual(params, images, spec, site):
  """The forward pass in plain code with `around` at one site, written without `sites`."""
  at = lambda name, f: around(f) if name == site else f  # noqa: E731
  dense = lambda p: lambda x: x @ p['kernel'] + p['bias']  # noqa: E731

  def norm(p):
    def f(x):
      x = x - x.mean(-1, keepdims=True)
      scale, bias = p['scale'], p['bias']
      return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + spec.norm_eps) * scale + bias

    return f

  def block_of(p):
    def attn(u):
      q, k, v = (at(name, dense(p[name]))(u) for name in ('query', 'key', 'value'))
      attend = lambda qkv: attention.attention(*qkv, spec.heads)  # noqa: E731
      return at('out', dense(p['out']))(at('attend', attend)((q, k, v)))

    def mlp(u):
      gate, hidden = (at(name, dense(p[name]))(u) for name in ('gate', 'fc1'))
      return at('fc2', dense(p['fc2']))(GELU['tanh'](gate) * hidden)

    def attn_block(x):
      return x + at('attn', attn)(at('norm1', norm(p['norm1']))(x))

    def mlp_block(x):
      return x + at('mlp', mlp)(at('norm2', norm(p['norm2']))(x))

    return at('block', lambda x: at('mlp_block', mlp_block)(at('attn_block', attn_block)(x)))

  def run(x):
    for i in range(spec.depth):
      x = block_of(params['encoder'][f'layers_{i}']['block'])(x)
    return x

  def pool(x):
    head = params['map_head']
    probe = jnp.broadcast_to(head['probe'], (len(x), 1, spec.width))
    q = at('pool_query', dense(head['query']))(probe)
    k, v = (at(f'pool_{name}', dense(head[name]))(x) for name in ('key', 'value'))
    z = at('pool_out', dense(head['out']))(attention.attention(q, k, v, spec.heads))
    mlp = lambda u: dense(head['fc2'])(GELU['tanh'](dense(head['fc1'])(u)))  # noqa: E731
    return (z + at('pool_mlp', mlp)(norm(head['norm'])(z)))[:, 0]

  patch = lambda x: layers.PatchEmbed(spec).apply({'params': params['patch']}, x)  # noqa: E731
  x = at('patch', patch)(images)
  cls = jnp.broadcast_to(params['cls'], (len(x), 1, spec.width))
  x = jnp.concatenate([cls, x], axis=1) + params['pos_embedding']
  return at('pool', pool)(at('norm', norm(params['norm']))(at('encoder', run)(x)))


# 'time' is of clips alone.
HERE = [site for site in sites.MODEL_SITES + sites.LAYER_SITES if site != 'time']


@pytest.fixture(scope='module')
def spec():
  """A backbone that has every site."""
  return presets.preset('test/8', pool='map', class_token=True, depth=2, gated=True)


@pytest.fixture(scope='module')
def params(spec, random_like):
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  return random_like(
    jax.eval_shape(ViT(spec, {}).init, jax.random.key(0), images)['params'], scale=0.5
  )


@pytest.fixture(scope='module')
def images(make_batch):
  return make_batch(2)['inputs']


def with_inserts(params, site, depth):
  """The plain parameters and those of a `Scale` at the site, in every layer or once."""
  flat, insert = dict(trees.flatten(params)), f'insert_{site}/unused'
  if site in sites.MODEL_SITES:
    flat[insert] = np.ones(())
  else:
    flat |= {f'encoder/layers_{i}/{insert}': np.ones(()) for i in range(depth)}
  return trees.unflatten(flat)


@pytest.mark.parametrize('site', HERE)
def test_insert_at_each_site_equals_plain_code(site, spec, params, images):
  have = ViT(spec, {site: Scale}).apply({'params': with_inserts(params, site, 2)}, images)
  want = manual(params, images, spec, site)
  np.testing.assert_allclose(have, want, rtol=1e-3, atol=1e-3)
  assert np.abs(want - manual(params, images, spec, None)).max() > 0.02, 'the site is reached'


@pytest.mark.parametrize('site', HERE)
@pytest.mark.parametrize('scan', [False, True])
def test_an_insert_leaves_all_frozen_paths_and_shapes_alone(site, scan, spec):
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  plain, inserted = (
    trees.describe(
      jax.eval_shape(ViT(spec, ins, scan=scan).init, jax.random.key(0), images)['params']
    )
    for ins in ({}, {site: Scale})
  )
  added = {path for path in inserted if path not in plain}
  assert {path: inserted[path] for path in plain} == plain
  assert added and all(path.endswith(f'insert_{site}/unused') for path in added)


def test_at_returns_the_operation_itself_when_nobody_asked():
  f = abs
  at = sites.make_at({'fc1': [Scale()]}, sites.Ctx(grid=(1, 1, 1)), collect=('attn',), seen={})
  assert at('fc2', f) is f
  assert at('fc1', f) is not f and at('attn', f) is not f


def test_collect_puts_the_output_after_the_insert_into_seen():
  class Add(nn.Module):
    def __call__(self, f, x, ctx):
      return f(x) + 1

  seen = {}
  at = sites.make_at({'fc1': [Add()]}, sites.Ctx(grid=(1, 1, 1)), ('fc1', 'fc2'), seen)
  assert (at('fc1', lambda x: 2 * x)(jnp.int32(3)), at('fc2', lambda x: 5 * x)(jnp.int32(3))) == (
    7,
    15,
  )
  assert seen == {'fc1': 7, 'fc2': 15}


@pytest.mark.parametrize('scan', [False, True])
def test_collected_outputs_are_those_of_plain_code(scan, spec, params, images):
  collect = ('block', 'attn', 'mlp', 'attn_block')
  stored = encoder.stack_layers(params) if scan else params
  model = ViT(spec, {}, collect, scan=scan)
  encoded = model.apply({'params': stored}, images, method='encode')
  assert (encoded.grid, encoded.prefix) == ((1, 4, 4), 1) and set(encoded.layers) == set(collect)
  x = encoded.embedded
  for i in range(spec.depth):
    block = Block(spec).bind({'params': params['encoder'][f'layers_{i}']['block']})
    seen = {}
    y = block(x, sites.make_at({}, sites.Ctx(grid=(1, 4, 4)), collect, seen))
    for name in collect:
      np.testing.assert_allclose(encoded.layers[name][i], seen[name], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(seen['attn_block'], x + seen['attn'], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(y, seen['attn_block'] + seen['mlp'], rtol=1e-4, atol=1e-5)
    x = y
  np.testing.assert_allclose(encoded.tokens, x, rtol=1e-4, atol=1e-5)


class Signal(nn.Module):
  """Adds the layer's own and the shared signal, and records what came in."""

  def __call__(self, f, x, ctx):
    ctx.record('came_in', x)
    return f(x) + (0 if ctx.layer is None else ctx.layer + ctx.shared)


@pytest.mark.parametrize('scan', [False, True])
def test_inserts_get_their_layers_signal_and_may_record(scan, spec, params, images):
  stored = encoder.stack_layers(params) if scan else params
  model = ViT(spec, {'block': Signal}, scan=scan)
  encode = functools.partial(model.apply, {'params': stored}, images, method='encode')
  per_layer = jnp.asarray([10.0, 200.0])
  plain, told = encode(), encode(per_layer=per_layer, shared=jnp.asarray(3.0))
  np.testing.assert_allclose(plain.layers['came_in'][0], plain.embedded, atol=1e-5)
  first = Block(spec).apply(
    {'params': params['encoder']['layers_0']['block']}, plain.embedded, lambda site, f: f
  )
  np.testing.assert_allclose(told.layers['came_in'][1], first + 13.0, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(plain.layers['came_in'][1], first, rtol=1e-4, atol=1e-4)
  assert 190 < np.abs(told.tokens - plain.tokens).mean() < 220


def test_an_insert_outside_the_layers_cannot_record(spec, params, images):
  with pytest.raises(ValueError, match="outside the layers cannot record 'came_in'"):
    ViT(spec, {'norm': Signal}).apply({'params': params}, images)


def test_an_unknown_site_is_refused_with_all_sites_listed(spec, images):
  with pytest.raises(errors.UserError, match=r"Unknown site 'fc_1'\. Did you mean 'fc1'") as e:
    ViT(spec, {'fc_1': Scale}).init(jax.random.key(0), images)
  assert all(site in str(e.value) for site in sites.MODEL_SITES + sites.LAYER_SITES)
  with pytest.raises(errors.UserError, match="Unknown layer site 'blocks'"):
    ViT(spec, {}, ('blocks',)).init(jax.random.key(0), images)


def test_collecting_a_site_outside_the_layers_is_refused(spec, images):
  with pytest.raises(errors.UserError, match="Unknown layer site 'norm'"):
    ViT(spec, {}, ('norm',)).init(jax.random.key(0), images)


def test_stack_layers_refuses_a_gap():
  with pytest.raises(ValueError, match=r'layers \[0, 2\] are not 0\.\.1'):
    encoder.stack_layers({'layers_0': {'a': np.zeros(1)}, 'layers_2': {'a': np.zeros(1)}})


def test_frozen_layers_that_are_alike_are_traced_once(monkeypatch):
  calls, attend = [], attention.attention
  monkeypatch.setattr(
    attention, 'attention', lambda *args, **kw: calls.append(1) or attend(*args, **kw)
  )
  spec = presets.preset('test/8', depth=5)
  x = jnp.zeros((1, *spec.input_shape))
  counts = {}
  for frozen in (True, False):
    model = ViT(spec, {}, frozen=frozen)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    calls.clear()
    jax.eval_shape(model.apply, params, x)
    counts[frozen] = len(calls)
  assert counts == {True: 1, False: 5}
