"""What `BackboneSpec` can say, against a float64 reference written from its documentation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.backbone import Backbone

from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib import encoder, positions
from losa_scenic.model_lib.spec import CHOICES, BackboneSpec
from losa_scenic.model_lib.vit import ViT

SPEC = BackboneSpec('tiny', width=16, depth=2, mlp=12, heads=2, patch=4, image_size=12)
EVA, DINOV3 = {'rope': 'eva'}, {'rope': 'dinov3'}
GAP = {'pool': 'gap'}
SEEDS = range(20, 28)  # These have every value.

# (fields, the fields they are compared with: that much must make a difference).
CHANGES = [
  ({'pool': 'gap'}, {}),
  ({'pool': 'map'}, {}),
  ({'pool': 'cls_dist', 'registers': 2}, {'registers': 2}),
  ({'pool': 'gap', 'class_token': False}, GAP),
  ({'registers': 2}, {}),
  ({'registers': 2, **GAP}, GAP),
  ({'registers': 2, 'pool': 'map'}, {'pool': 'map'}),
  ({'registers': 3, 'class_token': False, **GAP}, {'class_token': False, **GAP}),
  ({'activation': 'gelu_erf'}, {}),
  ({'activation': 'quick_gelu'}, {}),
  ({'activation': 'silu'}, {}),
  ({'activation': 'relu'}, {}),
  ({'activation': 'quick_gelu', 'pool': 'map', 'depth': 1}, {'pool': 'map', 'depth': 1}),
  ({'gated': True}, {}),
  ({'gated': True, 'activation': 'silu'}, {'gated': True}),
  ({'norm': 'rms'}, {}),
  ({'norm': 'rms', 'pool': 'map'}, {'pool': 'map'}),
  ({'norm_eps': 0.1}, {}),
  ({'norm_eps': 0.1, 'norm': 'rms'}, {'norm': 'rms'}),
  ({'block_norm': 'post'}, {}),
  ({'final_norm': 'none'}, {}),
  ({'final_norm': 'pooled', **GAP}, GAP),
  ({'final_norm': 'pooled', 'pool': 'map'}, {'pool': 'map'}),
  ({'patch_norm': True}, {}),
  ({'pre_norm': True}, {}),
  ({'attn_norm': True}, {}),
  ({'mlp_norm': True}, {}),
  ({'mlp_norm': True, 'gated': True}, {'gated': True}),
  ({'qk_norm': 'head'}, {}),
  ({'qk_norm': 'width'}, {}),
  ({'qk_norm': 'head', **EVA}, EVA),
  ({'qk_norm': 'width', **DINOV3}, DINOV3),
  ({'layer_scale': True}, {}),
  ({'layer_scale': True, 'block_norm': 'post'}, {'block_norm': 'post'}),
  ({'patch_bias': False}, {}),
  ({'qkv_bias': 'qv', **EVA}, EVA),  # Without positions softmax cancels the bias of the keys.
  ({'qkv_bias': 'none'}, {}),
  ({'linear_bias': False}, {}),
  ({'linear_bias': False, 'gated': True}, {'gated': True}),
  ({'positions': 'none'}, {}),
  (EVA, {}),
  (DINOV3, {}),
  ({'rope_theta': 10.0, **EVA}, EVA),
  ({'rope_theta': 10.0, **DINOV3}, DINOV3),
  ({'rope_grid': 7, **EVA}, EVA),
  ({'registers': 2, **EVA}, {'registers': 2}),
  ({'class_token': False, **GAP, **DINOV3}, {'class_token': False, **GAP}),
  ({'relative_positions': True}, {}),
  ({'factorised': True}, {'frames': 4}),
  (
    {'relative_positions': True, 'class_token': False, **GAP},
    {'class_token': False, **GAP},
  ),
]
VALUES = {
  **{name: values for name, values in CHOICES.items() if name != 'interpolation'},
  **{field.name: (False, True) for field in dataclasses.fields(BackboneSpec) if field.type is bool},
  'registers': (0, 2),
  'norm_eps': (1e-6, 1e-2),
  'rope_theta': (100.0, 7.0),
  'rope_grid': (16, 5),
  'frames': (0, 4),
  'tubelet': (1, 2),
}


def example(spec, random_like):
  """Random parameters, the same ones wherever two specs have the same path and shape; images."""
  images = np.random.default_rng(1).standard_normal((2, *spec.input_shape)).astype(np.float32)
  shapes = jax.eval_shape(ViT(spec, {}).init, jax.random.key(0), images)['params']
  leaves = {
    path: random_like(leaf, seed=[*path.encode()], scale=0.5)
    for path, leaf in trees.flatten(shapes).items()
  }
  return trees.unflatten(leaves), images


def compare(spec, random_like, scan):
  """Checks the model against the reference; returns the features."""
  params, images = example(spec, random_like)
  reference = Backbone(trees.flatten(params), spec)
  want = reference.features(images)
  assert reference.read == set(reference.leaves)
  params = encoder.stack_layers(params) if scan else params
  have = jax.jit(ViT(spec, {}, scan=scan).apply)({'params': params}, images)
  np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)
  return want


@pytest.mark.parametrize(('fields', 'plain'), CHANGES, ids=lambda fields: str(fields)[1:-1])
def test_a_field_does_what_it_says(fields, plain, random_like):
  features = compare(dataclasses.replace(SPEC, **(plain | fields)), random_like, scan=False)
  spec = dataclasses.replace(SPEC, **plain)
  params, images = example(spec, random_like)
  difference = np.abs(features - Backbone(trees.flatten(params), spec).features(images)).max()
  assert difference > 5e-5  # Five times what `compare` lets pass; most differ by more than 0.1.
  assert features.std() > 0.1


def drawn(seed):
  """A random spec that is allowed."""
  rng = np.random.default_rng(seed)
  while True:
    fields = {name: values[rng.integers(len(values))] for name, values in VALUES.items()}
    try:
      return dataclasses.replace(SPEC, **fields)
    except errors.UserError:
      continue


@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.parametrize('seed', SEEDS)
def test_fields_combine(seed, scan, random_like):
  compare(drawn(seed), random_like, scan)


def test_the_combinations_have_every_value():
  specs = [drawn(seed) for seed in SEEDS]
  for name, values in VALUES.items():
    assert {getattr(spec, name) for spec in specs} == set(values), name


@pytest.mark.parametrize('rope', ['eva', 'dinov3'])
def test_rotary_positions_compare_by_offset_and_leave_other_tokens_alone(rope, random_like):
  spec = dataclasses.replace(SPEC, rope=rope, registers=2, image_size=20)
  token = random_like(jax.ShapeDtypeStruct((1, 1, spec.width), jnp.float32), seed=1)
  x = jnp.asarray(np.repeat(token, spec.tokens + 4, axis=1))  # Four tokens of a method at the end.
  turned = np.asarray(positions.rotate(x, spec), np.float64)
  own = slice(spec.prefix, spec.tokens)
  np.testing.assert_array_equal(turned[:, : spec.prefix], x[:, : spec.prefix])
  np.testing.assert_array_equal(turned[:, spec.tokens :], x[:, spec.tokens :])
  np.testing.assert_allclose(
    (turned**2).sum(-1), np.broadcast_to((token**2).sum(-1), turned.shape[:2]), rtol=1e-5
  )
  scores = (turned[0, own] @ turned[0, own].T).reshape(5, 5, 5, 5)
  np.testing.assert_allclose(scores[1:, 1:, 1:, 1:], scores[:-1, :-1, :-1, :-1], atol=1e-5)
  assert np.abs(scores[0, 0] - scores[0, 0].T).max() > 1e-2  # Rows and columns differ.
  half = positions.rotate(x.astype(jnp.bfloat16), spec)
  assert half.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(half, np.float64), turned, atol=2e-2)


@pytest.mark.parametrize('class_token', [True, False])
def test_relative_biases_of_added_tokens_are_zero(class_token, random_like):
  fields = {'class_token': class_token, 'pool': 'gap', 'relative_positions': True}
  spec = dataclasses.replace(SPEC, **fields)
  shape = (positions.num_offsets(spec), spec.heads)
  table = random_like(jax.ShapeDtypeStruct(shape, jnp.float32))
  n = spec.tokens
  bias = np.asarray(positions.relative_bias(jnp.asarray(table), spec, n + 2, n + 5))
  assert bias.shape == (spec.heads, n + 2, n + 5)
  assert not bias[:, n:].any() and not bias[:, :, n:].any()
  assert bias[:, :n, :n].all()
  # What a row of the table says holds for all pairs of that offset.
  assert len(np.unique(bias[0, :n, :n])) == 5 * 5 + 3 * class_token


@pytest.mark.parametrize('bias', ['qkv', 'qv', 'none'])
def test_has_bias_names_the_linears_with_a_bias(bias):
  spec = dataclasses.replace(SPEC, qkv_bias=bias, linear_bias=False)
  named = ('query', 'key', 'value', 'out', 'fc1', 'fc2', 'gate')
  have = {name for name in named if spec.has_bias(name)}
  assert have == {'qkv': {'query', 'key', 'value'}, 'qv': {'query', 'value'}, 'none': set()}[bias]


@pytest.mark.parametrize('field', CHOICES)
def test_a_choice_that_is_none_is_a_user_error(field):
  good = CHOICES[field][-1]
  with pytest.raises(errors.UserError, match=f"Unknown backbone {field} '{good}x'.*{good}"):
    dataclasses.replace(SPEC, **{field: f'{good}x'})


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'activation': 'none'}, "Unknown backbone activation 'none'"),
    ({'width': 12, **EVA}, 'heads of a multiple of 4 channels, not 6'),
    ({'width': 12, **DINOV3}, 'heads of a multiple of 4 channels, not 6'),
    ({'pool': 'cls_dist'}, "'cls_dist' needs a register"),
    ({'pool': 'cls_dist', 'class_token': False, 'registers': 1}, "'cls_dist' needs class_token"),
    ({'registers': -1}, 'registers must be at least 0, got -1'),
    ({'rope_grid': 0}, 'rope_grid must be above 0, got 0'),
    ({'relative_positions': True, 'registers': 1}, 'Relative positions know no register tokens'),
    ({'relative_positions': True, 'frames': 2}, 'are for images, not for clips'),
    ({'frames': 2, **EVA}, 'are for images, not for clips'),
    ({'frames': 2, **DINOV3}, 'are for images, not for clips'),
  ],
)
def test_fields_that_exclude_each_other_are_a_user_error(fields, message):
  with pytest.raises(errors.UserError, match=message):
    dataclasses.replace(SPEC, **fields)
