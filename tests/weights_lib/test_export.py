"""Exported files: an original's own bytes again, and files that load as the same backbone.

That timm and transformers load them is checked by hand: tests/golden/check_export.py.
"""

import collections
import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from losa_scenic.adapt_lib import fold, lora
from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.spec import BackboneSpec
from losa_scenic.model_lib.vit import ViT
from losa_scenic.weights_lib import checkpoint, export
from losa_scenic.weights_lib.spelling import Original

CASES = pathlib.Path(__file__).parents[1] / 'golden' / 'backbones'
INDEX = json.loads((CASES / 'INDEX.json').read_text())
# Key bias that a mask takes away: it is no part of the encoder, and is written as 0.
MASKED = {'orig_dinov3': 'attn.qkv.bias'}
SIZE = {'width': 24, 'depth': 2, 'heads': 2, 'mlp': 48, 'patch': 4, 'image_size': 12}


@functools.cache
def opened(case):
  entry = INDEX[case]
  files = [name for name in entry['files'] if not name.endswith('.json')]
  path = CASES / case / files[0] if len(files) == 1 else CASES / case
  return checkpoint.open_checkpoint(path, {field: entry[field] for field in entry['needs']})


def params_of(case):
  return {path: opened(case).read(path) for path in opened(case).shapes}


def random_backbone(seed=0, **fields):
  """A spec and parameters far from every initial value."""
  spec, rng = BackboneSpec(name='mine', **{**SIZE, **fields}), np.random.default_rng(seed)
  shapes = checkpoint.param_shapes(spec)
  return spec, {
    path: rng.normal(path.endswith('scale'), 0.3, shape).astype(np.float32)
    for path, shape in shapes.items()
  }


def images_for(spec):
  return np.random.default_rng(1).normal(size=(2, *spec.input_shape)).astype(np.float32)


def features(spec, params):
  tree = trees.unflatten({path: np.asarray(leaf, np.float32) for path, leaf in params.items()})
  return np.asarray(jax.jit(ViT(spec, {}).apply)({'params': tree}, images_for(spec)))


def reloaded(folder):
  found = checkpoint.open_checkpoint(folder)
  return found.spec, {path: found.read(path) for path in found.shapes}


def differing_fields(one, other):
  """Fields of two specs that differ; how positions are resampled belongs to the format."""
  fields = {f.name for f in dataclasses.fields(one)} - {'name', 'position_resize'}
  return {name for name in fields if getattr(one, name) != getattr(other, name)}


@pytest.mark.parametrize('case', sorted(INDEX))
def test_an_original_is_written_with_its_own_names_shapes_and_values(case):
  found = opened(case)
  like = Original.from_json(json.loads(json.dumps(Original.of(found).to_json())))
  assert like == Original.of(found)
  tensors = export.to_family(found.spec, params_of(case), 'original', like=like)
  assert set(tensors) == set(found.source.tensors) - set(found.layout.left_out)
  for name, value in tensors.items():
    want = found.source.tensors[name].read().astype(np.float32)
    if name.endswith(MASKED.get(case, '?')):
      third = len(want) // 3
      want = np.concatenate([want[:third], np.zeros(third, np.float32), want[2 * third :]])
    np.testing.assert_array_equal(value, want, err_msg=name)


