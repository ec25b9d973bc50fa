"""Random small checkpoints: what is written is what is read, and what is damaged is refused.

Some damage looks like another sound model, and nothing in a file could tell: a square matrix
transposed, two tensors of one shape exchanged, a patch kernel of another number of pixels, a last
layer that is missing altogether, and in a model of one layer a bias of query, key and value.
"""

import math
import pathlib
import shutil

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference.small_checkpoints import WRITERS, as_timm, parameters, write
from safetensors import numpy as safetensors_numpy

from losa_scenic.common_lib import errors
from losa_scenic.weights_lib import checkpoint

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'backbones'
# The same examples each time: a test of a commit does not depend on luck.
repeated = settings(derandomize=True, deadline=None, max_examples=20, database=None)


@st.composite
def geometries(draw):
  heads = draw(st.integers(1, 3))
  width = heads * draw(st.sampled_from([4, 8]))
  return {
    'heads': heads,
    'width': width,
    'depth': draw(st.integers(1, 3)),
    'mlp': draw(st.integers(5, 40).filter(lambda mlp: mlp not in (width, 2 * width))),
    'patch': draw(st.sampled_from([2, 4, 5])),
    'side': draw(st.integers(2, 4)),
    'seed': draw(st.integers(0, 99)),
  }


# Fewer where most of the time would go into shapes of new models.
FEW = st.sampled_from(
  [
    {'heads': 2, 'width': 8, 'depth': 2, 'mlp': 13, 'patch': 4, 'side': 3, 'seed': 0},
    {'heads': 3, 'width': 24, 'depth': 2, 'mlp': 7, 'patch': 5, 'side': 2, 'seed': 1},
  ]
)
kinds = st.sampled_from(sorted(WRITERS))


def read(path, kind, g):
  """Opens a file and reads all of it: the spec and {path: array}."""
  fields = {'heads': g['heads']} if kind != 'npz' else {}
  fields |= {'activation': 'quick_gelu'} if kind == 'clip' else {}
  fields |= (
    {'activation': 'gelu_erf', 'mean': (0.5,) * 3, 'std': (0.5,) * 3} if kind == 'timm' else {}
  )
  opened = checkpoint.open_checkpoint(path, fields)
  return opened.spec, {leaf: opened.read(leaf) for leaf in opened.shapes}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """One for all examples: a file is written and read before the next."""
  return tmp_path_factory.mktemp('files')


@repeated
@given(kinds, geometries(), st.sampled_from(['float32', 'float16', 'bfloat16']), st.randoms())
def test_what_is_written_is_read(folder, kind, g, dtype, random):
  p = parameters(g, clip=kind == 'clip')
  named = [(n, x.astype(dtype)) for n, x in WRITERS[kind](p, g).items()]
  random.shuffle(named)
  spec, have = read(write(folder, kind, dict(named)), kind, g)
  assert set(have) == set(p)
  for path, value in have.items():
    assert value.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(value.ravel(), p[path].astype(dtype).ravel(), path)
    assert value.shape == p[path].shape or path == 'patch/proj/kernel'
  assert all(getattr(spec, f) == g[f] for f in ('width', 'depth', 'mlp', 'heads', 'patch'))
  assert spec.image_size == g['patch'] * g['side'] and spec.pool == 'cls'
  assert spec.patch_bias == (kind != 'clip') and spec.pre_norm == (kind == 'clip')


def of_encoder(named):
  """Names of tensors that the model uses."""
  return [n for n in named if not n.startswith(('text_model', 'logit_scale', 'head/'))]


def dropped(named, name, data):
  named.pop(name)


def misspelt(named, name, data):
  """Twice, once under a name with a letter too many."""
  at = data.draw(st.integers(0, len(name)))
  named[name[:at] + 'x' + name[at:]] = named[name]


def transposed(named, name, data):
  x = named[name]
  assume(sum(size > 1 for size in x.shape) > 1 and x.shape[-1] != math.prod(x.shape[:-1]))
  assume('patch_embed' not in name and 'embedding/kernel' not in name)
  named[name] = np.ascontiguousarray(np.moveaxis(x, -1, x.ndim > 2 and x.shape[0] == 1))
  assume(named[name].shape != x.shape)


def of_another_size(named, name, data):
  x = named[name]
  is_patch = 'patch_embed' in name or 'embedding/kernel' in name
  channels = len(x.shape) - 1 if name.startswith('embedding') else 0
  axis = channels if is_patch else data.draw(st.integers(0, x.ndim - 1))
  named[name] = np.concatenate([x, np.take(x, [0], axis)], axis)


def not_finite(named, name, data):
  x = named[name].copy()
  x.flat[data.draw(st.integers(0, x.size - 1))] = data.draw(st.sampled_from([np.nan, np.inf]))
  named[name] = x


