"""`python -m losa_scenic.convert`, as a user calls it."""

import errno
import json
import os
import pathlib
import pickle
import re
import shutil
import zipfile

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from losa_scenic import convert
from losa_scenic.weights_lib import backbones, checkpoint, sources

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'backbones'
INDEX = json.loads((GOLDEN / 'INDEX.json').read_text())
SHOWN = ('width', 'depth', 'heads', 'mlp', 'patch', 'image_size', 'pool', 'activation', 'tokens')


def path_of(case):
  weights = [
    f for f in INDEX[case]['files'] if f.endswith(('.npz', '.pth', '.bin', '.safetensors'))
  ]
  return GOLDEN / case / weights[0] if len(weights) == 1 else GOLDEN / case


def facts(text):
  """{first column: second column} of what is printed."""
  rows = (re.split(r'  +', line.strip()) for line in text.splitlines() if line.startswith('  '))
  return {row[0]: row[1] for row in rows if len(row) > 1}


def run(capsys, *args):
  convert.main([str(arg) for arg in args])
  return capsys.readouterr().out


def refusal(capsys, *args):
  with pytest.raises(SystemExit) as e:
    convert.main([str(arg) for arg in args])
  assert e.value.code == 1
  error = capsys.readouterr().err
  assert error.startswith('error: ') and 'Traceback' not in error
  return error


@pytest.mark.parametrize('case', INDEX)
def test_it_says_what_a_checkpoint_is(case, capsys):
  truth = INDEX[case]
  given = [f'--set={field}={truth[field]}' for field in truth['needs']]
  shown = facts(run(capsys, f'--from={path_of(case)}', *given))
  for field in SHOWN:
    assert shown[field] == f'{truth[field]}', field
  for field in ('mean', 'std'):
    if truth.get(field):
      assert shown[field] == ', '.join(f'{value:g}' for value in truth[field])


def test_what_it_writes_is_a_backbone(capsys, tmp_path):
  out = run(capsys, f'--from={GOLDEN / "timm_dinov2"}', f'--to={tmp_path / "mine"}')
  assert f'--config.backbone={tmp_path / "mine"}' in out
  found = backbones.find(str(tmp_path / 'mine'))
  public = checkpoint.open_checkpoint(GOLDEN / 'timm_dinov2')
  assert found.spec.name == 'mine' and found.spec.layer_scale
  found.weights.verify()
  assert found.weights.shapes == public.shapes
  for path in public.shapes:
    np.testing.assert_array_equal(found.weights.read(path), public.read(path).astype(np.float32))
  card = json.loads((tmp_path / 'mine' / 'backbone.json').read_text())['card']
  assert card['source'] == 'timm_dinov2' and card['source_sha256'] == public.sha256
  assert card['left_out'] == ['head.bias', 'head.weight'] and card['facts']['width'] == 'shapes'


def test_a_converted_backbone_goes_back_to_the_names_it_had(capsys, tmp_path):
  original = GOLDEN / 'timm_eva02_base'
  run(capsys, f'--from={original}', f'--to={tmp_path / "ours"}', '--dtype=float16')
  run(capsys, f'--from={tmp_path / "ours"}', f'--to={tmp_path / "back"}', '--format=timm')
  have = safetensors_numpy.load_file(tmp_path / 'back' / 'model.safetensors')
  want = safetensors_numpy.load_file(original / 'model.safetensors')
  assert set(want) - set(have) == {'head.weight', 'head.bias'} and not set(have) - set(want)
  for name, value in have.items():
    np.testing.assert_array_equal(value, want[name].astype(np.float32))


def test_without_a_target_nothing_is_written(capsys, tmp_path):
  folder = tmp_path / 'source'
  shutil.copytree(GOLDEN / 'hf_vit', folder)
  before = sorted(tmp_path.rglob('*'))
  run(capsys, f'--from={folder}')
  assert sorted(tmp_path.rglob('*')) == before


def test_only_looking_does_not_hash_the_file(capsys, monkeypatch):
  monkeypatch.setattr(sources.Source, 'sha256', lambda self: pytest.fail('reads the whole file'))
  assert facts(run(capsys, f'--from={GOLDEN / "hf_vit"}'))['family']


@pytest.mark.parametrize('format_', ['losa_scenic', 'timm', 'original'])
def test_an_original_is_never_written_over(format_, capsys, tmp_path):
  folder = tmp_path / 'source'
  shutil.copytree(GOLDEN / 'hf_vit', folder)
  before = {path.name: path.read_bytes() for path in folder.iterdir()}
  error = refusal(capsys, f'--from={folder}', f'--to={folder}', f'--format={format_}')
  assert f'{folder} holds config.json, ' in error and 'Choose another folder' in error
  assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_other_files_in_the_folder_do_not_matter(capsys, tmp_path):
  (tmp_path / 'README.md').write_text('mine')
  run(capsys, f'--from={GOLDEN / "timm_deit"}', f'--to={tmp_path}', '--format=timm')
  assert {p.name for p in tmp_path.iterdir()} == {'README.md', 'config.json', 'model.safetensors'}


