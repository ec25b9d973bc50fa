"""Every method on backbones that together have every feature of `BackboneSpec`.

Traced in the quick suite; the slow one runs them, on all backbones.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import kinds

from losa_scenic.adapt_lib import fold, methods
from losa_scenic.adapt_lib.method import BACKBONE, combine, partition
from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib import presets, spec
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.vit import ViT

CLASSES = 5
OPTIONS = {'hst': {'stages': 3}, 'temporal': {'depth': 1}}
BACKBONES = {
  'rms_gated_rope': {
    'registers': 2,
    'gated': True,
    'activation': 'silu',
    'norm': 'rms',
    'layer_scale': True,
    'qkv_bias': 'none',
    'linear_bias': False,
    'pre_norm': True,
    'qk_norm': 'head',
    'rope': 'dinov3',
    'positions': 'none',
    'mlp': 96,
  },
  'relative_post_norm': {
    'relative_positions': True,
    'qkv_bias': 'qv',
    'block_norm': 'post',
    'final_norm': 'pooled',
    'pool': 'gap',
    'class_token': True,
    'attn_norm': True,
    'mlp_norm': True,
    'patch_norm': True,
    'activation': 'quick_gelu',
    'positions': 'none',
  },
  'distilled_without_norm': {
    'rope': 'eva',
    'registers': 1,
    'pool': 'cls_dist',
    'qk_norm': 'width',
    'final_norm': 'none',
    'gated': True,
    'activation': 'gelu_erf',
    'patch_bias': False,
    'mlp': 80,
  },
  'map_registers': {
    'pool': 'map',
    'registers': 3,
    'layer_scale': True,
    'rope': 'dinov3',
    'class_token': False,
    'mlp': 72,
  },
}
every_method = pytest.mark.parametrize('method', sorted(methods.METHODS))
every_backbone = pytest.mark.parametrize('backbone', BACKBONES)


def adapted(method, backbone):
  changed = presets.preset('test/8', **BACKBONES[backbone], **kinds.changes(method))
  built = methods.build(method, changed, OPTIONS.get(method, {}))
  return Adapted(changed, built, CLASSES, scan=not built.unrolled)


def test_the_backbones_have_every_feature():
  for field, allowed in spec.CHOICES.items():
    if field == 'interpolation':  # It is the data pipeline's.
      continue
    have = {getattr(presets.preset('test/8', **changes), field) for changes in BACKBONES.values()}
    have.add(getattr(presets.preset('test/8'), field))
    assert have == set(allowed) - ({'relu'} if field == 'activation' else set())


def loss(trainable, frozen, model, images, state):
  logits = model.apply(
    {'params': combine(trainable, frozen), **state},
    images,
    train=True,
    rngs={'dropout': jax.random.key(1)},
    mutable=list(state),
  )[0]
  return (logits * jnp.arange(CLASSES)).sum()


@pytest.mark.parametrize(
  'backbone', ['rms_gated_rope', pytest.param('relative_post_norm', marks=pytest.mark.slow)]
)
@every_method
def test_the_gradient_of_what_trains_is_defined(method, backbone):
  model = adapted(method, backbone)
  trainable, frozen = partition(model.param_shapes(), model.method)
  images = jax.ShapeDtypeStruct(model.input_shape(2), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  state = {name: value for name, value in shapes.items() if name != 'params'}
  gradient = jax.eval_shape(
    lambda t, f, x, s: jax.grad(loss)(t, f, model, x, s), trainable, frozen, images, state
  )
  assert trees.describe(gradient) == trees.describe(trainable)


@every_backbone
def test_a_tuned_backbone_folds(backbone, random_like):
  changed = presets.preset('test/8', **BACKBONES[backbone])
  method = methods.build('lora', changed, {'rank': 2, 'targets': 'qkv,out,fc1,fc2'})
  model = Adapted(changed, method, CLASSES, scan=True)
  params = random_like(model.param_shapes())
  images = np.random.default_rng(0).standard_normal(model.input_shape(2)).astype(np.float32)
  want = jax.jit(lambda v: model.apply(v, images, method=model.features))({'params': params})
  folded = fold.fold(model, params)
  have = jax.jit(ViT(changed, {}, scan=True).apply)({'params': folded}, images)
  np.testing.assert_allclose(have, want, rtol=2e-4, atol=2e-5)


def test_a_bias_that_the_backbone_has_no_place_for_is_refused(random_like):
  changed = presets.preset('test/8', **BACKBONES['rms_gated_rope'])
  model = Adapted(changed, methods.build('ssf', changed, {}), CLASSES, scan=True)
  with pytest.raises(errors.UserError, match=r"adds a bias at '.*', where the backbone has none"):
    fold.fold(model, random_like(model.param_shapes()))


@pytest.mark.slow
@every_backbone
@every_method
def test_features_are_finite_and_those_of_the_backbone_where_promised(
  method, backbone, random_like
):
  model = adapted(method, backbone)
  trainable = model.init_trainable(jax.random.key(0))
  frozen = random_like(partition(model.param_shapes(), model.method)[1])
  params, state = combine(trainable, frozen), model.init_model_state()
  images = np.random.default_rng(0).standard_normal(model.input_shape(2)).astype(np.float32)
  have = jax.jit(lambda v: model.apply(v, images, method=model.features))(
    {'params': params, **state}
  )
  assert np.isfinite(have).all()
  gradient = jax.jit(jax.grad(loss), static_argnums=2)(trainable, frozen, model, images, state)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
  if model.method.exact_at_init:
    plain = {
      path: leaf for path, leaf in trees.flatten(params[BACKBONE]).items() if 'insert_' not in path
    }
    vit = ViT(model.spec, {}, scan=model.scan)
    want = jax.jit(vit.apply)({'params': trees.unflatten(plain)}, images)
    np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)
