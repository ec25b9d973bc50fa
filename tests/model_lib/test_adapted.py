"""The adapted model: what reaches inserts, and inserts that nothing reaches."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import kinds

from losa_scenic.adapt_lib import methods
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


def _sparing(scan):
  for name in methods.METHODS:
    spec = presets.preset('test/8', **kinds.changes(name))
    options = {'hst': {'stages': 3}, 'temporal': {'depth': 1}}.get(name, {})
    method = methods.build(name, spec, options)
    if method.spares_backbone and not (scan and method.unrolled):
      yield name, Adapted(spec, method, num_classes=5, scan=scan)


@pytest.mark.parametrize('scan', [False, True])
def test_a_pass_of_the_encoder_can_be_used_again(scan):
  checked = []
  for name, model in _sparing(scan):
    inputs = jax.random.normal(jax.random.key(1), model.input_shape(2))
    # No weight stays at zero: side networks and the classifier would show nothing.
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
      lambda x, rng=rng: 0.2 * rng.standard_normal(x.shape, np.float32), model.variable_shapes()
    )

    @jax.jit
    def both(variables, inputs, model=model):
      encoded = model.apply(variables, inputs, method='encode')
      return model.apply(variables, None, encoded=encoded), model.apply(variables, inputs)

    again, whole = both(variables, inputs)
    np.testing.assert_allclose(again, whole, rtol=1e-4, atol=1e-5)
    assert np.ptp(again, axis=0).max() > 1e-3, name
    checked.append(name)
  assert {'linear', 'losa', 'lst'} <= set(checked)


def test_only_an_encoder_that_never_changes_runs_by_itself():
  spec = presets.preset('test/8')
  model = Adapted(spec, methods.build('lora', spec, {}), num_classes=5)
  with pytest.raises(ValueError, match='changes what the encoder computes'):
    model.init(jax.random.key(0), jnp.zeros(model.input_shape()), method='encode')


class Passed(nn.Module):
  """A side network that only passes the tokens on, whole or in two steps."""

  apart: bool

  @nn.compact
  def __call__(self, run, inputs, *, train):
    tokens = run.encode(inputs, train=train).tokens
    if self.apart:
      return run.pooled(run.normed(tokens, train=train), train=train)
    return run.features(tokens, train=train)


@pytest.mark.parametrize(('pool', 'registers', 'read'), [('cls', 0, 1), ('cls_dist', 1, 2)])
def test_tokens_that_the_pooling_does_not_read_are_not_normed(pool, registers, read, make_batch):
  spec = presets.preset('test/8', pool=pool, registers=registers)
  images, seen = make_batch(2)['inputs'], {}
  for apart in (True, False):
    model = Adapted(spec, Method(side=lambda apart=apart: Passed(apart)), num_classes=3)
    variables = model.init(jax.random.key(0), images)
    seen[apart] = model.apply(variables, images, method='features')
    features = functools.partial(model.apply, method='features')
    jaxpr = jax.make_jaxpr(features)(variables, images)
    roots = [e.outvars[0].aval.shape for e in jaxpr.jaxpr.eqns if e.primitive.name == 'rsqrt']
    assert roots[-1][1] == (spec.tokens if apart else read)
  np.testing.assert_allclose(seen[False], seen[True], rtol=1e-6, atol=1e-6)
