"""Backbone geometry: exact parameter counts, derived sizes, and refusals."""

import json

import jax
import jax.numpy as jnp
import pytest

from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib import presets
from losa_scenic.model_lib.spec import BackboneSpec
from losa_scenic.model_lib.vit import ViT


def count(name, **changes):
  spec = presets.preset(name, **changes)
  images = jax.ShapeDtypeStruct((1, *spec.input_shape), jnp.float32)
  return trees.count(jax.eval_shape(ViT(spec, {}, scan=True).init, jax.random.key(0), images))


# Ti, S, B, L: timm's vit_*_patch16_224 without classifier. g, G, e: Scaling Vision Transformers.
@pytest.mark.parametrize(
  ('name', 'changes', 'want'),
  [
    ('Ti/16', {}, 5_524_416),
    ('S/16', {}, 21_665_664),
    ('B/16', {}, 85_798_656),
    ('L/16', {}, 303_301_632),
    ('g/14', {'pool': 'gap'}, 1_011_199_616),
    ('G/14', {'pool': 'gap'}, 1_842_772_352),
    ('e/14', {'pool': 'gap'}, 3_805_417_728),
    ('g/14', {}, 1_036_448_384),
  ],
)
def test_exact_number_of_parameters(name, changes, want):
  assert count(name, **changes) == want


@pytest.mark.parametrize('name', presets.names())
def test_number_of_parameters_follows_the_geometry(name):
  s = presets.preset(name)
  d, m = s.width, s.mlp
  attention, mlp, norm = 4 * (d * d + d), d * m + m + m * d + d, 2 * d
  want = (3 * s.tubelet * s.patch**2 * d + d) + s.prefix * d + s.tokens * d
  want += s.depth * (attention + mlp + 2 * norm) + norm
  if s.pool == 'map':
    want += d + attention + norm + mlp
  assert count(name) == want


@pytest.mark.parametrize(
  ('name', 'changes', 'tokens', 'prefix', 'side'),
  [
    ('B/16', {}, 197, 1, 14),
    ('g/14', {}, 256, 0, 16),
    ('B/16', {'pool': 'gap'}, 196, 0, 14),
    ('B/16', {'pool': 'gap', 'class_token': True}, 197, 1, 14),
    ('Ti/8', {'image_size': 64}, 65, 1, 8),
    ('Mi/8', {}, 65, 1, 8),
    ('test/8', {}, 17, 1, 4),
  ],
)
def test_token_numbers(name, changes, tokens, prefix, side):
  spec = presets.preset(name, **changes)
  assert (spec.tokens, spec.prefix, spec.grid) == (tokens, prefix, (1, side, side))
  assert spec.input_shape == (spec.image_size, spec.image_size, 3)


@pytest.mark.parametrize(
  ('name', 'changes', 'tokens', 'grid', 'input_shape'),
  [
    ('vivit-g/14x2', {}, 4096, (16, 16, 16), (32, 224, 224, 3)),
    ('vivit-B/16x4', {}, 8 * 196, (8, 14, 14), (32, 224, 224, 3)),
    ('vivit-test/8x2', {}, 32, (2, 4, 4), (4, 32, 32, 3)),
    ('vivit-test/8x1', {'frames': 3, 'pool': 'cls'}, 49, (3, 4, 4), (3, 32, 32, 3)),
  ],
)
def test_clips_make_a_grid_of_tubelets(name, changes, tokens, grid, input_shape):
  spec = presets.preset(name, **changes)
  assert (spec.tokens, spec.grid, spec.input_shape) == (tokens, grid, input_shape)


@pytest.mark.parametrize('name', presets.names())
def test_json_round_trip(name):
  spec = presets.preset(name, mean=(0.1, 0.2, 0.3))
  assert BackboneSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
  ('name', 'changes', 'message'),
  [
    ('B16', {}, r"Unknown backbone 'B16'\. Did you mean 'B/16'"),
    ('X/16', {}, "Unknown backbone 'X/16'"),
    ('g/14x2', {}, "Unknown backbone 'g/14x2'"),
    ('vivit-g/14', {}, r"Unknown backbone 'vivit-g/14'\. Did you mean 'vivit-g/14x2'"),
    ('vivit-g/14x2', {'frames': 31}, '31 frames are not a multiple of the tubelet length 2'),
    ('B/16', {'widht': 5}, r"Unknown backbone field 'widht'\. Did you mean 'width'"),
    ('B/16', {'pool': 'mean'}, "Unknown backbone pool 'mean'"),
    ('B/16', {'activation': 'gelu'}, "Unknown backbone activation 'gelu'"),
    ('B/16', {'depth': 0}, 'depth must be at least 1, got 0'),
    ('B/16', {'heads': 7}, '7 heads do not divide the width 768'),
    ('B/14', {'image_size': 225}, '225 is not a multiple of the patch size 14'),
    ('B/16', {'class_token': False}, "Pooling 'cls' needs class_token=True"),
  ],
)
def test_bad_geometry_is_a_user_error(name, changes, message):
  with pytest.raises(errors.UserError, match=message):
    presets.preset(name, **changes)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda fields: fields.pop('width'), 'lacks: width'),
    (lambda fields: fields.update(wdth=3), r"Unknown backbone field 'wdth'\. Did you mean 'width'"),
  ],
)
def test_from_json_refuses_missing_and_unknown_fields(change, message):
  fields = presets.preset('test/8').to_json()
  change(fields)
  with pytest.raises(errors.UserError, match=message):
    BackboneSpec.from_json(fields)
