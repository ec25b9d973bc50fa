"""What a person sees: a line now and then in a log file, a bar on a terminal."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from types import SimpleNamespace

import numpy as np
import pytest

from losa_scenic.train_lib import heartbeat, memory, progress, writers

SCRIPT = """
import time
from losa_scenic.train_lib import progress
bar = progress.Progress(2, 6, batch_size=8)
for step in range(3, 7):
  time.sleep(0.15)
  bar.step()
  bar.run()
  bar.loss(0.5)
  bar.show(step)
bar.pause()
for done in range(1, 5):
  time.sleep(0.12)
  bar.evaluating('valid', done, 4)
bar.say('a message')
bar.close()
"""


@pytest.fixture
def now(monkeypatch):
  """A clock that a test moves: [seconds]."""
  seconds = [0.0]
  monkeypatch.setattr(progress.time, 'monotonic', lambda: seconds[0])
  return seconds


@pytest.fixture(autouse=True)
def _memory(monkeypatch):
  monkeypatch.setattr(memory, 'host_gb', lambda: 1.25)
  monkeypatch.setattr(memory, 'peak_device_gb', lambda: None)


def train(bar, now, steps, data=0.25, device=0.5, host=0.25):
  """Steps with so many seconds of each kind; the first one compiles."""
  for step in steps:
    assert next(bar.timed(slow_batches(now, [data]))) == 0
    now[0] += host if step > 1 else 60.0
    with bar.device():
      now[0] += device
    bar.step()
    bar.run()
    bar.loss(1 / step)
    bar.show(step)


def test_lines_without_a_terminal(capsys, now):
  bar = progress.Progress(0, 4000, batch_size=8, seconds_between_lines=5.0)
  train(bar, now, range(1, 7))
  train(bar, now, range(7, 12), device=2.5)
  assert capsys.readouterr().err.splitlines() == [
    'step 6/4000  loss 0.1667  8 images/s  data 25% host 25% device 50%  1.2 GB  1:06:34 left',
    'step 8/4000  loss 0.1250  2.7 images/s  data 8% host 9% device 83%  1.2 GB  1:44:33 left',
    'step 10/4000  loss 0.1000  2.7 images/s  data 8% host 9% device 83%  1.2 GB  2:05:37 left',
  ]


def test_a_line_of_all_that_can_be_known_and_of_what_fits(capsys, now, monkeypatch):
  monkeypatch.setattr(memory, 'peak_device_gb', lambda: 71.25)

  def lines(total, batch_size, host):
    bar = progress.Progress(
      0, total, batch_size, devices=8, flops_per_step=4e14, peak=1e14, unit='clips'
    )
    train(bar, now, [1, *range(total - 6, total)], data=0, device=1 - host, host=host)
    return capsys.readouterr().err.splitlines()

  shown = lines(10_000, 64, 0.25)
  assert shown == [
    'step 9998/10000  loss 0.0001  64 clips/s (8 a device)  data 0% host 25% device 75%  71.2 GB  '
    'MFU 50%  0:00:02 left'
  ]
  shown = lines(100_000_000, 12_345_678, 0.25)
  assert shown == [
    'step 99999998/100000000  loss 0.0000  12345678 clips/s  data 0% host 25% device 75%  71.2 GB  '
    'MFU 50%  0:00:02 left'
  ]
  assert max(map(len, shown)) <= 120


def test_the_last_line_comes_always(capsys):
  bar = progress.Progress(0, 1, batch_size=8, unit='clips')
  bar.step()
  bar.run()
  bar.loss(0.25)
  bar.show(1)
  assert capsys.readouterr().err == 'step 1/1  loss 0.2500  1.2 GB\n'


def test_evaluations_show_that_they_live(capsys, now):
  bar = progress.Progress(0, 10, batch_size=8)
  train(bar, now, [1, 2])
  bar.pause()
  for done in range(1, 21):
    now[0] += 1.0
    bar.evaluating('valid', done, 20)
  assert capsys.readouterr().err.splitlines() == [
    'evaluating valid 4/20',
    'evaluating valid 9/20',
    'evaluating valid 14/20',
    'evaluating valid 19/20',
  ]


def test_a_quiet_one_measures_and_says_nothing(capsys, now, monkeypatch):
  monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
  bar = progress.Progress(0, 20, batch_size=8, quiet=True)
  train(bar, now, range(1, 20))
  bar.evaluating('valid', 1, 2)
  bar.say('hello')
  bar.close()
  assert bar.interval()['img/sec'] == 8
  captured = capsys.readouterr()
  assert captured.err == captured.out == ''


def test_an_interval_holds_what_was_measured_since_the_last_one(now, monkeypatch):
  bar = progress.Progress(0, 100, batch_size=8, devices=2, peak=1e12)
  train(bar, now, [1])
  assert bar.interval() == {'host_memory_gb': 1.25}  # Compilation is no measurement.
  train(bar, now, [2, 3], data=0.25, device=0.5, host=0.25)
  first = bar.interval()
  assert first == {
    'img/sec': 8.0,
    'img/sec/device': 4.0,
    'input_wait': 0.25,
    'device_wait': 0.5,
    'host': 0.25,
    'step_seconds': 1.0,
    'host_memory_gb': 1.25,
  }
  monkeypatch.setattr(memory, 'peak_device_gb', lambda: 7.5)
  bar.flops_per_step = 5e11
  bar.pause()
  now[0] += 100.0  # An evaluation.
  with bar.device():
    now[0] += 100.0
  bar.run()
  train(bar, now, [4], data=1.0, device=0.5, host=0.5)
  second = bar.interval()
  assert tuple(second) == progress.MEASUREMENTS
  assert second == {
    'img/sec': 4.0,
    'img/sec/device': 2.0,
    'input_wait': 0.5,
    'device_wait': 0.25,
    'host': 0.25,
    'step_seconds': 2.0,
    'tflops_per_device': 0.125,
    'mfu': 0.125,
    'host_memory_gb': 1.25,
    'device_memory_gb': 7.5,
  }
  assert bar.interval().keys() == {'host_memory_gb', 'device_memory_gb'}
  # Of the whole run.
  values = bar.measurements()
  assert (values['img/sec'], values['input_wait']) == (6.0, 0.375)


def test_shares_of_real_waits(monkeypatch):
  monkeypatch.undo()
  bar = progress.Progress(0, 100, batch_size=8)

  def batches():
    for _ in range(4):
      time.sleep(0.01)
      yield

  for _ in bar.timed(batches()):
    with bar.device():
      time.sleep(0.02)
    bar.step()
    bar.run()
  values = bar.interval()
  assert 0.2 < values['input_wait'] < values['device_wait'] < 0.8
  assert values['input_wait'] + values['device_wait'] + values['host'] == pytest.approx(1.0)
  assert 0.01 < values['host_memory_gb'] < 100


def test_measurements_are_one_group_of_tensorboard():
  tags = {writers.tag(name) for name in progress.MEASUREMENTS}
  assert {tag.split('/')[0] for tag in tags} == {'progress'}
  assert len(tags) == len(progress.MEASUREMENTS) and all(tag.count('/') == 1 for tag in tags)


def test_speed_leaves_out_the_first_step_and_pauses(now):
  bar = progress.Progress(0, 10, batch_size=8)
  assert bar.images_per_second == 0
  for seconds in (50.0, 2.0, 2.0):
    now[0] += seconds
    bar.step()
    bar.run()
  bar.pause()
  now[0] += 100.0  # An evaluation.
  bar.run()
  now[0] += 4.0
  bar.step()
  assert bar.images_per_second == 8 * 3 / 8.0
  bar.close()
  now[0] += 100.0
  assert bar.images_per_second == 8 * 3 / 8.0


def slow_batches(now: list[float], seconds: list[float]):
  """Batches that take their time."""
  for number, wait in enumerate(seconds):
    now[0] += wait
    yield number


def test_input_wait_is_the_share_of_training_that_waits_for_batches(now):
  bar = progress.Progress(0, 10, batch_size=8)
  assert bar.input_wait == 0
  given = []
  # The first batch, before the clock runs, does not count; nor does the compilation after it.
  for batch in bar.timed(slow_batches(now, [30.0, 1.0, 2.0, 3.0])):
    given.append(batch)
    now[0] += 50.0 if batch == 0 else 3.0
    bar.step()
    if batch == 2:
      bar.pause()
      now[0] += 100.0  # An evaluation.
    bar.run()
    if batch:
      waited = [1.0, 3.0, 6.0][batch - 1]
      assert bar.input_wait == waited / (waited + 3.0 * batch)
  assert given == [0, 1, 2, 3]
  bar.close()
  now[0] += 100.0
  assert bar.input_wait == 6.0 / 15.0


def test_timed_hands_on_everything_and_every_error():
  bar = progress.Progress(0, 3, batch_size=8)
  assert list(bar.timed(iter([]))) == [] and list(bar.timed(iter('abc'))) == ['a', 'b', 'c']

  def broken():
    yield 1
    raise OSError('the disk is gone')

  batches = bar.timed(broken())
  assert next(batches) == 1
  with pytest.raises(OSError, match='the disk is gone'):
    next(batches)


def test_numbers_have_two_digits_or_more():
  numbers = (12345.6, 10.4, 9.96, 3.14, 0.2512, 0.0)
  assert [heartbeat.number(n) for n in numbers] == ['12346', '10', '10', '3.1', '0.25', '0']
  assert [heartbeat.number(n, 100) for n in (123.4, 12.34, 1.234)] == ['123', '12.3', '1.2']


def test_memory_of_this_process(monkeypatch):
  monkeypatch.undo()
  before = memory.host_gb()
  block = np.ones(2**27, np.uint8)  # 1/8 GB
  held = memory.host_gb() - before
  assert held == pytest.approx(1 / 8, rel=0.1) and block.all()
  assert memory.peak_host_gb() >= memory.host_gb() * 0.99
  assert memory.peak_device_gb() is None  # A CPU does not count it.


def test_memory_of_the_fullest_device(monkeypatch):
  monkeypatch.undo()
  devices = [
    SimpleNamespace(memory_stats=lambda n=n: n and {'peak_bytes_in_use': n * 2**30})
    for n in (None, 3, 5, 4)
  ]
  monkeypatch.setattr(memory.jax, 'local_devices', lambda: devices)
  assert memory.peak_device_gb() == 5


def test_a_bar_on_a_terminal():
  master, slave = pty.openpty()
  fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('4H', 24, 120, 0, 0))
  with subprocess.Popen([sys.executable, '-c', SCRIPT], stdout=slave, stderr=slave) as process:
    os.close(slave)
    shown = b''
    while True:
      try:
        chunk = os.read(master, 4096)
      except OSError:  # Linux: the other end is closed.
        break
      if not chunk:
        break
      shown += chunk
  os.close(master)
  text = shown.decode()
  assert process.returncode == 0, text
  assert 'a message' in text
  assert re.search(r'100%\|.*\| 6/6 .*loss 0\.5000  \d+ images/s  data \d+% host', text), text
  assert '\r' in text
  drawn = text.strip().split('\r')
  assert any('evaluating valid 2/4' in line for line in drawn)
  assert 'evaluating' not in drawn[-1] and 'images/s' in drawn[-1]
  assert max(map(len, drawn)) <= 122  # A clear or an end of the line besides.


def test_table_is_aligned():
  assert progress.table('title', {'a': 1, 'long': 'x'}) == 'title\n  a     1\n  long  x'
