"""Files of big_vision and Scenic, made of the numbers of a file of vision_transformer's.

That file's outputs are compared with timm's in test_families.py; here the same weights in another
spelling have to become the same parameters, to the bit.
"""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from flax import serialization
from reference import public_checkpoints as public

from losa_scenic.common_lib import errors
from losa_scenic.weights_lib import checkpoint

BF16 = np.dtype(ml_dtypes.bfloat16)
CASE = 'npz_augreg'
FILE = public.GOLDEN / 'backbones' / CASE / public.INDEX[CASE]['files'][0]
POSITIONS = 'Transformer/posembed_input/pos_embedding'
# Flax before Linen counted the modules of a block through; Linen counts those of a kind.
LINEN = {
  'MultiHeadDotProductAttention_1': 'MultiHeadDotProductAttention_0',
  'LayerNorm_2': 'LayerNorm_1',
  'MlpBlock_3': 'MlpBlock_0',
}
WIDTH, HEADS, MLP, PATCHES = 24, 3, 26, 9


def linen():
  """{name: array}, the names of vit.py in Scenic and of big_vision's first checkpoints."""
  found = {}
  for name, array in np.load(FILE).items():
    found['/'.join(LINEN.get(part, part) for part in name.split('/'))] = array
  return found


def rooted():
  """As big_vision writes today: positions at the root, of patches alone; those of cls are in it."""
  found = linen()
  positions = found.pop(POSITIONS)
  return found | {'pos_embedding': positions[:, 1:], 'cls': found['cls'] + positions[:, :1]}


def scanned(named):
  """All layers in one array, along a new first axis."""
  found = {name: array for name, array in named.items() if 'encoderblock_' not in name}
  for name in named:
    if 'encoderblock_0/' in name:
      layers = [named[name.replace('_0/', f'_{i}/', 1)] for i in range(2)]
      found[name.replace('encoderblock_0', 'encoderblock')] = np.stack(layers)
  return found


def text_tower(prefix):
  """A tower whose blocks are named as the image tower's."""
  blocks = {f'{prefix}{n}': x for n, x in linen().items() if n.startswith('Transformer/encoder')}
  return {**blocks, f'{prefix}Embed_0/embedding': np.ones((11, WIDTH), np.float32)}


