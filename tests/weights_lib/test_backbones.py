"""Backbone files: what is written is what is read, and nothing damaged is read at all."""

import dataclasses
import errno
import hashlib
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import numpy as safetensors_numpy

from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib import encoder, presets
from losa_scenic.model_lib.vit import ViT
from losa_scenic.weights_lib import backbones, resize

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'backbones'


def backbone_shapes(spec):
  images = jax.ShapeDtypeStruct((1, spec.image_size, spec.image_size, 3), jnp.float32)
  return jax.eval_shape(ViT(spec, {}, scan=True).init, jax.random.key(0), images)['params']


@pytest.fixture
def params(random_like):
  return random_like(backbone_shapes(presets.preset('test/8')))


@pytest.fixture
def saved(tmp_path, params):
  """The path of the JSON file of a backbone saved in float32."""
  return backbones.save(tmp_path / 'small.json', presets.preset('test/8'), params).weights.path


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('suffix', ['.json', '.safetensors'])
def test_round_trip(dtype, suffix, tmp_path, params):
  spec = presets.preset('test/8', mean=(0.1, 0.2, 0.3))
  path = tmp_path / 'sub' / f'mine{suffix}'
  saved = backbones.save(path, spec, params, dtype=dtype, card={'data': 'none'})
  found = backbones.find(str(path))
  assert found == saved and found.spec == dataclasses.replace(spec, name='mine')
  loaded = trees.flatten(backbones.load(found))
  want = trees.flatten(params)
  assert set(loaded) == set(want)
  for leaf_path, leaf in loaded.items():
    assert leaf.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(leaf, want[leaf_path].astype(jnp.dtype(dtype)))
  assert json.loads(saved.weights.path.read_text())['card'] == {'data': 'none'}
  geometry = {k: v for k, v in found.spec.to_json().items() if k != 'name'}
  assert found.identity() == {'spec': geometry, 'sha256': saved.sha256}


def test_hash_depends_on_every_stored_bit(tmp_path, params):
  one = backbones.save(tmp_path / 'a.json', presets.preset('test/8'), params).sha256
  params['norm']['bias'][3] = np.nextafter(params['norm']['bias'][3], np.float32(9))
  assert backbones.save(tmp_path / 'b.json', presets.preset('test/8'), params).sha256 != one


@pytest.mark.parametrize('position', [-1, -1000, -20_000])
def test_a_flipped_bit_is_found(saved, position):
  weights = saved.with_suffix('.safetensors')
  data = bytearray(weights.read_bytes())
  data[position] ^= 1
  weights.write_bytes(data)
  with pytest.raises(errors.UserError, match=r'is damaged: its hash is not the one in small\.json'):
    backbones.load(backbones.find(str(saved)))


@pytest.mark.parametrize('keep', [0, 4, 100, 50_000])
def test_a_truncated_file_is_found(saved, keep):
  weights = saved.with_suffix('.safetensors')
  weights.write_bytes(weights.read_bytes()[:keep])
  with pytest.raises(errors.UserError, match=r'small\.safetensors: the (file|header)'):
    backbones.load(backbones.find(str(saved)))


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
    backbones.load(backbones.find(str(saved)))


def test_missing_files_are_named(saved):
  saved.with_suffix('.safetensors').unlink()
  with pytest.raises(errors.UserError, match=r'no weights file .*small\.safetensors'):
    backbones.load(backbones.find(str(saved)))
  saved.unlink()
  with pytest.raises(errors.UserError, match=r'no backbone description .*small\.json'):
    backbones.find(str(saved))


@pytest.mark.parametrize('field', ['name', 'spec', 'sha256', 'leaves'])
def test_a_description_without_a_field_is_refused(saved, field):
  description = json.loads(saved.read_text())
  del description[field]
  saved.write_text(json.dumps(description))
  with pytest.raises(errors.UserError, match=rf"lacks \['{field}'\]"):
    backbones.find(str(saved))


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('', 'Cannot read the backbone description'),
    ('{"format_version": 1, ', 'Cannot read the backbone description'),
    ('[]', 'is not a backbone description of version 2'),
    ('{"format_version": 1}', 'is not a backbone description of version 2'),
  ],
)
def test_a_description_that_is_none_is_refused(saved, text, message):
  saved.write_text(text)
  with pytest.raises(errors.UserError, match=message):
    backbones.find(str(saved))


