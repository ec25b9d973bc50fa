"""Memory that the documentation promises, as XLA plans it for GPUs that are not there."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# Without these a run takes its classes from the data, and its weights from a file.
CLIPS = (
  '--config=configs/k400_vivit_e.py',
  '--num_classes=400',
  '--config.batch_size=1',
  '--config.method_configs.losa.memory=smallest',
)
IMAGES = (
  '--config=configs/inat18_vitg.py',
  '--config.backbone_configs.pool=gap',
  '--config.method_configs.losa.map_head_lora_rank=0',
)
HOST = '--config.frozen_memory=host'
BALANCED = '--config.method_configs.losa.memory=balanced'
LINEAR = ('--config.method=linear', '--num_classes=8142', '--config.backbone_configs.pool=gap')

GOALS = {
  'ViViT-e': (CLIPS, 8400),
  'ViViT-e, int8': ((*CLIPS, '--config.backbone_quantisation=int8'), 4750),
  'ViViT-e, streamed': ((*CLIPS, HOST), 1024),
  'ViT-22B, batch 16, streamed': (
    (*IMAGES, '--config.backbone=22B/14', '--config.batch_size=16', HOST, BALANCED),
    3600,
  ),
  'ViT-e, batch 128 on 8': (
    (*IMAGES, '--config.backbone=e/14', '--config.batch_size=128', '--num_classes=8142')
    + ('--config.mesh.fsdp=8', '--devices=8', BALANCED),
    2000,
  ),
  'ViT-g': ((*IMAGES, '--config.batch_size=1', '--num_classes=8142'), 2200),
  'ViT-g, batch 16, with a kernel': (
    (*IMAGES, '--config.batch_size=16', '--num_classes=8142')
    + ('--config.method_configs.losa.kernel=pallas',),
    2750,
  ),
  'ViT-g on a V100': (
    (*IMAGES, '--config.batch_size=1', '--num_classes=8142', '--device=v100-16gb')
    + ('--config.model_dtype_str=float16', '--config.frozen_dtype_str=float16'),
    2200,
  ),
}


def planned(*arguments: str) -> dict:
  """What the command prints, in a process without the tests' compiler options."""
  keep = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS' and not k.startswith('JAX_')}
  keep |= {'PYTHONPATH': os.pathsep.join([str(ROOT), *filter(None, [keep.get('PYTHONPATH')])])}
  if not any(argument.startswith('--device=') for argument in arguments):
    arguments = (*arguments, '--device=h100-80gb')
  command = [sys.executable, '-m', 'losa_scenic.plan', '--quick', '--json', *arguments]
  command.append('--config.random_backbone=True')
  done = subprocess.run(command, env=keep, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout)
  assert found['exact']
  return found


@pytest.mark.plan
@pytest.mark.parametrize('name', GOALS)
def test_losa_needs_no_more_than_promised(name):
  arguments, most = GOALS[name]
  memory = planned(*arguments)['memory']
  assert 0.5 * most < memory['total'] <= most
  assert memory['trainable'] > 20  # Nobody left out what trains.


@pytest.mark.plan
@pytest.mark.parametrize(
  ('images', 'modes'), [(1, {'fast': 1.04}), (16, {'balanced': 1.2, 'smallest': 1.1})]
)
def test_losa_needs_little_more_than_a_linear_probe(images, modes):
  size = f'--config.batch_size={images}'
  linear = planned(IMAGES[0], *LINEAR, size)['memory']['total']
  for mode, most in modes.items():
    more = ('--num_classes=8142', f'--config.method_configs.losa.memory={mode}')
    assert planned(*IMAGES, size, *more)['memory']['total'] <= most * linear, mode