def quantised(named, name, data):
  named[name] = named[name].astype(np.int8)


@pytest.mark.parametrize(
  'damage', [dropped, misspelt, transposed, of_another_size, not_finite, quantised]
)
def test_a_damaged_tensor_is_named(damage, folder):
  seen = set()

  @repeated
  @given(kinds, FEW, st.data())
  def refuses(kind, g, data):
    p = parameters(g, clip=kind == 'clip')
    named = {n: x.astype('f4') for n, x in WRITERS[kind](p, g).items()}
    name = data.draw(st.sampled_from(of_encoder(named)))
    sound = set(named)
    damage(named, name, data)
    with pytest.raises(errors.UserError) as error:
      read(write(folder, kind, named), kind, g)
    # A tensor too many is named itself; of a missing scale the message can name the bias.
    wrong = (set(named) - sound) or {name, name.replace('scale', 'bias')}
    wrong = {n.removeprefix('vision_model.') for n in wrong}
    assert any(n in str(error.value) for n in wrong), (name, str(error.value))
    seen.add((kind, name))

  refuses()
  assert len(seen) > 8 and len({kind for kind, _ in seen}) == 3


def named_like(*names):
  return {name: np.ones((2, 2), 'f4') for name in names}


# What people have instead of a ViT.
OTHERS = {
  'a ResNet': named_like('conv1.weight', 'bn1.weight', 'layer1.0.conv1.weight', 'fc.weight'),
  'a ConvNeXt': named_like('stem.0.weight', 'stages.0.blocks.0.conv_dw.weight', 'head.fc.weight'),
  'a Swin': named_like(
    *(
      'patch_embed.proj.weight',
      'layers.0.blocks.0.norm1.weight',
      'layers.0.blocks.0.attn.qkv.bias',
    )
  ),
  'a text model': named_like(
    *('bert.embeddings.word_embeddings.weight', 'bert.encoder.layer.0.attention.self.query.weight')
  ),
  'an adapter': named_like('base_model.model.encoder.layer.0.attention.query.lora_A.weight'),
  'optimizer states': named_like('state.0.exp_avg', 'state.0.exp_avg_sq'),
}


@pytest.mark.parametrize('what', OTHERS)
def test_a_file_that_is_no_vit(what, folder):
  path = write(folder, 'timm', OTHERS[what])
  with pytest.raises(errors.UserError, match='no ViT of a known family') as error:
    checkpoint.open_checkpoint(path)
  assert next(iter(OTHERS[what])) in str(error.value)


def test_the_text_tower_of_an_image_text_model(folder):
  names = ('text_model.encoder.layers.0.layer_norm1.weight', 'text_model.embeddings.token.weight')
  path = write(folder, 'timm', named_like(*names))
  message = (
    r'layer_norm1\.weight is as in .*CLIP.* no patch embedding text_model\.embeddings\.patch'
  )
  with pytest.raises(errors.UserError, match=message):
    checkpoint.open_checkpoint(path)


def test_an_empty_file(folder):
  with pytest.raises(errors.UserError, match='holds no weights'):
    checkpoint.open_checkpoint(write(folder, 'timm', {}))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'blocks.0.attn.relative.weight': (2, 2)}, r'attn\.relative\.weight \[2, 2\]'),  # CoAtNet ...
    ({'blocks_token_only.0.norm1.weight': (8,)}, 'blocks_token_only'),  # CaiT
    ({'patch_embed.proj.weight': (8, 3, 2, 4, 4)}, 'is of clips'),  # VideoMAE
    ({'patch_embed.proj.weight': (8, 1, 4, 4)}, 'does not fit patch/proj/kernel'),  # Sound, radar
    ({'patch_embed.proj.weight': (8, 3, 4, 2)}, 'only square patches'),
    ({'patch_embed.conv.weight': (8, 3, 4, 4)}, r'patch_embed\.conv\.weight'),  # A stem before it
    ({'blocks.2.mlp.fc1.weight': (13, 8)}, r'blocks\.2\.norm1\.weight'),
    ({'blocks.7.norm1.weight': (8,)}, r'Layers are missing: the file has \[0, 1, 7\]'),
  ],
)
def test_other_transformers(change, message, folder):
  g = {'heads': 2, 'width': 8, 'depth': 2, 'mlp': 13, 'patch': 4, 'side': 3, 'seed': 0}
  named = {n: x.astype('f4') for n, x in as_timm(parameters(g, clip=False), g).items()}
  named |= {name: np.ones(shape, 'f4') for name, shape in change.items()}
  with pytest.raises(errors.UserError, match=message):
    read(write(folder, 'timm', named), 'timm', g)


def changed(folder, case, change):
  """A copy of a golden checkpoint whose tensors are `change(tensors)`."""
  shutil.copytree(GOLDEN / case, folder / case)
  path = next((folder / case).glob('*.safetensors'))
  safetensors_numpy.save_file(change(safetensors_numpy.load_file(path)), path)
  return folder / case