@pytest.mark.parametrize(
  ('case', 'format_', 'names', 'architecture'),
  [
    ('timm_vit_augreg', 'timm', 'blocks.0.attn.qkv.bias', 'vit_base_patch16_224'),
    ('open_clip_quickgelu', 'timm', 'norm_pre.weight', 'vit_base_patch16_clip_224'),
    ('hf_siglip', 'timm', 'attn_pool.kv.weight', 'vit_base_patch16_224'),
    ('orig_dinov2_swiglu', 'timm', 'blocks.0.mlp.fc1.weight ls1', 'vit_giant_patch14_dinov2'),
    ('orig_dinov2', 'timm', 'reg_token', 'vit_base_patch16_224'),
    ('timm_eva_giant_clip', 'timm', 'blocks.1.attn.q_bias', 'eva_giant_patch14_224'),
    ('timm_eva02_base_clip', 'timm', 'attn.q_proj.bias fc1_g', 'eva02_base_patch14_224'),
    ('timm_eva02_tiny', 'timm', 'attn.qkv.weight mlp.fc1.bias', 'eva02_base_patch14_224'),
    ('timm_dinov3_swiglu', 'timm', 'gamma_1 fc1_g.weight', 'vit_small_plus_patch16_dinov3'),
    ('orig_beitv2_pretrained', 'timm', 'attn.relative_position_bias', 'beit_base_patch16_224'),
    ('remote_aimv2', 'timm', 'patch_embed.norm.weight fc1_x', 'aimv2_large_patch14_224'),
    ('orig_deit_distilled', 'timm', 'dist_token', 'deit_base_distilled_patch16_224'),
    ('timm_mae', 'transformers', 'encoder.layer.0.attention.attention.key.bias', 'vit'),
    ('orig_deit_distilled', 'transformers', 'embeddings.distillation_token', 'deit'),
    ('orig_dinov2_swiglu', 'transformers', 'encoder.layer.1.mlp.weights_in.bias', 'dinov2'),
    ('hf_dinov2_registers', 'transformers', 'register_tokens', 'dinov2_with_registers'),
    ('orig_dinov3', 'transformers', 'layer.0.layer_scale1.lambda1', 'dinov3_vit'),
    ('timm_vit_clip', 'transformers', 'vision_model.pre_layrnorm.bias', 'clip_vision_model'),
    ('timm_siglip_tanh', 'transformers', 'head.attention.in_proj_bias', 'siglip_vision_model'),
    ('hf_siglip2_naflex', 'transformers:siglip2_vision_model', '', 'siglip2_vision_model'),
    ('timm_beitv2', 'transformers', 'pooler.layernorm.weight lambda_1', 'beit'),
    ('hf_internvl_6b', 'transformers', 'attention.projection_layer.bias q_norm', 'internvl_vision'),
    ('timm_aimv2', 'transformers', 'embeddings.rms_norm ffn.gate_proj', 'aimv2_vision_model'),
  ],
)  # fmt: skip
def test_what_a_library_loads_is_the_same_backbone(case, format_, names, architecture, tmp_path):
  spec, params = opened(case).spec, params_of(case)
  assert export.write(tmp_path, spec, params, format_) == []
  written = safetensors_numpy.load_file(tmp_path / 'model.safetensors')
  for name in names.split():
    assert any(name in key for key in written), name
  config = json.loads((tmp_path / 'config.json').read_text())
  assert config.get('architecture', config.get('model_type')) == architecture
  found, leaves = reloaded(tmp_path)
  assert differing_fields(found, spec) == set()
  assert set(leaves) == set(params)
  for path, leaf in leaves.items():
    np.testing.assert_array_equal(leaf, params[path].astype(np.float32), err_msg=path)


def test_the_original_decides_between_two_spellings(tmp_path):
  case, spec = 'timm_eva02_tiny', opened('timm_eva02_tiny').spec
  like = Original.of(opened(case))
  names = set(opened(case).source.tensors) - set(opened(case).layout.left_out)
  assert export.write(tmp_path, spec, params_of(case), 'timm', like=like) == []
  assert set(safetensors_numpy.load_file(tmp_path / 'model.safetensors')) == names
  config = json.loads((tmp_path / 'config.json').read_text())
  original = json.loads((CASES / case / 'config.json').read_text())
  assert config['architecture'] == original['architecture'] == 'eva02_tiny_patch14_224'
  assert config['model_args'] == {**original['model_args'], 'num_classes': 0}
  assert config['pretrained_cfg']['crop_pct'] == original['pretrained_cfg']['crop_pct']
  assert config['num_classes'] == config['pretrained_cfg']['num_classes'] == 0
  assert differing_fields(reloaded(tmp_path)[0], spec) == set()


def test_names_of_another_library_are_not_taken_from_the_original():
  like = Original.of(opened('orig_dinov2'))  # Its names are much like timm's.
  assert 'register_tokens' in {name for name, _, _ in like.leaves.values()}
  spec, params = opened('orig_dinov2').spec, params_of('orig_dinov2')
  assert 'reg_token' in export.to_family(spec, params, 'timm', like=like)
  assert 'register_tokens' in export.to_family(spec, params, 'original', like=like)


