"""Checkpoints of clips: transformers' ViViT is found out, read, and computes what it does there."""

import json
import pathlib

import numpy as np
import pytest
from reference.backbone import Backbone
from safetensors import numpy as safetensors_numpy

from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib.spec import BackboneSpec
from losa_scenic.weights_lib import backbones, export

GOLDEN = dict(np.load(pathlib.Path(__file__).parents[1] / 'golden' / 'vivit.npz'))
# As VivitImageProcessor writes them; the model was trained without the second normalisation.
PIXELS = {'offset': True, 'rescale_factor': 1 / 127.5, 'resample': 2}
TWICE = {'do_normalize': True, 'image_mean': [0.5] * 3, 'image_std': [0.5] * 3}
TINY = BackboneSpec('', width=24, depth=2, mlp=40, heads=2, patch=4, image_size=12, frames=8)


@pytest.fixture
def hub(tmp_path):
  """`fn(case, changes of config.json, preprocessor_config.json)`: a folder of the hub."""

  def write(case='vivit', changes=None, pixels=None):
    start = f'{case}/param/'
    tensors = {k.removeprefix(start): x for k, x in GOLDEN.items() if k.startswith(start)}
    folder = tmp_path / case
    folder.mkdir()
    safetensors_numpy.save_file(tensors, folder / 'model.safetensors')
    config = json.loads(str(GOLDEN[f'{case}/config'])) | (changes or {})
    (folder / 'config.json').write_text(json.dumps(config))
    if pixels:
      (folder / 'preprocessor_config.json').write_text(json.dumps(pixels))
    return str(folder)

  return write


def flat(backbone):
  params = trees.flatten(backbones.load(backbone, stack=False))
  return {path: np.asarray(leaf) for path, leaf in params.items()}


@pytest.mark.parametrize(
  ('case', 'fields'),
  [
    ('vivit', {'tubelet': 2, 'heads': 2}),
    ('vivit_bare', {'tubelet': 4, 'heads': 3, 'qkv_bias': 'none'}),
  ],
)
def test_a_vivit_is_a_clip_backbone_with_its_features(case, fields, hub):
  found = backbones.find(hub(case))
  want = TINY.to_json() | fields | {'name': case, 'position_resize': found.spec.position_resize}
  assert found.spec.to_json() == want
  assert found.facts['frames'] == 'config.json' and found.facts['image_size'] == 'shapes'
  features = Backbone(flat(found), found.spec).features(GOLDEN['clips'])
  np.testing.assert_allclose(features, GOLDEN[f'{case}/features'], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ('pixels', 'mean', 'std'),
  [({'do_normalize': False}, 0.5, 0.5), ({}, 0.75, 0.25), (TWICE, 0.75, 0.25)],
  ids=['once', 'default', 'twice'],
)
def test_pixels_are_centred_as_the_files_say(pixels, mean, std, hub):
  spec = backbones.find(hub(pixels=PIXELS | pixels)).spec
  assert (spec.mean, spec.std, spec.interpolation) == ((mean,) * 3, (std,) * 3, 'bilinear')


def test_it_is_used_at_another_size_and_stored_as_a_clip_backbone(hub, tmp_path):
  folder = hub()
  small, large = backbones.find(folder), backbones.find(folder, {'image_size': 20})
  assert large.spec.grid == (4, 5, 5)
  have, want = flat(large), flat(small)
  assert have.pop('pos_embedding').shape == (1, 101, 24)
  assert want.pop('pos_embedding').shape == (1, 37, 24)
  for path, leaf in want.items():
    np.testing.assert_array_equal(have[path], leaf)
  stored = backbones.save(tmp_path / 'own.json', large.spec, backbones.load(large))
  assert stored.spec.input_shape == (8, 20, 20, 3)
  with pytest.raises(errors.UserError, match='frames=8'):
    export.to_family(small.spec, flat(small), 'transformers')


@pytest.mark.parametrize(
  ('config', 'changes', 'message'),
  [
    ({'num_frames': 10}, {}, 'has positions of no square grid'),
    ({'tubelet_size': [4, 4, 4]}, {}, r'tubelet=4 \(config.json\) contradicts the shapes .* 2'),
    ({'tubelet_size': [2, 4, 8]}, {}, 'Only square inputs are known'),
    ({'model_type': 'videomae'}, {}, "config.json beside the weights is of a 'videomae'"),
    ({}, {'frames': 16}, 'is for clips of 8 frames in tubelets of 2, not 16 frames'),
    ({}, {'factorised': True}, 'only weights of images can become those of other clips'),
    ({}, {'inflation': 'average'}, "'vivit' is for clips already"),
  ],
)
def test_what_contradicts_the_weights_is_refused(config, changes, message, hub):
  folder = hub(changes=config)
  with pytest.raises(errors.UserError, match=message):
    backbones.find(folder, changes)


def test_what_is_not_known_is_not_guessed(hub):
  folder = pathlib.Path(hub())
  (folder / 'config.json').unlink()
  with pytest.raises(errors.UserError, match=r'do not say of how many frames: put the config'):
    backbones.find(str(folder))
  with pytest.raises(errors.UserError, match=r'tensors have no place in a ViT of family .*q_bias'):
    backbones.find(hub('videomae'))
  wrong = {**PIXELS, 'rescale_factor': 1 / 255}
  with pytest.raises(errors.UserError, match=r'multiplies pixels by 0.0039.*, not by 1 / 127.5'):
    backbones.find(hub('vivit_bare', pixels=wrong))
