"""What a person sees: a line now and then in a log file, a bar on a terminal."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from losa_scenic.train_lib import progress

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
bar.say('a message')
bar.close()
"""


def test_lines_without_a_terminal(capsys, monkeypatch):
  now = [0.0]
  monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
  bar = progress.Progress(0, 4000, batch_size=8, seconds_between_lines=5.0)
  for step in range(1, 13):
    now[0] += 60.0 if step == 1 else 1.0  # The first step compiles.
    bar.step()
    bar.run()
    bar.loss(1 / step)
    bar.show(step)
  printed = capsys.readouterr().err.splitlines()
  assert printed == [
    'step 6/4000  loss 0.1667  8 images/s, waits 0% for data  1:06:34 left',
    'step 11/4000  loss 0.0909  8 images/s, waits 0% for data  1:06:29 left',
  ]


def test_the_last_line_comes_always(capsys):
  bar = progress.Progress(0, 1, batch_size=8, unit='clips')
  bar.step()
  bar.run()
  bar.loss(0.25)
  bar.show(1)
  assert capsys.readouterr().err == (
    'step 1/1  loss 0.2500  0 clips/s, waits 0% for data  0:00:00 left\n'
  )


def test_speed_leaves_out_the_first_step_and_pauses(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
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


def test_input_wait_is_the_share_of_training_that_waits_for_batches(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
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


def test_speeds_have_two_digits_or_more():
  assert progress.speed(12345.6, 0.0) == '12346 images/s, waits 0% for data'
  assert progress.speed(10.4, 0.031) == '10 images/s, waits 3% for data'
  assert progress.speed(9.96, 1.0, 'clips') == '10 clips/s, waits 100% for data'
  assert progress.speed(3.14, 0.5, 'clips') == '3.1 clips/s, waits 50% for data'
  assert progress.speed(0.2512, 0.5, 'clips') == '0.25 clips/s, waits 50% for data'


def test_waits_are_shown_short_or_long(capsys, monkeypatch):
  now = [0.0]
  monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
  bar = progress.Progress(0, 200, batch_size=8, seconds_between_lines=1.0)
  waits = [30.0, 0.01, 0.25]
  for step, wait in enumerate(waits, start=1):
    assert next(bar.timed(slow_batches(now, [wait]))) == 0
    now[0] += 60.0 if step == 1 else 1.0 - wait
    bar.step()
    bar.run()
    bar.loss(0.5)
    bar.show(step)
  assert capsys.readouterr().err.splitlines() == [
    'step 2/200  loss 0.5000  8 images/s, waits 1% for data  0:03:18 left',
    'step 3/200  loss 0.5000  8 images/s, waits 13% for data  0:03:17 left',
  ]


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
  assert re.search(r'100%\|.*\| 6/6 .*loss 0\.5000, \d+ images/s', text), text
  assert '\r' in text


def test_table_is_aligned():
  assert progress.table('title', {'a': 1, 'long': 'x'}) == 'title\n  a     1\n  long  x'
