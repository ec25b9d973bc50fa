"""What the writers leave on disk is what TensorBoard and a line reader see, also after a rewind."""

import errno
import io
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing import event_accumulator

from losa_scenic.train_lib import writers


def events(logdir) -> event_accumulator.EventAccumulator:
  loaded = event_accumulator.EventAccumulator(
    str(logdir), size_guidance=dict.fromkeys(event_accumulator.DEFAULT_SIZE_GUIDANCE, 0)
  )
  loaded.Reload()
  return loaded


def scalars(logdir, name: str) -> list[tuple[int, float]]:
  return [(event.step, event.value) for event in events(logdir).Scalars(name)]


def test_json_lines_hold_floats_exactly(tmp_path):
  writer = writers.JsonLinesWriter(tmp_path / 'metrics.jsonl')
  writer.write_scalars(3, {'a': np.float64(0.1) + 0.2, 'b': np.float32(1 / 3)})
  writer.close()
  row = json.loads((tmp_path / 'metrics.jsonl').read_text())
  assert row == {'step': 3, 'a': 0.1 + 0.2, 'b': float(np.float32(1 / 3))}


def test_json_lines_are_on_disk_at_once(tmp_path):
  writer = writers.JsonLinesWriter(tmp_path / 'metrics.jsonl')
  writer.write_scalars(1, {'a': 1})
  assert (tmp_path / 'metrics.jsonl').read_text() == '{"step": 1, "a": 1.0}\n'


@pytest.mark.parametrize('tail', ['', '{"step": 7, "a', '{"step": 7, "a": 7.0}', '\x00\x00'])
def test_json_lines_rewind(tmp_path, tail):
  file = tmp_path / 'metrics.jsonl'
  file.write_text(''.join(f'{{"step": {i}, "a": {i}.0}}\n' for i in (2, 4, 4, 6)) + tail)
  writer = writers.JsonLinesWriter(file)
  writer.rewind(4)
  writer.write_scalars(5, {'a': 5})
  writer.close()
  assert [json.loads(line)['step'] for line in file.read_text().splitlines()] == [2, 4, 4, 5]


def test_json_lines_rewind_keeps_nothing_of_a_half_written_line_before_the_step(tmp_path):
  file = tmp_path / 'metrics.jsonl'
  file.write_text('{"step": 2, "a": 2.0}\n{"step": 4, "a": 4.')
  writer = writers.JsonLinesWriter(file)
  writer.rewind(4)
  assert file.read_text() == '{"step": 2, "a": 2.0}\n'


def test_json_lines_rewind_of_nothing(tmp_path):
  writers.JsonLinesWriter(tmp_path / 'metrics.jsonl').rewind(4)
  assert list(tmp_path.iterdir()) == []


def test_tensorboard_reads_scalars_texts_images_and_hparams(tmp_path):
  picture = np.random.default_rng(0).integers(0, 256, (1, 6, 5, 3), dtype=np.uint8)
  writer = writers.TensorBoardWriter(tmp_path)
  writer.write_scalars(1, {'train_loss': 0.5, 'img/sec': np.float32(3)})
  writer.write_scalars(2, {'train_loss': 0.25})
  writer.write_texts(0, {'config': '```\n{"a": 1}\n```'})
  writer.write_images(2, {'test_predictions': picture})
  writer.write_hparams({'rank': 4})
  writer.flush()  # Readable without a close: the process may be killed.
  assert scalars(tmp_path, 'loss/train') == [(1, 0.5), (2, 0.25)]
  assert scalars(tmp_path, 'progress/img_per_sec') == [(1, 3.0)]
  loaded = events(tmp_path)
  texts = {
    tag: loaded.Tensors(tag)[0].tensor_proto.string_val[0] for tag in loaded.Tags()['tensors']
  }
  assert texts['config/text_summary'] == b'```\n{"a": 1}\n```'
  assert b'| rank | 4 |' in texts['hparams/text_summary']
  image = loaded.Images('test_predictions')[0]
  assert image.step == 2
  shown = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
  np.testing.assert_array_equal(shown, picture[0])


