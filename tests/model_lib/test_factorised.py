"""Factorised clip backbones: the image model on each time by itself, then the mean over time."""

import contextlib
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import kinds
from reference.backbone import Backbone

from losa_scenic.adapt_lib import methods
from losa_scenic.adapt_lib.method import Method
from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib import encoder, presets
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.vit import ViT
from losa_scenic.weights_lib import checkpoint

FACTORISED = {'frames': 6, 'tubelet': 2, 'factorised': True}
METHODS = sorted(methods.METHODS)
# Of those that see whole sequences: what they read and add stands elsewhere without leading tokens.
READ_OR_ADD = (
  'dtl',
  'express',
  'head2toe',
  'last',
  'losa',
  'lst',
  'noah',
  'st_adapter',
  'vpt_deep',
)
OPTIONS = {'temporal': {'depth': 1}}
CLASS = {'class_token': True, 'registers': 1, 'pool': 'cls'}


def of(fields, **more):
  return presets.preset('test/8', **{'image_size': 16, 'depth': 1, **fields, **more})


def alone(**fields):
  return of({'frames': 2, 'tubelet': 2}, **fields)


def clips(spec, batch=2):
  rng = np.random.default_rng(0)
  return rng.standard_normal((batch, *spec.input_shape)).astype(np.float32)


def params_of(spec, random_like, **kwargs):
  shapes = jax.eval_shape(ViT(spec, {}, **kwargs).init, jax.random.key(0), clips(spec))
  return random_like(shapes['params'], scale=0.3)


@pytest.mark.parametrize(
  ('fields', 'scan'),
  [
    (CLASS, True),
    (CLASS, False),
    ({'pool': 'gap', 'registers': 2}, False),
    ({'pool': 'map'}, False),
    ({'pool': 'gap', 'final_norm': 'pooled'}, False),
  ],
  ids=['scan', 'class', 'registers', 'map', 'pooled'],
)
def test_features_are_the_mean_of_those_of_each_time_alone(fields, scan, random_like):
  spec = of(FACTORISED, **fields)
  params, x = params_of(spec, random_like, scan=scan), clips(spec)
  one = Backbone(trees.flatten(encoder.unstack_layers(params)), alone(**fields))
  want = np.mean([one.features(x[:, t : t + 2]) for t in (0, 2, 4)], axis=0)
  have = jax.jit(ViT(spec, {}, scan=scan).apply)({'params': params}, x)
  np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ('fields', 'scan'), [(CLASS, True), ({'pool': 'map'}, False)], ids=['class', 'plain']
)
def test_encoded_tokens_stand_in_one_row_what_leads_them_first(fields, scan, random_like):
  spec, one = of(FACTORISED, **fields, depth=2), alone(**fields, depth=2)
  params, x, p = params_of(spec, random_like, scan=scan), clips(spec), spec.prefix

  @functools.partial(jax.jit, static_argnums=0)
  def encode(spec, x):
    model = ViT(spec, {}, ('block', 'fc1'), scan=scan)
    return model.apply({'params': params}, x, method='encode')

  have = encode(spec, x)
  assert (have.grid, have.prefix) == ((3, 2, 2), 3 * p)
  for i in range(3):
    want = encode(one, x[:, 2 * i : 2 * i + 2])
    pairs = [(have.tokens, want.tokens), (have.embedded, want.embedded)]
    pairs += [(have.layers[s][k], want.layers[s][k]) for s in ('block', 'fc1') for k in range(2)]
    for row, of_one in pairs:
      assert row.shape[1] == 3 * of_one.shape[1] == spec.tokens
      start = 3 * p + 4 * i
      np.testing.assert_allclose(row[:, p * i : p * (i + 1)], of_one[:, :p], rtol=1e-4, atol=1e-4)
      np.testing.assert_allclose(row[:, start : start + 4], of_one[:, p:], rtol=1e-4, atol=1e-4)


class Last(nn.Module):
  """The last time's features in the place of their mean."""

  @nn.compact
  def __call__(self, f, x, ctx):
    assert f(x).shape == (2, 32)
    return x[:, -1]