def map_head(rng):
  """{name: array} of big_vision's attention pooling."""

  def values(*shape):
    return rng.standard_normal(shape).astype(np.float32)

  attention, each = 'MAPHead_0/MultiHeadDotProductAttention_0', (HEADS, WIDTH // HEADS)
  found = {'MAPHead_0/probe': values(1, 1, WIDTH)}
  for part in ('query', 'key', 'value'):
    found |= {f'{attention}/{part}/kernel': values(WIDTH, *each)}
    found |= {f'{attention}/{part}/bias': values(*each)}
  found |= {f'{attention}/out/kernel': values(*each, WIDTH)}
  found |= {f'{attention}/out/bias': values(WIDTH)}
  found |= {f'MAPHead_0/LayerNorm_0/{part}': values(WIDTH) for part in ('scale', 'bias')}
  for dense, shape in (('Dense_0', (WIDTH, MLP)), ('Dense_1', (MLP, WIDTH))):
    found |= {f'MAPHead_0/MlpBlock_0/{dense}/kernel': values(*shape)}
    found |= {f'MAPHead_0/MlpBlock_0/{dense}/bias': values(shape[1])}
  return found


def prefixed(prefix, named):
  return {prefix + name: array for name, array in named.items()}


def nested(named):
  tree = {}
  for name, array in named.items():
    *groups, leaf = name.split('/')
    node = tree
    for group in groups:
      node = node.setdefault(group, {})
    node[leaf] = array
  return tree


def write(path, named):
  np.savez(path, **named)
  return path


def described(spec):
  return dataclasses.replace(spec, name='')


def leaves(opened):
  return {path: opened.read(path) for path in opened.shapes}


def assert_same(path, want=None, rounded=None):
  """The file at `path` is the vision_transformer file, or one rounded to another dtype."""
  ours, theirs = checkpoint.open_checkpoint(path), checkpoint.open_checkpoint(want or FILE)
  assert described(ours.spec) == described(theirs.spec)
  want = leaves(theirs)
  have = leaves(ours)
  assert set(have) == set(want)
  for leaf, value in have.items():
    expected = want[leaf] if rounded is None else want[leaf].astype(rounded)
    assert value.dtype == expected.dtype
    np.testing.assert_array_equal(value, expected, leaf)


@pytest.mark.parametrize('prefix', ['', 'params/', 'opt/target/'])
def test_big_vision(prefix, tmp_path):
  state = {'opt/state/step': np.ones(1)} if prefix.startswith('opt') else {}
  assert_same(write(tmp_path / 'a.npz', prefixed(prefix, linen()) | state))


def without_positions_of_cls(path):
  """The vision_transformer file with the class token's position added to it, as in `rooted`."""
  arrays = dict(np.load(FILE))
  arrays['cls'] = arrays['cls'] + arrays[POSITIONS][:, :1]
  arrays[POSITIONS] = arrays[POSITIONS] * np.r_[0, np.ones(PATCHES)].astype('f')[:, None]
  return write(path, arrays)


def test_positions_at_the_root_are_of_patches_alone(tmp_path):
  want = without_positions_of_cls(tmp_path / 'want.npz')
  assert_same(write(tmp_path / 'a.npz', prefixed('params/', rooted())), want)
  # Which changes nothing of what the model computes.
  opened, expected = checkpoint.open_checkpoint(want), np.load(FILE.parent / 'expected.npz')
  blocks, pooled = public.outputs(opened, public.leaves_of(opened), expected['image'])
  assert public.relative(blocks, expected['blocks']) < public.BOUND
  assert public.relative(pooled, expected['pooled']) < public.BOUND


@pytest.mark.parametrize('prefix', ['', 'params/'])
def test_an_image_tower_beside_a_text_tower(prefix, tmp_path):
  towers = prefixed('img/', linen()) | text_tower('txt/') | {'t': np.ones(1), 'b': np.ones(1)}
  path = write(tmp_path / 'a.npz', prefixed(prefix, towers))
  assert_same(path)
  assert_same(f'{path}:img')
  with pytest.raises(errors.UserError, match=r"'image'\. Did you mean 'img'"):
    checkpoint.open_checkpoint(f'{path}:image')
  with pytest.raises(errors.UserError, match='no ViT of a known family'):
    checkpoint.open_checkpoint(f'{path}:txt')


def test_two_image_towers_have_to_be_told_apart(tmp_path):
  path = write(tmp_path / 'a.npz', prefixed('img/', linen()) | prefixed('teacher/', linen()))
  with pytest.raises(errors.UserError, match=r"several encoders: 'img/' .*'teacher/'"):
    checkpoint.open_checkpoint(path)
  assert_same(f'{path}:teacher')


def test_scanned_layers(tmp_path):
  assert_same(write(tmp_path / 'a.npz', prefixed('params/', scanned(linen()))))
  towers = prefixed('params/img/', scanned(linen())) | text_tower('params/txt/')
  assert_same(f'{write(tmp_path / "b.npz", towers)}:img')


def test_bfloat16_is_raw_bytes(tmp_path):
  named = {name: array.astype(BF16).view('V2') for name, array in scanned(linen()).items()}
  path = write(tmp_path / 'a.npz', named)
  assert np.load(path)['cls'].dtype.str == '|V2'
  assert_same(path, rounded=BF16)


def test_a_map_head(tmp_path):
  tower = {name: array for name, array in rooted().items() if name != 'cls'}
  head = map_head(np.random.default_rng(0))
  opened = checkpoint.open_checkpoint(write(tmp_path / 'a.npz', tower | head))
  want = checkpoint.open_checkpoint(FILE).spec
  assert described(opened.spec) == described(
    dataclasses.replace(want, pool='map', class_token=False)
  )
  have = leaves(opened)
  np.testing.assert_array_equal(have['pos_embedding'], np.load(FILE)[POSITIONS][:, 1:])
  for name, array in head.items():
    path = name.replace('MAPHead_0', 'map_head').replace('MultiHeadDotProductAttention_0/', '')
    path = path.replace('LayerNorm_0', 'norm').replace('MlpBlock_0/Dense_0', 'fc1')
    path = path.replace('MlpBlock_0/Dense_1', 'fc2')
    np.testing.assert_array_equal(have[path].ravel(), array.ravel(), path)
  kernel = have['map_head/out/kernel']
  np.testing.assert_array_equal(
    kernel, head['MAPHead_0/MultiHeadDotProductAttention_0/out/kernel'].reshape(WIDTH, WIDTH)
  )
  head.pop('MAPHead_0/probe')
  with pytest.raises(errors.UserError, match='Missing: MAPHead_0/probe'):
    checkpoint.open_checkpoint(write(tmp_path / 'b.npz', tower | head))


@pytest.mark.parametrize('old', [False, True], ids=['params', 'optimizer'])
def test_scenic(old, tmp_path):
  named = {name.replace('head/', 'output_projection/'): array for name, array in linen().items()}
  tree, path = nested(named), tmp_path / 'checkpoint_7'
  moments = {'opt_state': {'0': {'mu': tree}}, 'global_step': 7}
  whole = {'optimizer': {'target': tree, 'state': {'mu': tree}}} if old else {'params': tree}
  path.write_bytes(serialization.msgpack_serialize(whole | moments))
  assert_same(path)
  assert_same(tmp_path)


def changed(change):
  named = scanned(linen()) if change.startswith('scanned') else linen()
  block = 'Transformer/encoderblock_0/'
  match change:
    case 'scanned, three layers of one tensor':
      name = 'Transformer/encoderblock/MlpBlock_0/Dense_0/bias'
      named[name] = np.concatenate([named[name], named[name][:1]])
    case 'no first layer':
      named = {n: x for n, x in named.items() if not n.startswith(block)}
    case 'no bias in a layer':
      del named[block.replace('0', '1') + 'MlpBlock_0/Dense_1/bias']
    case 'two spellings':
      named[block + 'LayerNorm_2/scale'] = named[block + 'LayerNorm_1/scale']
    case 'heads in the wrong place':
      name = block + 'MultiHeadDotProductAttention_0/out/kernel'
      named[name] = named[name].transpose(2, 0, 1)
    case 'no square grid':
      named[POSITIONS] = named[POSITIONS][:, :-2]
    case 'a patch kernel of PyTorch':
      named['embedding/kernel'] = named['embedding/kernel'].transpose(3, 2, 0, 1)
  return named


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ('scanned, three layers of one tensor', r'encoderblock/MlpBlock_0/Dense_0/bias .* 2 layers'),
    ('no first layer', 'no ViT of a known family'),
    ('no bias in a layer', 'Missing: Transformer/encoderblock_1/MlpBlock_0/Dense_1/bias'),
    ('two spellings', r'several encoders: .*vision_transformer.*big_vision'),
    ('heads in the wrong place', r'encoderblock_0/.*/out/kernel \[24, 3, 8\] does not fit'),
    ('no square grid', r'pos_embedding \[1, 8, 24\] has positions of no square grid'),
    ('a patch kernel of PyTorch', r'embedding/kernel \[24, 3, 4, 4\]: only square patches'),
  ],
)
def test_other_files_are_refused(change, message, tmp_path):
  path = write(tmp_path / 'a.npz', changed(change))
  with pytest.raises(errors.UserError, match=message):
    checkpoint.open_checkpoint(path)