def test_a_file_is_no_folder(capsys, tmp_path):
  (tmp_path / 'there').write_text('mine')
  error = refusal(capsys, f'--from={GOLDEN / "timm_deit"}', f'--to={tmp_path / "there"}')
  assert 'there: Not a directory' in error


def test_weights_do_not_appear_without_their_config(capsys, tmp_path, monkeypatch):
  moved, replace = [], os.replace

  def fails_at_the_weights(source, target):
    moved.append(pathlib.Path(target).name)
    if moved[-1] == 'model.safetensors':
      raise OSError(errno.EIO, 'Input/output error')
    replace(source, target)

  monkeypatch.setattr(os, 'replace', fails_at_the_weights)
  source = GOLDEN / 'hf_vit'
  error = refusal(capsys, f'--from={source}', f'--to={tmp_path}', '--format=transformers')
  assert 'Input/output error' in error and list(tmp_path.iterdir()) == []
  assert moved == ['config.json', 'preprocessor_config.json', 'model.safetensors']


def test_a_backbone_of_ours_may_be_replaced_but_only_by_another_one(capsys, tmp_path):
  folder = tmp_path / 'mine'
  run(capsys, f'--from={GOLDEN / "hf_vit"}', f'--to={folder}')
  run(capsys, f'--from={GOLDEN / "timm_deit"}', f'--to={folder}')
  description = json.loads((folder / 'backbone.json').read_text())
  assert description['card']['source'] == 'timm_deit'
  error = refusal(capsys, f'--from={GOLDEN / "hf_vit"}', f'--to={folder}', '--format=timm')
  assert 'holds backbone.safetensors already' in error
  (folder / 'backbone.json').write_text('{"somebody": "else"}')
  error = refusal(capsys, f'--from={GOLDEN / "hf_vit"}', f'--to={folder}')
  assert 'is not a backbone description' in error
  (folder / 'backbone.json').unlink()
  error = refusal(capsys, f'--from={GOLDEN / "hf_vit"}', f'--to={folder}')
  assert 'holds backbone.safetensors already' in error


def test_what_is_no_vit_is_said(capsys, tmp_path):
  resnet = {'conv1.weight': np.ones((8, 3, 7, 7), np.float32), 'bn1.weight': np.ones(8, np.float32)}
  safetensors_numpy.save_file(resnet, tmp_path / 'resnet.safetensors')
  error = refusal(capsys, f'--from={tmp_path / "resnet.safetensors"}')
  assert 'no ViT of a known family' in error and 'conv1.weight [8, 3, 7, 7]' in error


class RunsOnLoad:
  def __init__(self, canary):
    self.canary = canary

  def __reduce__(self):
    return (pathlib.Path.touch, (self.canary,))


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(capsys, tmp_path):
  canary, path = tmp_path / 'canary', tmp_path / 'evil.pth'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('evil/data.pkl', pickle.dumps({'model': RunsOnLoad(canary)}, protocol=2))
    archive.writestr('evil/version', '3')
  pickle.loads(zipfile.ZipFile(path).read('evil/data.pkl'))
  assert canary.exists()  # It does run where nobody looks.
  canary.unlink()
  error = refusal(capsys, f'--from={path}', f'--to={tmp_path / "out"}')
  assert 'evil.pth' in error and not canary.exists() and not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (['--set', 'head=2'], "Unknown backbone field 'head'. Did you mean 'heads'?"),
    (['--set', 'heads'], '--set heads: write FIELD=VALUE.'),
    (['--set', 'heads=two'], '--set heads=two: heads is of type int.'),
    (['--set', 'gated=perhaps'], 'gated is of type bool'),
    (['--set', 'width=8'], 'width=8 contradicts config.json'),
    (['--prefix', 'visual.'], "under the prefix 'visual.'"),
  ],
)
def test_bad_options(args, message, capsys):
  assert message in refusal(capsys, f'--from={GOLDEN / "timm_deit"}', *args)


def test_a_fact_that_nothing_says_must_be_given(capsys):
  error = refusal(capsys, f'--from={path_of("orig_mae")}')
  assert 'does not say heads' in error and '--set heads=...' in error


def test_a_missing_file_names_the_nearest(capsys):
  error = refusal(capsys, f'--from={GOLDEN / "timm_vit_clip" / "model.safetensor"}')
  assert "Did you mean 'model.safetensors'?" in error


def test_help_names_the_families(capsys):
  with pytest.raises(SystemExit) as e:
    convert.main(['--help'])
  assert e.value.code == 0 and 'open_clip' in capsys.readouterr().out


def test_side_files_that_nobody_wrote_are_not_made_up():
  assert sources.open_source(path_of('orig_mae')).metadata.get('config.json') is None
