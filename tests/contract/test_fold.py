"""Merging a method into the backbone: the same features, or an error that says why not."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import kinds

from losa_scenic.adapt_lib import fold, inserts, methods
from losa_scenic.adapt_lib.method import BACKBONE, Method
from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib import presets, sites
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.vit import ViT

ALL_LINEAR = 'query,key,value,out,fc1,fc2'
# (method, options): all that can be merged.
FOLDABLE = [
  ('linear', {}),
  ('full', {}),
  ('full', {'token_keep': 0.5}),
  ('bitfit', {}),
  ('last_k', {'k': 1}),
  ('mlp_only', {}),
  ('attention_only', {}),
  ('lora', {}),
  ('lora', {'targets': ALL_LINEAR, 'rank': 2}),
  ('lora', {'targets': 'query,key,value,out', 'rank': 2, 'map_head': True}),
  ('lora', {'targets': 'qkv', 'shared_down': True}),
  ('dora', {'targets': ALL_LINEAR, 'rank': 2}),
  ('vera', {'targets': ALL_LINEAR, 'rank': 6}),
  ('fact_tk', {'rank': 3}),
  ('fact_tt', {'rank': 3}),
  ('ssf', {}),
  ('repadapter', {}),
  ('repadapter', {'placement': 'attn'}),
  ('lora+ssf', {'lora': {'rank': 2}}),
  ('bitfit+fact_tt+lora', {}),
]
# method -> what the error names.
REASONS = {
  'losa': 'side network',
  'lst': 'side network',
  'last': 'side network',
  'head2toe': 'side network',
  'toast': 'side network',
  'toast_lite': 'side network',
  'hst': 'side network',
  'res_tuning_bypass': 'side network',
  'adapter': "'mlp'",
  'adapter_plus': "'block'",
  'adaptformer': "'mlp_block'",
  'convpass': "'attn'",
  'convpass_attn': "'attn'",
  'st_adapter': "'attn_block'",
  'temporal': "'time'",
  'vpt_shallow': "'encoder'",
  'vpt_deep': "'block'",
  'prompt_accumulate': "'block'",
  'express': "'encoder'",
  'prefix': "'attend'",
  'res_tuning': "'(attend|mlp|block)'",
  'noah': "'(encoder|block)'",
  'dtl': "'(encoder|block)'",
}


def adapted(method, options, backbone='test/8', scan=None, **changes):
  spec = presets.preset(backbone, **changes)
  built = methods.build(method, spec, options)
  return Adapted(spec, built, 5, scan=not built.unrolled if scan is None else scan)


def features_before_and_after(model, params, images):
  merged = fold.fold(model, params)
  plain = ViT(model.spec, {}, scan=model.scan)
  shapes = jax.eval_shape(plain.init, jax.random.key(0), images)['params']
  assert trees.describe(merged) == trees.describe(shapes), 'a plain backbone'
  before = model.apply({'params': params}, images, method='features')
  return np.asarray(before), np.asarray(plain.apply({'params': merged}, images))


# Merging probes each operation and takes seconds: of clips, a few methods always, all with -m slow.
QUICK_CLIPS = ('full', 'lora', 'ssf', 'fact_tt')
MERGED = [
  # Of each method the first, and all with -m slow.
  *(
    pytest.param(
      *(method, options, 'test/8', 'map'),
      marks=pytest.mark.slow if method in [name for name, _ in FOLDABLE[:i]] else (),
    )
    for i, (method, options) in enumerate(FOLDABLE)
  ),
  *(
    pytest.param(
      *(method, options, 'vivit-test/8x2', 'gap'),
      marks=() if method in QUICK_CLIPS else pytest.mark.slow,
    )
    for method, options in FOLDABLE
  ),
]


@pytest.mark.parametrize(('method', 'options', 'backbone', 'pool'), MERGED, ids=str)
def test_the_merged_backbone_has_the_same_features(method, options, backbone, pool, random_like):
  model = adapted(method, options, backbone, pool=pool)
  params = random_like(model.param_shapes())
  images = np.random.default_rng(1).standard_normal(model.input_shape(2)).astype(np.float32)
  before, after = features_before_and_after(model, params, images)
  np.testing.assert_allclose(after, before, atol=2e-5 * np.abs(before).max())
  inserted = any('insert_' in path for path in trees.flatten(params))
  plain = {k: v for k, v in trees.flatten(params[BACKBONE]).items() if 'insert_' not in k}
  without = ViT(model.spec, {}, scan=model.scan).apply({'params': trees.unflatten(plain)}, images)
  assert np.allclose(without, before) != inserted, 'the inserts did something'


@pytest.mark.parametrize('scan', [False, True])
def test_unrolled_and_scanned_layers(scan, random_like, make_batch):
  model = adapted('lora', {'targets': 'query,fc2'}, scan=scan)
  before, after = features_before_and_after(
    model, random_like(model.param_shapes()), make_batch(2)['inputs']
  )
  np.testing.assert_allclose(after, before, atol=2e-5 * np.abs(before).max())


@pytest.mark.parametrize(('method', 'options'), FOLDABLE, ids=str)
def test_what_can_be_merged_passes_the_check_without_weights(method, options):
  fold.check_model(adapted(method, options, pool='map'))


@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.parametrize(
  ('changes', 'site'),
  [({'patch_bias': False}, 'patch'), ({'qkv_bias': 'qv'}, 'key'), ({'linear_bias': False}, 'fc1')],
)
def test_a_bias_that_the_backbone_has_no_place_for_is_found_without_weights(changes, site, scan):
  message = f"adds a bias at '({site}|out)', where the backbone has none"
  with pytest.raises(errors.UserError, match=message):
    fold.check_model(adapted('ssf', {}, scan=scan, **changes))
  fold.check_model(adapted('lora', {}, scan=scan, **changes))


def test_layers_that_differ_are_all_checked():
  def only_last(i):
    return Squared if i == spec.depth - 1 else None

  spec = presets.preset('test/8')
  method = Method(inserts={'query': sites.PerLayer(only_last)}, unrolled=True)
  with pytest.raises(errors.UserError, match="'query' is no longer a linear function"):
    fold.check_model(Adapted(spec, method, 5, scan=False))


def test_every_method_can_be_merged_or_says_why_not():
  assert {name for name, _ in FOLDABLE if '+' not in name} | set(REASONS) == set(methods.METHODS)


@pytest.mark.parametrize(('method', 'reason'), REASONS.items())
def test_what_cannot_be_merged_says_why(method, reason):
  options = {'hst': {'stages': 3}}.get(method, {})
  with pytest.raises(errors.UserError, match=f'cannot be merged into the backbone.*{reason}'):
    fold.fold(adapted(method, options, **kinds.changes(method)), {})


def test_the_papers_lora_around_the_mlp_cannot_be_merged():
  with pytest.raises(errors.UserError, match="'mlp', which is not a linear operation"):
    fold.check(adapted('lora', {'targets': 'query,mlp'}).method)


class Squared(nn.Module):
  def __call__(self, f, x, ctx):
    return f(x) ** 2


@pytest.mark.parametrize('site', ['query', 'norm1', 'patch'])
def test_an_insert_that_is_not_linear_is_found_out(site, random_like):
  model = Adapted(presets.preset('test/8'), Method(inserts={site: Squared}), 5)
  with pytest.raises(errors.UserError, match=f"'{site}' is no longer a linear function"):
    fold.fold(model, random_like(model.param_shapes()))


def test_weights_that_are_not_finite_are_not_merged(random_like):
  model = adapted('lora', {})
  params = jax.tree.map(lambda leaf: leaf * np.nan, random_like(model.param_shapes()))
  with pytest.raises(errors.UserError, match='no longer a linear function'):
    fold.fold(model, params)


def test_weights_stored_in_half_precision_are_merged_in_float32(random_like, make_batch):
  spec = presets.preset('test/8')
  method = Method(inserts={'fc1': lambda: inserts.LowRank(rank=2)})
  model, images = Adapted(spec, method, 5), make_batch(2)['inputs']
  params = random_like(model.param_shapes())
  params = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16).astype(jnp.float32), params)
  half = {BACKBONE: jax.tree.map(lambda a: a.astype(jnp.bfloat16), params[BACKBONE])}
  before, after = features_before_and_after(model, params, images)
  merged = ViT(spec, {}).apply({'params': fold.fold(model, half)}, images)
  np.testing.assert_allclose(merged, after, atol=1e-5)
  np.testing.assert_allclose(after, before, atol=1e-5)
