"""The adapted model: what reaches inserts, and inserts that nothing reaches."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from losa_scenic.adapt_lib.inserts import LowRank
from losa_scenic.adapt_lib.method import Method
from losa_scenic.common_lib import errors
from losa_scenic.model_lib import presets
from losa_scenic.model_lib.adapted import Adapted


class Shared(nn.Module):
  @nn.compact
  def __call__(self):
    return self.param('value', nn.initializers.constant(3.0), ())


class AddShared(nn.Module):
  def __call__(self, f, x, ctx):
    y = f(x)
    # Not the same for all channels, which a LayerNorm would take out again.
    return y + ctx.shared * jnp.arange(y.shape[-1])


class Skip(nn.Module):
  def __call__(self, f, x, ctx):
    return x


@pytest.mark.parametrize('site', ['patch', 'encoder', 'block', 'query', 'norm', 'pool', 'pool_mlp'])
def test_shared_values_reach_inserts_at_model_and_layer_sites(site, make_batch):
  spec = presets.preset('test/8', pool='map')
  method = Method(inserts={site: AddShared}, shared=Shared)
  model = Adapted(spec, method, num_classes=5)
  inputs = make_batch(2)['inputs']
  params = model.init(jax.random.key(0), inputs)['params']
  plain = Adapted(spec, Method(), num_classes=5)
  frozen = {k: v for k, v in params.items() if k != 'shared'}

  def features(model, params):
    return model.apply({'params': params}, inputs, method='features')

  assert jnp.abs(features(model, params) - features(plain, frozen)).max() > 1e-3
  nothing = {**params, 'shared': {'value': jnp.zeros(())}}
  assert jnp.array_equal(features(model, nothing), features(plain, frozen))


@pytest.mark.parametrize('scan', [False, True])
def test_an_insert_that_no_pass_reaches_is_an_error(scan):
  method = Method(inserts={'attn': Skip, 'query': lambda: LowRank(rank=2)})
  model = Adapted(presets.preset('test/8'), method, num_classes=5, scan=scan)
  with pytest.raises(errors.UserError, match='query'):
    model.param_shapes()