def test_a_tower_of_two_becomes_a_model_of_its_own(tmp_path):
  spec, like = opened('hf_clip').spec, Original.of(opened('hf_clip'))
  assert 'text_config' not in like.config
  export.write(tmp_path, spec, params_of('hf_clip'), 'transformers', 'bfloat16', like=like)
  config = json.loads((tmp_path / 'config.json').read_text())
  assert config['model_type'] == 'clip_vision_model' and 'vision_config' not in config
  assert config['architectures'] == ['CLIPVisionModel'] and config['dtype'] == 'bfloat16'
  assert differing_fields(reloaded(tmp_path)[0], spec) == set()


def test_another_pooling_than_the_originals_takes_another_architecture(tmp_path):
  found = opened('timm_siglip')
  spec = dataclasses.replace(found.spec, pool='gap')
  params = {path: found.read(path) for path in checkpoint.param_shapes(spec)}
  export.write(tmp_path, spec, params, 'timm', like=Original.of(found))
  config = json.loads((tmp_path / 'config.json').read_text())
  assert (config['architecture'], config['global_pool']) == ('vit_base_patch16_224', 'avg')
  assert reloaded(tmp_path)[0].pool == 'gap'


@pytest.mark.parametrize('like', [False, True])
@pytest.mark.parametrize('case', ['timm_deit', 'timm_beitv2', 'hf_dinov2_registers'])
def test_another_input_size(case, like, tmp_path):
  old = opened(case).spec
  spec = dataclasses.replace(old, image_size=old.patch * 5)
  params = {path: checkpoint.resized(path, v, old, spec) for path, v in params_of(case).items()}
  library = 'transformers' if case.startswith('hf') else 'timm'
  original = Original.of(opened(case)) if like else None
  export.write(tmp_path, spec, params, library, like=original)
  found, leaves = reloaded(tmp_path)
  assert differing_fields(found, spec) == set()
  for path, leaf in leaves.items():
    np.testing.assert_array_equal(leaf, params[path].astype(np.float32), err_msg=path)


def test_positions_without_a_row_are_added_to_their_tokens(tmp_path):
  spec, params = random_backbone(registers=3, layer_scale=True, activation='gelu_erf')
  rows = params['pos_embedding'][:, :4]
  export.write(tmp_path, spec, params, 'transformers')
  found, leaves = reloaded(tmp_path)
  assert differing_fields(found, spec) == set()
  np.testing.assert_array_equal(leaves['cls'], params['cls'])
  np.testing.assert_array_equal(leaves['registers'], params['registers'] + rows[:, 1:])
  np.testing.assert_array_equal(leaves['pos_embedding'][:, :1], rows[:, :1])
  assert not leaves['pos_embedding'][:, 1:4].any()
  np.testing.assert_array_equal(leaves['pos_embedding'][:, 4:], params['pos_embedding'][:, 4:])
  np.testing.assert_allclose(features(found, leaves), features(spec, params), atol=1e-5)


def test_where_an_original_has_rows_for_patches_alone_the_class_token_gets_its_row():
  spec, like = opened('timm_deit3').spec, Original.of(opened('timm_deit3'))
  params = {path: leaf.astype(np.float32) for path, leaf in params_of('timm_deit3').items()}
  params['pos_embedding'] = params['pos_embedding'] + np.float32(0.5)
  tensors = export.to_family(spec, params, 'timm', like=like)
  np.testing.assert_array_equal(tensors['cls_token'], params['cls'] + 0.5)
  assert tensors['pos_embed'].shape == (1, 9, 24)


def test_merged_lora_is_an_ordinary_checkpoint(tmp_path, random_like):
  spec, params = random_backbone(pool='gap')
  model = Adapted(spec, lora.build(spec, rank=2, targets='query,fc2'), num_classes=2)
  tree = random_like(model.param_shapes())
  tree['backbone'] = trees.unflatten(trees.flatten(tree['backbone']) | params)
  adapted = jax.jit(functools.partial(model.apply, method='features'))
  want = adapted({'params': tree}, images_for(spec))
  assert np.abs(want - features(spec, params)).max() > 0.1
  export.write(tmp_path, spec, trees.flatten(fold.fold(model, tree)), 'timm')
  np.testing.assert_allclose(features(*reloaded(tmp_path)), want, atol=1e-5)