@pytest.mark.parametrize(
  ('case', 'name'),
  [
    ('open_clip', 'visual.transformer.resblocks.0.attn.ln_q.weight'),
    ('open_clip', 'visual.transformer.resblocks.1.ls_3.gamma'),
    ('open_clip', 'visual.ln_final.weight'),
    ('open_clip_siglip', 'visual.trunk.text.0.weight'),
    ('hf_clip', 'vision_model.text_projection.weight'),
    ('hf_internvl', 'encoder.layer.0.mlp1.0.weight'),
  ],
)
def test_no_pattern_of_another_tower_matches_within_the_encoder(case, name, tmp_path):
  folder = changed(tmp_path, case, lambda tensors: tensors | {name: np.ones(24, 'f4')})
  with pytest.raises(errors.UserError, match=rf'1 tensors have no place.*{name}'):
    checkpoint.open_checkpoint(folder)


def of_visual(tensors):
  """The vision tower of open_clip by itself, without a prefix."""
  start = 'visual.'
  return {n.removeprefix(start): x for n, x in tensors.items() if n.startswith(start)}


def test_a_vision_tower_by_itself_has_no_text_tower_to_leave_out(tmp_path):
  folder = changed(tmp_path, 'open_clip', lambda t: of_visual(t) | {'logit_scale': np.ones(())})
  left_out = set(checkpoint.open_checkpoint(folder).layout.left_out)
  assert left_out == {'logit_scale', *(['proj'] if 'proj' in left_out else [])}
  name = 'transformer.resblocks.0.attn.ln_q.weight'
  shutil.rmtree(folder)
  folder = changed(tmp_path, 'open_clip', lambda t: of_visual(t) | {name: np.ones(24, 'f4')})
  with pytest.raises(errors.UserError, match=rf'1 tensors have no place.*{name}'):
    checkpoint.open_checkpoint(folder)


@pytest.mark.parametrize(
  ('prefixes', 'chosen'),
  [
    (('teacher.', 'student.'), 'teacher.'),
    (('teacher.', 'student.'), 'student.'),
    (('', 'ema.'), ''),
    (('', 'ema.'), 'ema.'),
  ],
)
def test_one_of_several_encoders(prefixes, chosen, tmp_path):
  def several(tensors):
    return {start + name: x + i for i, start in enumerate(prefixes) for name, x in tensors.items()}

  folder = changed(tmp_path, 'timm_deit', several)
  with pytest.raises(errors.UserError, match=r'holds several encoders.*--prefix='):
    checkpoint.open_checkpoint(folder)
  opened = checkpoint.open_checkpoint(folder, prefix=chosen)
  plain = checkpoint.open_checkpoint(GOLDEN / 'timm_deit')
  want = plain.read('norm/scale') + prefixes.index(chosen)
  np.testing.assert_array_equal(opened.read('norm/scale'), want)
  assert len(opened.layout.left_out) == len(plain.source.tensors) + len(plain.layout.left_out)
  # What is of no encoder is still an error.
  folder = changed(tmp_path / 'b', 'timm_deit', lambda t: several(t) | {'other.x': np.ones(2)})
  if '' not in prefixes:
    with pytest.raises(errors.UserError, match=r'1 tensors have no place.*other\.x'):
      checkpoint.open_checkpoint(folder, prefix=chosen)


@pytest.mark.parametrize('case', ['hf_aimv2', 'remote_aimv2'])
def test_a_head_that_pools_by_attention_is_not_dropped(case, tmp_path):
  more = {
    'head.cls_token': np.ones((1, 1, 24), 'f4'),
    'head.k_proj.weight': np.ones((24, 24), 'f4'),
  }
  folder = changed(tmp_path, case, lambda tensors: tensors | more)
  with pytest.raises(errors.UserError, match=r'head\.cls_token.*its head pools by attention'):
    checkpoint.open_checkpoint(folder)


def test_a_beit_for_masked_images_has_its_norm_beside_the_encoder(tmp_path):
  def masked_images(tensors):
    of_head = {'layernorm.weight', 'layernorm.bias', 'lm_head.weight', 'lm_head.bias'}
    named = {f'beit.{n}': x for n, x in tensors.items() if not n.startswith('pooler')}
    return named | {n: np.full(24, 1.5, 'f4') for n in of_head}

  opened = checkpoint.open_checkpoint(changed(tmp_path, 'hf_beit', masked_images))
  assert opened.spec.final_norm == 'tokens'
  np.testing.assert_array_equal(opened.read('norm/scale'), np.full(24, 1.5))
  assert set(opened.layout.left_out) == {'lm_head.weight', 'lm_head.bias'}
