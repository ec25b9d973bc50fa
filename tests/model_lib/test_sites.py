"""Tables of inserts: modules shared by sites, modules that differ by layer, and refusals."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from losa_scenic.adapt_lib.method import Method
from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib import layers, presets, sites
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.block import Block
from losa_scenic.model_lib.vit import ViT

SPEC = presets.preset('test/8')


class Shift(nn.Module):
  """f(x) + shift, noting in a parameter's name where it was called."""

  @nn.compact
  def __call__(self, f, x, ctx):
    y = f(x)
    return (
      y
      + self.param('shift', nn.initializers.ones, ())
      + 0 * self.param(f'at_{ctx.site}', nn.initializers.zeros, ())
    )


class AddTokens(nn.Module):
  @nn.compact
  def __call__(self, f, x, ctx):
    tokens = self.param('tokens', nn.initializers.ones, (3, x.shape[-1]))
    return f(jnp.concatenate([x, jnp.broadcast_to(tokens, (len(x), *tokens.shape))], axis=1))


def encoder_shapes(inserts, scan):
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  params = jax.eval_shape(ViT(SPEC, inserts, scan=scan).init, jax.random.key(0), images)['params']
  return trees.describe(params['encoder'])


@pytest.mark.parametrize(('scan', 'layer'), [(True, 'layers'), (False, 'layers_1')])
def test_a_tuple_of_sites_shares_one_module_that_knows_where_it_is(scan, layer):
  have = encoder_shapes({('query', 'value'): Shift, 'key': Shift}, scan)
  ours = sorted(p for p in have if p.startswith(f'{layer}/insert'))
  assert ours == [
    f'{layer}/insert_key/at_key',
    f'{layer}/insert_key/shift',
    f'{layer}/insert_query+value/at_query',
    f'{layer}/insert_query+value/at_value',
    f'{layer}/insert_query+value/shift',
  ]


@pytest.mark.parametrize('scan', [False, True])
def test_a_shared_module_equals_two_equal_ones(scan, random_like, make_batch):
  images = make_batch(2)['inputs']
  shared = ViT(SPEC, {('query', 'fc1'): Shift}, scan=scan)
  apart = ViT(SPEC, {'query': Shift, 'fc1': Shift}, scan=scan)
  params = random_like(jax.eval_shape(shared.init, jax.random.key(0), images)['params'])
  flat = {}
  for path, leaf in trees.flatten(params).items():
    for site in ('query', 'fc1') if 'insert_' in path else ('',):
      if 'insert_' not in path or path.endswith(('/shift', f'at_{site}')):
        flat[path.replace('insert_query+fc1', f'insert_{site}')] = leaf
  have = shared.apply({'params': params}, images)
  want = apart.apply({'params': trees.unflatten(flat)}, images)
  np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)


def test_inserts_may_differ_by_layer_and_add_tokens_when_unrolled(random_like, make_batch):
  images = make_batch(2)['inputs']
  inserts = {'block': sites.PerLayer({0: lambda: AddTokens(), 2: lambda: AddTokens()}.get)}
  model = ViT(SPEC, inserts, collect=('block',))
  params = random_like(jax.eval_shape(model.init, jax.random.key(0), images)['params'])
  inserted = [name for name, p in params['encoder'].items() if 'insert_block' in p]
  assert inserted == ['layers_0', 'layers_2']
  encoded = model.apply({'params': params}, images, method='encode')
  assert [tokens.shape[1] for tokens in encoded.layers['block']] == [20, 20, 23]
  pooled = ViT(SPEC.__class__(**{**SPEC.to_json(), 'pool': 'gap'}), {}).apply(
    {'params': {k: v for k, v in params.items() if k != 'encoder'}},
    encoded.tokens,
    method='pooled',
  )
  np.testing.assert_allclose(pooled, encoded.tokens[:, 1:17].mean(1), rtol=1e-5)


def test_layers_that_differ_are_not_scanned():
  inserts = {'block': sites.PerLayer({0: Shift}.get)}
  with pytest.raises(errors.UserError, match='cannot be scanned'):
    encoder_shapes(inserts, scan=True)
  with pytest.raises(ValueError, match='unrolled=True'):
    Method(inserts=inserts)
  with pytest.raises(errors.UserError, match="layer_loop 'unroll'"):
    Adapted(SPEC, Method(inserts=inserts, unrolled=True), 5, scan=True).param_shapes()


@pytest.mark.parametrize(
  ('inserts', 'message'),
  [
    ({'qurey': Shift}, "Unknown site 'qurey'. Did you mean 'query'"),
    ({('query', 'vlaue'): Shift}, "Unknown site 'vlaue'. Did you mean 'value'"),
    ({('query', 'norm'): Shift}, 'share no insert'),
    ({'norm': sites.PerLayer({0: Shift}.get)}, "'norm' is the model's: it has no layers"),
  ],
)
def test_refused_tables(inserts, message):
  with pytest.raises(errors.UserError, match=message):
    sites.split(inserts)


def test_the_kernel_of_a_linear_layer_and_of_nothing_else():
  dense = layers.dense(3, jnp.float32).bind({'params': {'kernel': jnp.ones((2, 3))}})
  assert sites.kernel(dense).shape == (2, 3)
  with pytest.raises(errors.UserError, match='no other insert may stand at its site'):
    sites.kernel(lambda x: x)


@pytest.mark.parametrize('extra', [0, 2])
def test_split_tells_prefix_grid_and_added_tokens_apart(extra):
  x = jnp.arange((1 + 12 + extra) * 2.0).reshape(1, -1, 2)
  prefix, grid, rest = sites.Ctx(grid=(2, 2, 3), prefix=1).split(x)
  assert (prefix.shape, grid.shape, rest.shape) == ((1, 1, 2), (1, 2, 2, 3, 2), (1, extra, 2))
  assert jnp.array_equal(grid[0, 1, 0, 2], x[0, 1 + 6 + 2])
  assert jnp.array_equal(rest, x[:, 13:])


def test_a_mask_hides_keys(random_like):
  block, x = Block(SPEC), random_like(np.zeros((2, 5, 32)))
  at = sites.make_at({}, sites.Ctx(grid=(1, 2, 2)))
  params = random_like(jax.eval_shape(lambda: block.init(jax.random.key(0), x, at)))

  class Hide(nn.Module):
    def __call__(self, f, qkv, ctx):
      mask = jnp.arange(5) < 3
      return f((*qkv, mask[None, None, None]))

  hidden = sites.make_at({'attend': [Hide()]}, sites.Ctx(grid=(1, 2, 2)))
  have = block.apply(params, x, hidden)
  want = block.apply(params, x[:, :3], at)
  np.testing.assert_allclose(have[:, :3], want, rtol=1e-5, atol=1e-5)
  assert np.abs(have - block.apply(params, x, at)).max() > 1e-3


@pytest.mark.parametrize('scan', [False, True])
def test_inserts_stand_in_the_order_of_the_table(scan, random_like, make_batch):
  class Double(nn.Module):
    def __call__(self, f, x, ctx):
      return 2 * f(x)

  images, tables = make_batch(2)['inputs'], []
  for inserts in (
    {('query', 'fc1'): Shift, 'fc1': Double},
    {'fc1': Double, ('query', 'fc1'): Shift},
  ):
    model = ViT(SPEC, inserts, scan=scan)
    params = random_like(jax.eval_shape(model.init, jax.random.key(0), images)['params'])
    tables.append(model.apply({'params': params}, images))
  assert np.abs(tables[0] - tables[1]).max() > 1e-3