def test_tensorboard_forgets_steps_after_a_rewind(tmp_path):
  first = writers.TensorBoardWriter(tmp_path)
  for step in range(1, 8):
    first.write_scalars(step, {'a': step})
  first.flush()  # Not closed: killed.
  second = writers.TensorBoardWriter(tmp_path)
  second.rewind(4)
  for step in range(5, 9):
    second.write_scalars(step, {'a': 10 * step})
  second.close()
  expected = [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50), (6, 60), (7, 70), (8, 80)]
  assert scalars(tmp_path, 'progress/a') == expected


def test_tensorboard_begins_anew(tmp_path):
  for value in (1, 2):
    writer = writers.TensorBoardWriter(tmp_path)
    writer.rewind(-1)
    writer.write_texts(0, {'config': str(value)})
    writer.write_scalars(1, {'a': value})
    writer.close()
  assert scalars(tmp_path, 'progress/a') == [(1, 2.0)]
  texts = events(tmp_path).Tensors('config/text_summary')  # TensorBoard never purges texts.
  assert texts[-1].tensor_proto.string_val[0] == b'2'


def test_tensorboard_shows_the_right_curve_also_if_the_clock_has_gone_back(tmp_path, monkeypatch):
  def run(first: int, last: int, factor: int) -> None:
    writer = writers.TensorBoardWriter(tmp_path)
    writer.rewind(first - 1)
    for step in range(first, last):
      writer.write_scalars(step, {'a': factor * step})
    writer.flush()  # Not closed: killed.

  true_time, true_ns = time.time, time.time_ns
  run(0, 8, 1)
  for factor, first, days in ((10, 5, 1), (100, 6, 400), (1000, 7, 0)):
    monkeypatch.setattr(time, 'time', lambda days=days: true_time() - days * 86400)
    monkeypatch.setattr(time, 'time_ns', lambda days=days: true_ns() - days * 86400 * 10**9)
    run(first, 8, factor)
  assert scalars(tmp_path, 'progress/a') == [
    *((i, i) for i in range(5)),
    (5, 50),
    (6, 600),
    (7, 7000),
  ]


def test_event_files_sort_after_those_of_other_programs(tmp_path):
  (tmp_path / 'zz.tfevents').touch()
  for value in (1, 2):
    writer = writers.TensorBoardWriter(tmp_path)
    writer.rewind(-1)
    writer.write_scalars(1, {'a': value})
    writer.close()
  assert scalars(tmp_path, 'progress/a') == [(1, 2.0)]
  assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize('kind', [writers.TensorBoardWriter, writers.create_default_writer])
def test_flush_waits_for_the_disk_only_if_something_was_added(tmp_path, monkeypatch, kind):
  synced, true_fsync = [], os.fsync

  def fsync(fd: int) -> None:
    synced.append(fd)
    if len(synced) == 1:
      raise OSError(errno.EIO, 'Input/output error')
    true_fsync(fd)

  monkeypatch.setattr(os, 'fsync', fsync)
  files = 2 if kind is writers.create_default_writer else 1
  writer = kind(tmp_path)
  writer.flush()
  assert synced == []
  writer.write_scalars(1, {'a': 1})
  with pytest.raises(OSError, match=r"Input/output error: '.*/(metrics\.jsonl|events[^/]*)'"):
    writer.flush()
  for _ in range(3):
    writer.flush()
  assert len(synced) == 1 + files
  writer.write_scalars(2, {'a': 1})
  writer.flush()
  assert len(synced) == 1 + 2 * files
  writer.close()


def test_json_lines_rewind_takes_out_a_broken_line_alone(tmp_path):
  file = tmp_path / 'metrics.jsonl'
  file.write_bytes(b'{"step": 2}\n\x00\xff\n[3]\n{"step": 4}\n{"step": 6}\n')
  writers.JsonLinesWriter(file).rewind(4)
  assert file.read_text() == '{"step": 2}\n{"step": 4}\n'
  assert list(tmp_path.iterdir()) == [file]


