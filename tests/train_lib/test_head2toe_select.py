"""Both stages of Head2Toe with the command between them."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import safetensors.numpy

from losa_scenic import head2toe_select
from losa_scenic.adapt_lib import head2toe
from losa_scenic.model_lib import presets

HEAD2TOE = ('--config.method=head2toe', '--config.lr_configs.base_learning_rate=1e-2')
TARGET = '--config.method_configs.head2toe.target_size=64'
SELECTION = '--config.method_configs.head2toe.selection='


@pytest.fixture(scope='module')
def first_stage(cli, tmp_path_factory) -> pathlib.Path:
  workdir = tmp_path_factory.mktemp('head2toe') / 'first'
  status, printed = cli(*HEAD2TOE, TARGET, workdir=workdir)
  assert status == 0, printed
  return workdir


def select(workdir, output, *arguments):
  return head2toe_select.main([str(workdir), f'--output={output}', *arguments])


def test_the_rows_of_largest_norm_are_kept_and_the_second_stage_takes_them(
  first_stage, cli, tmp_path, capsys
):
  output = tmp_path / 'kept.json'
  assert select(first_stage, output, '--keep=0.05') == 0
  content = json.loads(output.read_text())
  total = sum(head2toe.tap_sizes(presets.preset('test/8'), 64))
  kept = content['kept']
  assert (
    len(kept) == int(0.05 * total) and f'kept {len(kept)} of {total}' in capsys.readouterr().out
  )
  last = sorted((first_stage / 'checkpoints' / 'last').glob('[0-9]*'))[-1]
  tensors = safetensors.numpy.load_file(last / 'state.safetensors')
  norms = np.linalg.norm(tensors['trainable/output_projection/kernel'], axis=1)
  assert norms.shape == (total,)
  others = np.delete(norms, kept)
  assert norms[kept].min() >= others.max() and norms.min() < norms.max()
  status, printed = cli(*HEAD2TOE, TARGET, f'{SELECTION}{output}', workdir=tmp_path / 'second')
  assert status == 0, printed
  summary = json.loads((tmp_path / 'second' / 'summary.json').read_text())
  assert summary['head_params'] == 10 * (len(kept) + 1)
  assert summary['trainable_params'] == 0
  assert select(tmp_path / 'second', tmp_path / 'again.json') == 1
  assert 'is no first stage of Head2Toe' in capsys.readouterr().err


def test_at_least_one_feature_is_kept(first_stage, tmp_path):
  assert select(first_stage, tmp_path / 'kept.json', '--keep=1e-9') == 0
  assert len(json.loads((tmp_path / 'kept.json').read_text())['kept']) == 1


def test_a_selection_of_another_backbone_or_size_is_refused(first_stage, cli, tmp_path):
  output = tmp_path / 'kept.json'
  assert select(first_stage, output) == 0
  wanted = (
    ('--config.backbone_configs.pool=gap', 'backbone.pool cls there, gap here'),
    ('--config.method_configs.head2toe.target_size=32', 'target_size 64 there, 32 here'),
  )
  for change, message in wanted:
    status, printed = cli(
      *HEAD2TOE, TARGET, f'{SELECTION}{output}', change, workdir=tmp_path / 'refused'
    )
    assert status == 1 and message in printed


def test_bad_use_is_one_message(first_stage, tmp_path, capsys):
  output = tmp_path / 'kept.json'
  without = tmp_path / 'without'
  shutil.copytree(first_stage, without)
  shutil.rmtree(without / 'checkpoints')
  damaged = tmp_path / 'damaged'
  shutil.copytree(first_stage, damaged)
  (damaged / 'summary.json').write_text('{')
  cases = [
    ((first_stage, output, '--keep=0'), r'--keep must be in (0, 1], got 0.0'),
    ((first_stage, output, '--keep=1.5'), r'--keep must be in (0, 1], got 1.5'),
    ((tmp_path / 'nowhere', output), 'no finished run is in that workdir'),
    ((without, output), 'holds no checkpoint'),
    ((damaged, output), 'Cannot read'),
    ((first_stage, tmp_path / 'no' / 'folder.json'), 'Cannot write'),
  ]
  for arguments, message in cases:
    assert select(*arguments) == 1
    assert message in capsys.readouterr().err
  assert not output.exists()
