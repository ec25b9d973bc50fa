"""Backbone files: what is written is what is read, and nothing damaged is read at all."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib import checkpoints, presets
from losa_scenic.model_lib.vit import ViT


def backbone_shapes(spec):
  images = jax.ShapeDtypeStruct((1, spec.image_size, spec.image_size, 3), jnp.float32)
  return jax.eval_shape(ViT(spec, {}, scan=True).init, jax.random.key(0), images)['params']


@pytest.fixture
def params(random_like):
  return random_like(backbone_shapes(presets.preset('test/8')))


@pytest.fixture
def saved(tmp_path, params):
  """The path of the JSON file of a backbone saved in float32."""
  return checkpoints.save(tmp_path / 'small.json', presets.preset('test/8'), params).path


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('suffix', ['.json', '.safetensors'])
def test_round_trip(dtype, suffix, tmp_path, params):
  spec = presets.preset('test/8', mean=(0.1, 0.2, 0.3))
  path = tmp_path / 'sub' / f'mine{suffix}'
  saved = checkpoints.save(path, spec, params, dtype=dtype, card={'data': 'none'})
  found = checkpoints.find(str(path))
  assert found == saved and found.spec == dataclasses.replace(spec, name='mine')
  loaded = trees.flatten(checkpoints.load(found))
  want = trees.flatten(params)
  assert set(loaded) == set(want)
  for leaf_path, leaf in loaded.items():
    assert leaf.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(leaf, want[leaf_path].astype(jnp.dtype(dtype)))
  assert json.loads(saved.path.read_text())['card'] == {'data': 'none'}
  assert found.identity() == {'spec': found.spec.to_json(), 'sha256': saved.sha256}


def test_hash_depends_on_every_stored_bit(tmp_path, params):
  one = checkpoints.save(tmp_path / 'a.json', presets.preset('test/8'), params).sha256
  params['norm']['bias'][3] = np.nextafter(params['norm']['bias'][3], np.float32(9))
  assert checkpoints.save(tmp_path / 'b.json', presets.preset('test/8'), params).sha256 != one


@pytest.mark.parametrize('position', [-1, -1000, -20_000])
def test_a_flipped_bit_is_found(saved, position):
  weights = saved.with_suffix('.safetensors')
  data = bytearray(weights.read_bytes())
  data[position] ^= 1
  weights.write_bytes(data)
  with pytest.raises(errors.UserError, match=r'is damaged: its hash is not the one in small\.json'):
    checkpoints.load(checkpoints.find(str(saved)))


@pytest.mark.parametrize('keep', [0, 4, 100, 50_000])
def test_a_truncated_file_is_found(saved, keep):
  weights = saved.with_suffix('.safetensors')
  weights.write_bytes(weights.read_bytes()[:keep])
  with pytest.raises(errors.UserError, match='Cannot read the weights file'):
    checkpoints.load(checkpoints.find(str(saved)))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      lambda flat: flat.update(cls=np.zeros((1, 2, 32), np.float32)),
      'cls: expected .*1, 1, 32.*found',
    ),
    (
      lambda flat: flat.update(cls=flat['cls'].astype(np.float16)),
      'cls: expected .*found.*float16',
    ),
    (lambda flat: flat.pop('norm/bias'), 'missing: norm/bias'),
    (lambda flat: flat.update(extra=np.zeros(1, np.float32)), 'unexpected: extra'),
  ],
  ids=['shape', 'dtype', 'missing', 'extra'],
)
def test_leaves_that_the_description_does_not_promise_are_found(saved, change, message):
  weights = saved.with_suffix('.safetensors')
  flat = safetensors_numpy.load_file(weights)
  change(flat)
  safetensors_numpy.save_file(flat, weights)
  with pytest.raises(errors.UserError, match=message):
    checkpoints.load(checkpoints.find(str(saved)))


def test_missing_files_are_named(saved):
  saved.with_suffix('.safetensors').unlink()
  with pytest.raises(errors.UserError, match=r'no weights file .*small\.safetensors'):
    checkpoints.load(checkpoints.find(str(saved)))
  saved.unlink()
  with pytest.raises(errors.UserError, match=r'no backbone description .*small\.json'):
    checkpoints.find(str(saved))


@pytest.mark.parametrize('field', ['name', 'spec', 'sha256', 'leaves'])
def test_a_description_without_a_field_is_refused(saved, field):
  description = json.loads(saved.read_text())
  del description[field]
  saved.write_text(json.dumps(description))
  with pytest.raises(errors.UserError, match=rf"lacks \['{field}'\]"):
    checkpoints.find(str(saved))


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('', 'Cannot read the backbone description'),
    ('{"format_version": 1, ', 'Cannot read the backbone description'),
    ('[]', 'is not a backbone description of version 1'),
    ('{"format_version": 2}', 'is not a backbone description of version 1'),
  ],
)
def test_a_description_that_is_none_is_refused(saved, text, message):
  saved.write_text(text)
  with pytest.raises(errors.UserError, match=message):
    checkpoints.find(str(saved))


def test_only_the_pooling_of_stored_weights_may_change(saved):
  assert checkpoints.find(str(saved), {'pool': 'gap'}).spec.pool == 'gap'
  with pytest.raises(errors.UserError, match='image_size cannot change for stored weights'):
    checkpoints.find(str(saved), {'image_size': 64})
  with pytest.raises(errors.UserError, match="has no MAP head: its pooling cannot become 'map'"):
    checkpoints.find(str(saved), {'pool': 'map'})


def test_a_preset_has_random_weights_and_may_change_in_all_fields():
  found = checkpoints.find('test/8', {'image_size': 16, 'pool': 'gap'})
  assert found == checkpoints.Backbone(presets.preset('test/8', image_size=16, pool='gap'))
  assert found.path is None and found.identity()['sha256'] is None
  with pytest.raises(ValueError, match='no stored weights'):
    checkpoints.load(found)


@pytest.mark.parametrize('name', ['S16', 'tst/8', 'vit_nothing'])
def test_an_unknown_name_lists_the_known_ones(name):
  with pytest.raises(errors.UserError, match=rf"Unknown backbone '{name}'.*Known: .*S/16") as e:
    checkpoints.find(name)
  if name == 'S16':
    assert "Did you mean 'S/16'" in str(e.value)


def test_a_file_of_another_kind_is_refused(tmp_path):
  path = tmp_path / 'weights.npz'
  path.write_bytes(b'x')
  with pytest.raises(errors.UserError, match=r'is no NAME\.json or NAME\.safetensors'):
    checkpoints.find(str(path))


@pytest.mark.parametrize('name', checkpoints.packaged())
def test_packaged_backbones_load_and_fit_their_geometry(name):
  found = checkpoints.find(name)
  have = {path: shape for path, (shape, _) in trees.describe(checkpoints.load(found)).items()}
  want = trees.describe(backbone_shapes(found.spec))
  assert have == {path: shape for path, (shape, _) in want.items()}