# Writes until the disk is full, makes room, goes on; as a run that is started again.
FULL_DISK = """
import pathlib, shutil, sys
from losa_scenic.train_lib import writers

disk, kept = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
ballast = disk / 'ballast'

def make(name):
  if name == 'json':
    return writers.JsonLinesWriter(disk / 'metrics.jsonl')
  return writers.TensorBoardWriter(disk / 'events')

for name in ('json', 'events'):
  start, factor = 0, 1
  for size in (48, 24, 12):
    ballast.write_bytes(bytes(size * 1024))
    writer = make(name)
    writer.rewind(start)
    step = start
    try:
      while True:
        step += 1
        writer.write_scalars(step, {'a': factor * step} | {f'more_{i}': i for i in range(7)})
        writer.flush()
    except OSError as error:
      print(step, error.errno, error.filename)
    writer.rewind(step - 1)  # Needs no room.
    ballast.unlink()
    writer.write_scalars(step, {'a': factor * step})
    writer.close()
    start, factor = step - 3, factor * 10
  shutil.copytree(disk, kept / name)
  for file in disk.iterdir():
    shutil.rmtree(file) if file.is_dir() else file.unlink()
"""


def test_a_full_disk_loses_and_joins_nothing(tmp_path):
  disk = tmp_path / 'disk'
  disk.mkdir()
  namespace = ['unshare', '-m'] if os.geteuid() == 0 else ['unshare', '-Urm']
  mount = f'mount -t tmpfs -o size=64k tmpfs {disk}'
  try:
    subprocess.run([*namespace, 'sh', '-c', mount], check=True, capture_output=True)
  except (OSError, subprocess.CalledProcessError) as error:
    pytest.skip(f'a file system cannot be mounted here: {error}')
  command = f'{mount} && exec "$0" -c "$1" {disk} {tmp_path}'
  done = subprocess.run(
    [*namespace, 'sh', '-c', command, sys.executable, FULL_DISK], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  said = [line.split() for line in done.stdout.splitlines()]
  assert len(said) == 6 and {int(number) for _, number, _ in said} == {errno.ENOSPC}
  for row, name in zip(said, ['metrics.jsonl'] * 3 + ['tfevents'] * 3, strict=True):
    assert name in row[2]
  ends = [int(step) for step, _, _ in said]

  def expected(first: int, second: int, third: int) -> list[tuple[int, float]]:
    factors = [(1, 1, first - 3), (10, first - 2, second - 3), (100, second - 2, third)]
    return [(i, factor * i) for factor, a, b in factors for i in range(a, b + 1)]

  lines = (tmp_path / 'json' / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert [(row['step'], row['a']) for row in rows] == expected(*ends[:3])
  assert scalars(tmp_path / 'events' / 'events', 'progress/a') == expected(*ends[3:])


def test_many_writers_receive_the_same(tmp_path):
  class Clu:  # clu's interface, without `rewind`.
    def __init__(self):
      self.calls = []

    def __getattr__(self, name):
      if name == 'rewind':
        raise AttributeError(name)
      return lambda *args: self.calls.append((name, *args))

  clu = Clu()
  writer = writers.MultiWriter(clu, writers.JsonLinesWriter(tmp_path / 'metrics.jsonl'))
  writer.rewind(2)
  writer.write_scalars(3, {'a': 1.0})
  writer.write_images(3, {'b': np.zeros((1, 2, 2, 3))})
  writer.write_texts(3, {'c': 'd'})
  writer.write_hparams({'e': 1})
  writer.flush()
  writer.close()
  names = [call[0] for call in clu.calls]
  assert names == [
    'write_scalars',
    'write_images',
    'write_texts',
    'write_hparams',
    'flush',
    'close',
  ]
  assert (tmp_path / 'metrics.jsonl').read_text() == '{"step": 3, "a": 1.0}\n'


def test_tags_group_splits_and_open_on_the_accuracy():
  names = ['learning_rate', 'train_l2_grads', 'valid_loss', 'train_accuracy', 'test_accuracy']
  assert sorted(map(writers.tag, names)) == [
    'accuracy/test',
    'accuracy/train',
    'loss/valid',
    'norms/grads',
    'progress/learning_rate',
  ]
