"""What the files beside a checkpoint say; what they do not say is never guessed wrongly."""

import ast
import json
import pathlib
import shutil

import pytest
from safetensors import numpy as safetensors_numpy

from losa_scenic.common_lib import errors
from losa_scenic.weights_lib import checkpoint, timm_architectures

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
BACKBONES = GOLDEN / 'backbones'
# What timm's own models of those names have; see make_timm_architectures.py.
ARCHITECTURES = json.loads((GOLDEN / 'timm_architectures.json').read_text())['architectures']


# For tests of timm itself: whoever loads them says how many heads they have.
PUBLISHED = [name for name in ARCHITECTURES if not name.startswith('test_vit')]
UNKNOWN = ('_pe_', '_rpn_', '18x2', '_xp_', 'pwee', '_rope_', 'naflex', 'sapiens2')


@pytest.mark.parametrize('name', PUBLISHED)
def test_what_is_known_of_timms_architectures_is_what_they_have(name):
  truth = ARCHITECTURES[name]
  try:
    known = timm_architectures.fields_of(name)
  except errors.UserError:
    # Blocks that the encoder has not.
    assert any(part in name for part in UNKNOWN)
    return
  geometry = (truth[field] for field in ('width', 'depth', 'mlp', 'gated'))
  known.setdefault('heads', timm_architectures.heads_of(*geometry))
  for field in ('heads', 'activation', 'norm_eps', 'rope', 'block_norm', 'rope_theta'):
    if field in truth:
      assert known[field] == truth[field], field
  if truth.get('rope_grid'):
    assert (known['rope_grid'],) * 2 == ast.literal_eval(truth['rope_grid'])


@pytest.mark.parametrize('name', PUBLISHED)
def test_a_bare_file_has_the_heads_of_its_shape_or_none(name):
  truth = ARCHITECTURES[name]
  have = timm_architectures.heads_of(
    *(truth[field] for field in ('width', 'depth', 'mlp', 'gated'))
  )
  # The one that has others than models of its shape; no weights of it are public.
  assert have in (None, truth['heads']) or name == 'vit_base_patch16_gap_224'


def copied(case, tmp_path, **changes):
  """A golden checkpoint with another config.json."""
  folder = tmp_path / case
  shutil.copytree(BACKBONES / case, folder)
  for file, fields in changes.items():
    path = folder / f'{file}.json'
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | fields))
  return folder


@pytest.mark.parametrize(
  ('case', 'fields', 'message'),
  [
    ('hf_vit', {'hidden_size': 32}, r'width=32 \(config.json\) contradicts the shapes'),
    ('hf_vit', {'num_hidden_layers': 12}, r'depth=12 \(config.json\) contradicts the shapes'),
    ('hf_vit', {'intermediate_size': 999}, r'mlp=999 \(config.json\) contradicts the shapes'),
    ('hf_vit', {'patch_size': 16}, r'patch=16 \(config.json\) contradicts the shapes'),
    ('hf_vit', {'model_type': 'siglip_vision_model'}, "is of a 'siglip_vision_model'"),
    ('timm_deit', {'architecture': None, 'model_type': 'vit'}, "names are those of 'timm'"),
    ('hf_vit', {'hidden_act': 'mish'}, "Unknown activation of the checkpoint 'mish'"),
    ('hf_vit', {'image_size': [12, 16]}, 'Only square inputs are known'),
    ('hf_vit', {'num_attention_heads': 'two'}, 'config.json beside the weights is not understood'),
    ('timm_deit', {'global_pool': 'avgmax'}, "Unknown global_pool of the checkpoint 'avgmax'"),
    ('timm_deit', {'architecture': 'vit_pe_core_base_patch16_224'}, 'blocks that this encoder'),
    ('hf_dinov2_registers', {'num_register_tokens': 4}, 'registers=4 .* contradicts the shapes'),
  ],
)
def test_a_config_that_cannot_be_the_models_is_an_error(case, fields, message, tmp_path):
  with pytest.raises(errors.UserError, match=message):
    checkpoint.open_checkpoint(copied(case, tmp_path, config=fields))


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'rescale_factor': 1.0}, 'multiplies pixels by 1.0'),
    ({'do_rescale': False}, 'multiplies pixels by 1.0'),
    ({'resample': 99}, "Unknown resample of the checkpoint '99'"),
    ({'image_std': [0, 0, 0]}, 'std above 0'),
  ],
)
def test_preprocessing_that_is_not_known_is_an_error(fields, message, tmp_path):
  with pytest.raises(errors.UserError, match=message):
    checkpoint.open_checkpoint(copied('hf_vit', tmp_path, preprocessor_config=fields))


def test_images_that_are_not_normalised(tmp_path):
  folder = copied('hf_vit', tmp_path, preprocessor_config={'do_normalize': False})
  spec = checkpoint.open_checkpoint(folder).spec
  assert spec.mean == (0, 0, 0) and spec.std == (1, 1, 1)


def test_null_says_nothing(tmp_path):
  folder = copied('hf_vit', tmp_path, config={'layer_norm_eps': None, 'image_size': None})
  original = checkpoint.open_checkpoint(BACKBONES / 'hf_vit')
  assert checkpoint.open_checkpoint(folder).spec == original.spec


def test_what_the_files_say_is_not_overruled_but_for_pooling_and_preprocessing():
  with pytest.raises(errors.UserError, match=r'heads=3 contradicts config.json'):
    checkpoint.open_checkpoint(BACKBONES / 'hf_vit', {'heads': 3})
  given = {'mean': [0.1, 0.2, 0.3], 'pool': 'gap'}
  spec = checkpoint.open_checkpoint(BACKBONES / 'hf_vit', given).spec
  assert spec.mean == (0.1, 0.2, 0.3) and spec.pool == 'gap'


def test_normalisation_that_nothing_tells_must_be_given(tmp_path):
  folder = copied('timm_vit_augreg', tmp_path)
  (folder / 'config.json').unlink()
  given = {'heads': 2}
  with pytest.raises(errors.UserError, match='does not say mean, std'):
    checkpoint.open_checkpoint(folder, given)
  given |= {'mean': (0.5,) * 3, 'std': (0.5,) * 3}
  assert checkpoint.open_checkpoint(folder, given).described.origins['mean'] == 'given'


def test_timms_attention_pooling_without_the_leading_tokens_is_refused(tmp_path):
  folder = copied('timm_siglip', tmp_path)
  weights = safetensors_numpy.load_file(folder / 'model.safetensors')
  width = weights['norm.weight'].shape[0]
  weights['reg_token'] = weights['attn_pool.latent'].reshape(1, 1, width)
  safetensors_numpy.save_file(weights, folder / 'model.safetensors')
  with pytest.raises(errors.UserError, match='leaves out the 1 leading tokens'):
    checkpoint.open_checkpoint(folder)