def test_a_model_that_has_more_biases_gets_zeros(tmp_path):
  spec, params = random_backbone(qkv_bias='qv', activation='gelu_erf')
  (remark,) = export.write(tmp_path, spec, params, 'transformers:vit')
  assert 'key/bias' in remark
  found, leaves = reloaded(tmp_path)
  assert found.qkv_bias == 'qkv' and not leaves['encoder/layers_1/block/key/bias'].any()
  np.testing.assert_allclose(features(found, leaves), features(spec, params), atol=1e-6)


def test_what_a_format_cannot_say_is_said(tmp_path):
  spec, params = random_backbone(norm_eps=1e-12, pool='gap')
  (remark,) = export.write(tmp_path / 'timm', spec, params, 'timm')
  assert 'norm_eps=1e-06, not 1e-12' in remark
  (remark,) = export.write(tmp_path / 'hf', spec, params, 'transformers')
  assert "ViTModel does not pool by 'gap'" in remark


def test_timms_config_keeps_what_is_known_of_the_preprocessing(tmp_path):
  spec, params = random_backbone(mean=(0.1, 0.2, 0.3))
  given = {'architecture': 'x', 'pretrained_cfg': {'crop_pct': 0.9, 'license': 'mit', 'mean': [1]}}
  export.write(tmp_path, spec, params, 'timm', config=given)
  config = json.loads((tmp_path / 'config.json').read_text())
  assert config['architecture'] == 'vit_base_patch16_224'
  preprocessing = config['pretrained_cfg']
  assert (preprocessing['crop_pct'], preprocessing['license']) == (0.9, 'mit')
  assert preprocessing['mean'] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize('dtype', sorted(export.DTYPES))
def test_dtypes(dtype, tmp_path):
  spec, params = random_backbone()
  tensors = export.to_family(spec, params, 'timm', dtype)
  assert {value.dtype.name for value in tensors.values()} == {dtype}
  kernel = params['encoder/layers_1/block/fc1/kernel']
  np.testing.assert_array_equal(
    tensors['blocks.1.mlp.fc1.weight'], kernel.T.astype(tensors['cls_token'].dtype)
  )
  export.write(tmp_path, spec, params, 'timm', dtype)
  written = safetensors_numpy.load_file(tmp_path / 'model.safetensors')
  assert set(written) == set(tensors)
  for name, value in written.items():
    np.testing.assert_array_equal(value, tensors[name])


class Counted(dict):
  """Counts how often each value is asked for."""

  def __getitem__(self, path):
    self.asked[path] += 1
    return super().__getitem__(path)


def test_every_parameter_is_read_once(tmp_path):
  spec, params = random_backbone()
  counted = Counted(params)
  counted.asked = collections.Counter()
  export.write(tmp_path, spec, counted, 'timm')
  assert set(counted.asked.values()) == {1} and set(counted.asked) == set(params)


def test_big_vision_gets_an_npz(tmp_path):
  spec, params = random_backbone(pool='map', class_token=False)
  (remark,) = export.write(tmp_path, spec, params, 'big_vision')
  assert 'only weights' in remark
  kernel = np.load(tmp_path / 'model.npz')[
    'Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel'
  ]
  assert kernel.shape == (24, 2, 12)
  found, leaves = reloaded(tmp_path / 'model.npz')
  assert differing_fields(found, spec) == set()
  for path, leaf in leaves.items():
    np.testing.assert_array_equal(leaf, params[path], err_msg=path)
  with pytest.raises(errors.UserError, match="no dtype 'bfloat16'"):
    export.write(tmp_path, spec, params, 'big_vision', 'bfloat16')


def test_an_original_with_stacked_layers(tmp_path):
  spec, params = random_backbone()
  tensors, stacked = export.to_family(spec, params, 'big_vision'), {}
  for name, value in tensors.items():
    layers = [tensors.get(name.replace('encoderblock_0', f'encoderblock_{i}')) for i in range(2)]
    if 'encoderblock_0' in name:
      stacked[name.replace('encoderblock_0', 'encoderblock')] = np.stack(layers)
    elif 'encoderblock_1' not in name:
      stacked[name] = value
  np.savez(tmp_path / 'scanned.npz', **stacked)
  found = checkpoint.open_checkpoint(tmp_path / 'scanned.npz')
  like = Original.of(found)
  leaves = {path: found.read(path) for path in found.shapes}
  written = export.to_family(found.spec, leaves, 'original', like=like)
  assert set(written) == set(stacked)
  for name, value in written.items():
    np.testing.assert_array_equal(value, stacked[name], err_msg=name)


