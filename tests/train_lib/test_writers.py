"""What the writers leave on disk is what TensorBoard and a line reader see, also after a rewind."""

import io
import json

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
