"""What a name in a config is taken for, and what a backbone says of itself."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from losa_scenic import convert
from losa_scenic.common_lib import errors
from losa_scenic.weights_lib import backbones, checkpoint

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'backbones'
DEIT = GOLDEN / 'timm_deit'
STATED = {'heads': 2, 'mean': (0.5,) * 3, 'std': (0.5,) * 3}  # What bare files do not say.


@pytest.mark.parametrize('name', ['facebook/dinov2-base', 'runs/vit/none'])
def test_a_name_of_a_hub_must_be_downloaded(name):
  message = rf"Unknown backbone '{name}'.*no file or folder {name} here.*must be downloaded"
  with pytest.raises(errors.UserError, match=message):
    backbones.find(name)


@pytest.mark.parametrize('name', ['vit.msgpack', 'vit.npz', 'a/vit.pth'])
def test_the_name_of_a_file_that_is_not_there(name):
  with pytest.raises(errors.UserError, match=name) as error:
    backbones.find(name)
  assert 'Unknown backbone' not in str(error.value)


@pytest.mark.parametrize('content', ['{"mean": [0.5]}', '[1]', 'no JSON'])
def test_a_json_beside_a_public_file_is_not_taken_for_a_description(content, tmp_path):
  shutil.copy(DEIT / 'model.safetensors', tmp_path / 'foo.safetensors')
  (tmp_path / 'foo.json').write_text(content)
  found = backbones.find(str(tmp_path / 'foo.safetensors'), STATED)
  assert isinstance(found.weights, checkpoint.Checkpoint) and found.spec.width == 24


def test_a_renamed_folder_is_the_same_backbone(tmp_path):
  shutil.copytree(DEIT, tmp_path / 'renamed')
  one, other = backbones.find(str(DEIT)), backbones.find(str(tmp_path / 'renamed'))
  assert one.spec.name != other.spec.name and one.identity() == other.identity()
  changed = backbones.find(str(DEIT), {'pool': 'gap'})
  assert changed.identity() != one.identity()


def test_facts_of_a_checkpoint_and_of_what_it_was_converted_to(tmp_path):
  (tmp_path / 'bare').mkdir()
  shutil.copy(DEIT / 'model.safetensors', tmp_path / 'bare')
  public = backbones.find(str(tmp_path / 'bare'), STATED | {'pool': 'gap'})
  assert public.family == 'timm'
  assert (public.facts['width'], public.facts['heads']) == ('shapes', 'given')
  assert (public.facts['norm_eps'], public.facts['pool']) == ('convention', 'given')
  stated = ['--set=heads=2', '--set=mean=0.5,0.5,0.5', '--set=std=0.5,0.5,0.5']
  convert.main([f'--from={tmp_path / "bare"}', f'--to={tmp_path / "ours"}', *stated])
  converted = backbones.find(str(tmp_path / 'ours'), {'mean': (0.1, 0.2, 0.3)})
  assert converted.family == 'timm' and converted.facts['norm_eps'] == 'convention'
  assert converted.facts['mean'] == 'given'
  assert backbones.find(backbones.packaged()[0]).facts == {}
  assert backbones.find('test/8').facts == {}


def test_a_card_that_is_damaged_has_no_facts(tmp_path):
  convert.main([f'--from={DEIT}', f'--to={tmp_path}'])
  path = tmp_path / backbones.IN_FOLDER
  path.write_text(json.dumps(json.loads(path.read_text()) | {'card': {'facts': 7}}))
  assert backbones.find(str(tmp_path)).facts == {}


def test_released_weights_keep_everything_but_their_values():
  found = backbones.find(str(DEIT), {'image_size': 16})
  assert found.weights is not None
  assert isinstance(found.weights.read('norm/scale'), np.ndarray)
  released = found.released()
  assert released.weights is not None
  assert released.identity() == found.identity() and released.facts == found.facts
  assert released.weights.shapes == found.weights.shapes
  with pytest.raises(ValueError, match='were released'):
    released.weights.read('norm/scale')
  preset = backbones.find('test/8')
  assert preset.released() is preset