def test_of_stored_weights_pooling_and_preprocessing_may_change(saved):
  assert backbones.find(str(saved), {'pool': 'gap'}).spec.pool == 'gap'
  with pytest.raises(errors.UserError, match='heads cannot change for stored weights'):
    backbones.find(str(saved), {'heads': 4})
  with pytest.raises(errors.UserError, match="has no MAP head: its pooling cannot become 'map'"):
    backbones.find(str(saved), {'pool': 'map'})


def test_a_preset_has_random_weights_and_may_change_in_all_fields():
  found = backbones.find('test/8', {'image_size': 16, 'pool': 'gap'})
  assert found == backbones.Backbone(presets.preset('test/8', image_size=16, pool='gap'))
  assert found.weights is None and found.identity()['sha256'] is None
  with pytest.raises(ValueError, match='no stored weights'):
    backbones.load(found)


@pytest.mark.parametrize('name', ['S16', 'tst/8', 'vit_nothing'])
def test_an_unknown_name_lists_the_known_ones(name):
  with pytest.raises(errors.UserError, match=rf"Unknown backbone '{name}'.*Known: .*S/16") as e:
    backbones.find(name)
  if name == 'S16':
    assert "Did you mean 'S/16'" in str(e.value)


def test_a_file_of_another_kind_is_refused(tmp_path):
  path = tmp_path / 'weights.npz'
  path.write_bytes(b'x')
  with pytest.raises(errors.UserError, match=r'weights\.npz is no checkpoint of a known kind'):
    backbones.find(str(path))


def flat(tree):
  return {path: np.asarray(leaf) for path, leaf in trees.flatten(tree).items()}


def test_another_input_size_resamples_the_position_embedding_alone(saved, params):
  found = backbones.find(str(saved), {'image_size': 48, 'mean': [0.1, 0.2, 0.3]})
  assert found.spec.grid == (1, 6, 6) and found.spec.mean == (0.1, 0.2, 0.3)
  have, want = flat(backbones.load(found)), flat(params)
  positions, old = have.pop('pos_embedding'), want.pop('pos_embedding')
  np.testing.assert_array_equal(positions[:, 0], old[:, 0])
  again = resize.position_embedding(old, (4, 4), (6, 6), 1, 'bicubic_antialias')
  np.testing.assert_array_equal(positions, again)
  for path in want:
    np.testing.assert_array_equal(have[path], want[path])


@pytest.mark.parametrize('stack', [True, False])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_layers_are_stacked_or_not_and_cast_as_asked(saved, params, stack, dtype):
  have = flat(
    backbones.load(
      backbones.find(str(saved)),
      stack=stack,
      dtype=lambda path: jnp.float32 if path.endswith('bias') else jnp.dtype(dtype),
    )
  )
  want = flat(params if stack else encoder.unstack_layers(params))
  assert have.keys() == want.keys()
  for path, leaf in want.items():
    kind = jnp.float32 if path.endswith('bias') else jnp.dtype(dtype)
    assert have[path].dtype == kind
    np.testing.assert_array_equal(have[path], leaf.astype(kind))


