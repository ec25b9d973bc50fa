"""What people and programs read when a run is over."""

import json

import pytest

from losa_scenic.train_lib import summary

DONE = {
  'test_accuracy': 0.9686,
  'metric': 'accuracy',
  'trainable_params': 16041,
  'head_params': 970,
  'frozen_params': 696096,
  'train_images_per_second': 739.4,
  'images_per_second_per_device': 369.7,
  'input_wait': 0.004,
  'step_time': {'input_wait': 0.004, 'device_wait': 0.966, 'host': 0.03},
  'mfu': 0.412,
  'peak_host_memory_gb': 1.234,
  'peak_device_memory_gb': 8.1,
  'bad_images': 2,
  'bad_steps': 1,
  'preprocessing': {'clips': None},
  'method': 'losa',
  'dataset': 'digits',
  'backbone': 'b',
}


def rows(content, workdir):
  lines = summary.as_table(content, workdir).strip().splitlines()[1:]
  return {line[2:22].rstrip(): line[22:] for line in lines}


def test_the_table_of_a_run_on_accelerators(tmp_path):
  assert rows(DONE, tmp_path) == {
    'test accuracy': '96.86 %',
    'trained parameters': '16,041 (without the head)',
    '  with the head': '17,011',
    'frozen parameters': '696,096',
    'training speed': '739 images/s (370 a device)  data 0% host 3% device 97%  MFU 41%',
    'most memory': '1.2 GB of the host, 8.1 GB of a device',
    'bad images': '2, see bad_files.csv',
    'bad steps': '1 dropped, see bad_steps.jsonl',
    'outputs': str(tmp_path),
    'curves': f'tensorboard --logdir {tmp_path}',
  }


def test_the_table_leaves_out_what_is_not_known(tmp_path):
  unknown = {'peak_device_memory_gb': None, 'mfu': None, 'bad_images': 0, 'bad_steps': 0}
  unknown |= {'images_per_second_per_device': 739.4, 'preprocessing': {'clips': {'num_frames': 8}}}
  shown = rows(DONE | unknown, tmp_path)
  assert shown['training speed'] == '739 clips/s  data 0% host 3% device 97%'
  assert shown['most memory'] == '1.2 GB of the host'
  assert not any(name.startswith('bad') for name in shown)
  none = {'train_images_per_second': None, 'images_per_second_per_device': None, 'step_time': None}
  assert rows(DONE | none, tmp_path)['training speed'] == 'nothing left to train'


@pytest.mark.parametrize('content', [DONE | {'resumed_from_step': 3}, {'test_accuracy': 0.5}, None])
def test_what_only_the_training_process_knew_is_kept(tmp_path, content):
  if content is not None:
    (tmp_path / 'summary.json').write_text(json.dumps(content))
  kept = summary.of_training(tmp_path)
  measured = ('train_images_per_second', 'step_time', 'mfu', 'peak_device_memory_gb', 'bad_steps')
  expected = {} if not content or 'mfu' not in content else {k: DONE[k] for k in measured}
  assert {k: v for k, v in kept.items() if k in measured} == expected
  assert 'test_accuracy' not in kept and 'bad_images' not in kept