def test_open_clips_names():
  spec, params = random_backbone(activation='gelu_erf', pre_norm=True, patch_bias=False)
  tensors = export.to_family(spec, params, 'open_clip')
  assert tensors['visual.transformer.resblocks.1.attn.in_proj_bias'].shape == (72,)
  assert tensors['visual.class_embedding'].shape == (24,)
  assert tensors['visual.conv1.weight'].shape == (24, 3, 4, 4)


@pytest.mark.parametrize(
  ('fields', 'format_', 'message'),
  [
    ({}, 'tim', "Unknown format 'tim'. Did you mean 'timm'"),
    ({}, 'original', 'needs the spelling of the file'),
    (
      {'layer_scale': True},
      'transformers:vit',
      r"ViTModel cannot have layer_scale=True, encoder/layers_0/block/attn_scale, .*Formats that "
      r'can: timm, transformers, transformers:dinov2',
    ),
    ({'mlp_norm': True}, 'transformers', r'encoder/layers_0/block/mlp_norm/scale.*can: timm\.'),
    ({'pre_norm': True}, 'timm', 'patch_bias=True with pre_norm=True'),
    ({'mlp': 50, 'layer_scale': True}, 'transformers:dinov2', 'mlp=50, which is not a multiple'),
    ({'frames': 2}, 'timm', r'frames=2.*Formats that can: none'),
    ({'norm_eps': 1e-5}, 'big_vision', 'norm_eps=1e-05'),
    ({'pool': 'map'}, 'transformers:vit', 'map_head/fc1/kernel'),
  ],
)  # fmt: skip
def test_what_cannot_be_written_is_refused(fields, format_, message, tmp_path):
  spec, params = random_backbone(**fields)
  with pytest.raises(errors.UserError, match=message):
    export.write(tmp_path / 'new', spec, params, format_)
  assert not (tmp_path / 'new').exists()


def test_parameters_must_be_the_specs(tmp_path):
  spec, params = random_backbone()
  less = {path: leaf for path, leaf in params.items() if path != 'norm/bias'}
  with pytest.raises(errors.UserError, match='missing norm/bias'):
    export.to_family(spec, less, 'timm')
  with pytest.raises(errors.UserError, match='too many: head/kernel'):
    export.to_family(spec, {**params, 'head/kernel': np.zeros(3)}, 'timm')
  with pytest.raises(errors.UserError, match=r'cls \[3\] does not fit cls_token'):
    export.to_family(spec, {**params, 'cls': np.zeros(3)}, 'timm')


def test_no_half_of_a_file_is_left(tmp_path):
  spec, params = random_backbone()
  params['norm/bias'] = params['norm/bias'] + np.float32(1e5)
  with pytest.raises(errors.UserError, match='norm/bias is not finite in float16'):
    export.write(tmp_path, spec, params, 'timm', 'float16')
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('format_', ['timm', 'big_vision'])
@pytest.mark.parametrize('name', ['model.safetensors', 'model.npz', 'mae.pth', 'config.json'])
def test_a_folder_with_weights_stays_as_it_is(name, format_, tmp_path):
  (tmp_path / name).write_bytes(b'old')
  with pytest.raises(errors.UserError, match=rf'holds {name} already.*another folder'):
    export.write(tmp_path, *random_backbone(), format_)
  assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {name: b'old'}


def test_what_all_layers_shared_must_still_be_the_same():
  spec, params = opened('hf_beit_shared').spec, params_of('hf_beit_shared')
  like, path = Original.of(opened('hf_beit_shared')), 'encoder/layers_1/block/relative_bias'
  params[path] = params[path] + 1
  with pytest.raises(errors.UserError, match=f'{path} is no longer the same in all'):
    export.to_family(spec, params, 'original', like=like)
  assert export.to_family(spec, params, 'transformers:beit')


def test_a_damaged_record_is_refused():
  for damaged in ({'leaves': {'cls': 3}}, {'family': None, 'leaves': []}, {}):
    with pytest.raises(errors.UserError, match='no record of how a file was spelled'):
      Original.from_json(damaged)
  like = dataclasses.replace(Original.of(opened('timm_deit')), family='timn')
  with pytest.raises(errors.UserError, match="Did you mean 'timm'"):
    export.to_family(opened('timm_deit').spec, params_of('timm_deit'), 'original', like=like)