def test_a_device_receives_only_its_part(saved, params):
  mesh = jax.make_mesh((jax.device_count(),), ('data',))
  split = NamedSharding(mesh, PartitionSpec(None, 'data'))

  def place(path, value):
    sharded = path.endswith('kernel') and value.shape[1] % mesh.size == 0
    return jax.device_put(value, split if sharded else NamedSharding(mesh, PartitionSpec()))

  loaded = trees.flatten(backbones.load(backbones.find(str(saved)), place=place))
  kernel = loaded['encoder/layers/block/fc1/kernel']
  assert mesh.size > 1
  assert kernel.addressable_shards[0].data.shape == (3, 32 // mesh.size, 64)
  np.testing.assert_array_equal(kernel, flat(params)['encoder/layers/block/fc1/kernel'])


def test_on_a_cpu_weights_are_used_where_the_file_is_mapped(saved):
  found = backbones.find(str(saved))
  kernel = trees.flatten(backbones.load(found))['encoder/layers/block/fc1/kernel']
  mapped = found.weights.read_stacked('encoder/layers/block/fc1/kernel')
  assert isinstance(mapped.base, np.memmap) and not mapped.flags.writeable
  assert mapped.ctypes.data % 64 == 0
  assert _is_file_backed(kernel.unsafe_buffer_pointer(), 'small.safetensors')


def _is_file_backed(address, name):
  for line in pathlib.Path('/proc/self/maps').read_text().splitlines():
    start, end = (int(part, 16) for part in line.split()[0].split('-'))
    if start <= address < end:
      return line.endswith(name)
  return False


def test_weights_in_use_survive_their_file_being_written_anew(saved, params):
  found = backbones.find(str(saved))
  loaded = backbones.load(found)
  other = jax.tree.map(lambda leaf: leaf + 1, params)
  backbones.save(saved, presets.preset('test/8'), other)
  for path, leaf in flat(params).items():
    np.testing.assert_array_equal(flat(loaded)[path], leaf)


def overwrite(weights, value):
  weights.write_bytes(value)


def replace(weights, value):
  other = weights.with_name('other')
  other.write_bytes(value)
  os.replace(other, weights)


@pytest.mark.parametrize('change', [overwrite, replace])
@pytest.mark.parametrize('later', [0, 1])
def test_what_is_mapped_is_what_was_verified(saved, change, later):
  found = backbones.find(str(saved)).weights
  found.verify()
  weights = saved.with_suffix('.safetensors')
  status, data = weights.stat(), bytearray(weights.read_bytes())
  data[-1] ^= 1
  change(weights, bytes(data) + b'x' * (1 - later))  # Another size, or only another time.
  os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + later))
  for read in (found.read_stacked, found.read):
    with pytest.raises(errors.UserError, match='was changed while it was being read'):
      read('norm/bias')


@pytest.mark.parametrize('fails', ['small.json', 'small.safetensors'])
def test_a_failed_write_leaves_the_old_backbone(saved, params, fails, monkeypatch):
  folder, move = saved.parent, os.replace
  before = {path.name: path.read_bytes() for path in folder.iterdir()}

  def fails_once(source, target):
    if pathlib.Path(target).name == fails and 'old' not in pathlib.Path(source).name:
      raise OSError(errno.EIO, 'Input/output error')
    move(source, target)

  monkeypatch.setattr(os, 'replace', fails_once)
  other = jax.tree.map(lambda leaf: leaf + 1, params)
  with pytest.raises(errors.UserError, match=r'Cannot write .*small\.safetensors: Input/output'):
    backbones.save(saved, presets.preset('test/8'), other)
  assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_full_disk_at_the_description_leaves_the_old_backbone(saved, params, monkeypatch):
  before = {path.name: path.read_bytes() for path in saved.parent.iterdir()}

  def full(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(pathlib.Path, 'write_text', full)
  with pytest.raises(errors.UserError, match='No space left'):
    backbones.save(saved, presets.preset('test/8'), jax.tree.map(lambda leaf: leaf + 1, params))
  assert {path.name: path.read_bytes() for path in saved.parent.iterdir()} == before


def test_a_folder_that_cannot_be_made_is_said(saved, params):
  with pytest.raises(errors.UserError, match='Cannot write'):
    backbones.save(saved / 'sub' / 'mine.json', presets.preset('test/8'), params)


def test_a_public_checkpoint_is_a_backbone():
  folder = GOLDEN / 'timm_siglip'
  found = backbones.find(str(folder), {'image_size': 16})
  assert found.spec.pool == 'map' and found.spec.image_size == 16
  assert found.sha256 == hashlib.sha256((folder / 'model.safetensors').read_bytes()).hexdigest()
  expected = np.load(folder / 'expected.npz')
  found = backbones.find(str(folder))
  have = ViT(found.spec, {}, scan=True).apply(
    {'params': jax.tree.map(jnp.float32, backbones.load(found))}, expected['image']
  )
  np.testing.assert_allclose(have, expected['pooled'], rtol=1e-4, atol=1e-5)
  with pytest.raises(errors.UserError, match='width=8 contradicts'):
    backbones.find(str(folder), {'width': 8})


@pytest.mark.parametrize('name', backbones.packaged())
def test_packaged_backbones_load_and_fit_their_geometry(name):
  found = backbones.find(name)
  have = {path: shape for path, (shape, _) in trees.describe(backbones.load(found)).items()}
  want = trees.describe(backbone_shapes(found.spec))
  assert have == {path: shape for path, (shape, _) in want.items()}
