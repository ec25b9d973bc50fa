"""A watchdog speaks of what lasts too long, and ends a process that hangs for good."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from losa_scenic.train_lib.watchdog import Watchdog


def until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
  end = time.monotonic() + seconds
  while not holds():
    assert time.monotonic() < end
    time.sleep(0.01)


def test_it_speaks_of_a_long_phase_less_and_less_often():
  said = []
  dog = Watchdog(said.append, 0.1, details=lambda: ['training image 3 (a.jpg), for 1 s'])
  try:
    dog.doing('waiting for the batch of step 41')
    until(lambda: len(said) == 6)
    dog.doing('evaluating valid, batch 3')
    until(lambda: len(said) == 8)
  finally:
    dog.close()
  assert set(said[1::2]) == {'  training image 3 (a.jpg), for 1 s'}
  pattern = r'nothing has moved for (\S+) s: (.*)'
  phases = [re.fullmatch(pattern, line).groups() for line in said[::2]]
  assert [text for _, text in phases] == ['waiting for the batch of step 41'] * 3 + [
    'evaluating valid, batch 3'
  ]
  lasted = [float(seconds) for seconds, _ in phases]
  for least, seconds in zip((0.1, 0.2, 0.4, 0.1), lasted, strict=True):
    assert least <= seconds < least + 1  # On a busy machine it looks late, never early.
  count = len(said)
  time.sleep(0.4)
  assert len(said) == count  # Closed.


def test_short_phases_and_none_are_not_spoken_of():
  said = []
  dog = Watchdog(said.append, 0.5, limit_seconds=0.5)
  end = time.monotonic() + 1
  while time.monotonic() < end:
    dog.doing('step 1 on the devices')
    time.sleep(0.01)
  dog.doing('')
  time.sleep(0.8)
  dog.close()
  assert said == []


def test_what_fails_in_it_does_not_stop_it(capsys):
  said = []

  def details() -> list[str]:
    raise OSError('no such loader')

  dog = Watchdog(said.append, 0.05, details=details)
  dog.doing('saving step 40')
  until(lambda: len(said) >= 2)
  dog.close()
  assert 'no such loader' in capsys.readouterr().err


@pytest.mark.parametrize('times', [(0, None), (float('nan'), None), (1, 0)])
def test_times_that_are_none(times):
  with pytest.raises(ValueError, match='above 0'):
    Watchdog(print, *times)


# Reads an image folder in which a file has become a pipe that nobody writes to.
HANGS = """
import os, pathlib, sys
from PIL import Image
from losa_scenic.dataset_lib import dataset_utils, datasets
from losa_scenic.train_lib.watchdog import Watchdog

root = pathlib.Path(sys.argv[1])
for part in ('train', 'test'):
  for name in ('cat/1.png', 'dog/2.png'):
    (root / part / name).parent.mkdir(parents=True)
    Image.new('RGB', (8, 8)).save(root / part / name)
dataset = datasets.build_dataset(
  'image_folder', batch_size=2, eval_batch_size=2, image_size=8, shuffle_seed=0,
  dataset_configs={'root': str(root), 'val_fraction': 0.0},
)
(root / 'train/dog/2.png').unlink()
os.mkfifo(root / 'train/dog/2.png')
say = lambda text: print(text, file=sys.stderr, flush=True)
dog = Watchdog(say, 0.3, 1.0, dataset.train_ds.reading)
dog.doing('waiting for the batch of step 1')
next(dataset_utils.iterate(dataset.train_ds))
"""


def test_a_hung_read_is_named_and_ends_the_process(tmp_path):
  process = subprocess.run(
    [sys.executable, '-c', HANGS, str(tmp_path)], capture_output=True, text=True, timeout=60
  )
  assert process.returncode == 4, process.stderr
  lines = process.stderr.splitlines()
  assert re.fullmatch(r'nothing has moved for 0\.\d+ s: waiting for the batch of step 1', lines[0])
  name = re.escape(str(tmp_path / 'train' / 'dog' / '2.png'))
  assert re.fullmatch(rf'  training image \d \({name}\), for \d s', lines[1])
  (end,) = (line for line in lines if 'the process ends with status 4' in line)
  assert 'longer than hang_limit_seconds 1' in end
  stacks = process.stderr[process.stderr.index(end) :]
  assert (
    'in read_file' in stacks and 'in iterate' in stacks
  )  # Of the reader and of the main thread.


STOPPED = """
import sys, time
from losa_scenic.train_lib.watchdog import Watchdog
dog = Watchdog(print, 1.5, 1.5)
dog.doing('step 1 on the devices')
print('ready', flush=True)
for _ in range(5):
  time.sleep(0.1)  # It is stopped in the first.
dog.close()
"""


def test_a_stopped_process_did_not_hang():
  root = pathlib.Path(__file__).parents[2]
  process = subprocess.Popen(
    [sys.executable, '-c', STOPPED], stdout=subprocess.PIPE, text=True, cwd=root
  )
  assert process.stdout.readline() == 'ready\n'
  os.kill(process.pid, signal.SIGSTOP)
  time.sleep(2)
  os.kill(process.pid, signal.SIGCONT)
  assert process.communicate(timeout=20)[0] == '' and process.returncode == 0
