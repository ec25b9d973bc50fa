"""Saves onto a disk that is full, or that turns read-only: real ones, mounted for the test."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).parents[1]
# Runs in a mount namespace of its own: nobody else sees the mounts, which end with it.
PROGRAM = """
import json, os, pathlib, subprocess, sys
sys.path.insert(0, sys.argv[2])
from reference.run_states import assert_same, names, opened, save, state
from losa_scenic.common_lib import errors

place = pathlib.Path(sys.argv[1])

def failed(attempt):
  try:
    attempt()
  except errors.UserError as e:
    return str(e)
  return 'nothing'

def mount(*arguments):
  subprocess.run(['mount', *arguments, str(place)], check=True)

def save_more(*steps):
  saver = opened(place)
  for step in steps:
    saver.save(state(step))
  saver.close()

def fill(name, free):
  ballast = place / 'ballast'
  with open(ballast, 'wb', buffering=0) as file:
    system = os.statvfs(place)
    file.write(bytes((system.f_bavail - free) * system.f_frsize))
  told[name] = failed(lambda: save_more(3, 4))
  assert names(place) == ['1', '2'], (name, names(place))
  assert_same(opened(place).restore(state(0))[0], state(2))
  ballast.unlink()

mount('-t', 'tmpfs', '-o', 'size=1m', 'none')
save(place, 1)
save(place, 2)
told = {}
block = os.statvfs(place).f_frsize
needed = sum(-(-file.stat().st_size // block) for file in place.glob('checkpoints/last/2/*'))
for name, free in (('none', 0), ('one', 1), ('half', needed // 2), ('all but one', needed - 1)):
  fill(name, free)
saver = opened(place)
mount('-o', 'remount,ro')
saver.save(state(3))
told['read-only'] = failed(saver.close)
assert names(place) == ['1', '2'], names(place)
mount('-o', 'remount,rw')
save(place, 3)
assert_same(opened(place).restore(state(0))[0], state(3))
print(json.dumps(told))
"""


@pytest.fixture(scope='module')
def told(tmp_path_factory) -> dict[str, str]:
  """What the user is told, by the kind of disk."""
  place = tmp_path_factory.mktemp('disk')
  apart = ['unshare', '-m'] if os.geteuid() == 0 else ['unshare', '-Urm']
  try:
    probe = subprocess.run([*apart, 'mount', '-t', 'tmpfs', 'none', str(place)])
  except FileNotFoundError:
    pytest.skip('needs unshare and mount (Linux)')
  if probe.returncode:
    pytest.skip('mounting a tmpfs is not allowed here')
  ran = subprocess.run(
    [*apart, sys.executable, '-c', PROGRAM, str(place), str(TESTS)],
    env=os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(TESTS.parent)},
    capture_output=True,
    text=True,
  )
  assert ran.returncode == 0, ran.stderr
  return {'place': str(place), 'stderr': ran.stderr} | json.loads(ran.stdout)


# Blocks that are left, of those that a checkpoint needs: it ends at another point each time.
@pytest.mark.parametrize('free', ['none', 'one', 'half', 'all but one'])
def test_a_full_disk_is_told_and_what_was_there_stays(told, free):
  start = f'Cannot save checkpoint {told["place"]}/checkpoints/last/3: No space left on device'
  assert told[free].startswith(start), told[free]
  assert told[free].endswith('The newest checkpoint is that of step 2.')


def test_a_read_only_disk_is_told(told):
  assert 'checkpoints/last/3: Read-only file system' in told['read-only']
  assert told['read-only'].endswith('The newest checkpoint is that of step 2.')


def test_nothing_else_is_printed(told):
  assert told['stderr'] == ''