def test_what_makes_a_clips_features_of_its_times_is_a_site(random_like):
  spec, one = of(FACTORISED, pool='map'), alone(pool='map')
  params, x = params_of(spec, random_like), clips(spec)
  have = jax.jit(ViT(spec, {'time': Last}).apply)({'params': params}, x)
  want = Backbone(trees.flatten(params), one).features(x[:, 4:])
  np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-5)
  assert Method(inserts={'time': Last}).memory_class == 'A'
  with pytest.raises(errors.UserError, match="'time' exists only in backbones with factorised"):
    ViT(one, {'time': Last}).apply({'params': params}, x[:, 4:])


def test_parameters_are_an_images_but_for_the_patch_kernel():
  spec, image = of(FACTORISED, **CLASS), of(CLASS)
  have, want = checkpoint.param_shapes(spec), checkpoint.param_shapes(image)
  assert have == {**want, 'patch/proj/kernel': (2 * 192, 32)}
  assert spec.tokens == 3 * image.tokens and spec.sequence == image.tokens


def test_only_clips_are_factorised():
  with pytest.raises(errors.UserError, match='factorised=True is for clips: it needs frames'):
    of({}, factorised=True)


@pytest.mark.parametrize(
  ('name', 'fields'),
  [*((name, CLASS) for name in METHODS), *((name, {'pool': 'map'}) for name in READ_OR_ADD)],
  ids=[*(f'{name}-class' for name in METHODS), *(f'{name}-plain' for name in READ_OR_ADD)],
)
def test_every_method_gives_one_row_of_logits_a_clip_or_is_refused(name, fields):
  spec = of(FACTORISED, **fields)
  refused = name in kinds.REFUSED['factorised']
  with pytest.raises(errors.UserError) if refused else contextlib.nullcontext():
    model = Adapted(spec, methods.build(name, spec, OPTIONS.get(name)), 5)
    logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), clips(spec))
    assert logits.shape == (2, 5)


@pytest.mark.parametrize('name', ['st_adapter', 'losa'])
def test_methods_for_clips_mix_time(name, random_like):
  spec = of(FACTORISED, pool='map', depth=2)
  model = Adapted(spec, methods.build(name, spec), 5)
  params = random_like(model.param_shapes())
  x, other = clips(spec), clips(spec)
  other[:, 4:] += 1.0
  if name == 'losa':
    assert trees.flatten(params)['side/layers_0/temporal/down_kernel'].shape[0] == 3

  @jax.jit
  def first_time(x):
    """Features of the first time, which see the last one only through the method."""
    method = dataclasses.replace(model.method, inserts={**model.method.inserts, 'time': First})
    return Adapted(spec, method, 5).apply({'params': params}, x, method='features')

  assert np.abs(first_time(x) - first_time(other)).max() > 1e-4


class First(nn.Module):
  """The first time's features in the place of their mean."""

  def __call__(self, f, x, ctx):
    return x[:, 0]


@pytest.mark.parametrize('name', ['vpt_shallow', 'vpt_deep', 'prefix', 'convpass'])
def test_methods_for_images_see_each_time_as_an_image(name, random_like):
  spec = of(FACTORISED, **CLASS)
  model, one = (Adapted(s, methods.build(name, s), 5) for s in (spec, alone(**CLASS)))
  params, x = random_like(model.param_shapes(), scale=0.3), clips(spec)
  of_one = jax.jit(lambda x: one.apply({'params': params}, x, method='features'))
  parts = [of_one(x[:, t : t + 2]) for t in (0, 2, 4)]
  have = jax.jit(lambda x: model.apply({'params': params}, x, method='features'))(x)
  np.testing.assert_allclose(have, np.mean(parts, axis=0), rtol=1e-4, atol=1e-4)


def test_half_precision():
  spec = of(FACTORISED, **CLASS)
  model, x = ViT(spec, {}, dtype=jnp.bfloat16), clips(spec)
  have, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
  assert have.dtype == jnp.bfloat16
