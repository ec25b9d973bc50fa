"""Large buffers are not faulted in again for every step."""

import os
import pathlib
import subprocess
import sys

import pytest

LARGE_PAGES = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')

# 64 MB made and freed on another thread, as XLA does it, a few times.
FAULTS = """
import resource, threading
from losa_scenic.common_lib import allocator
done = allocator.keep_memory()
def step():
  bytearray(b'1') * 2**26
def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  for _ in range(4):
    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(done, faults())
"""

# 256 MB, and how many MB of the process are in large pages.
LARGE = """
from losa_scenic.common_lib import allocator
allocator.keep_memory()
ones = bytearray(b'1') * 2**28  # NumPy would ask for large pages itself.
lines = open('/proc/self/smaps_rollup').read().splitlines()
print(*(int(line.split()[1]) // 1024 for line in lines if line.startswith('AnonHugePages')))
"""


def printed(program, **variables):
  environment = {k: v for k, v in os.environ.items() if not k.startswith(('GLIBC_', 'MALLOC_'))}
  environment |= {'JAX_PLATFORMS': 'cpu', **variables}
  done = subprocess.run(
    [sys.executable, '-c', program], env=environment, capture_output=True, text=True, check=True
  )
  return done.stdout.split()


def measured(**variables):
  kept, faults = printed(FAULTS, **variables)
  return kept == 'True', int(faults)


@pytest.mark.skipif(sys.platform != 'linux', reason='for the GNU C library')
def test_pages_stay():
  kept, faults = measured()
  without, others = measured(MALLOC_PERTURB_='0')  # The user has chosen: it is left alone.
  assert kept and not without
  assert faults < others / 20


@pytest.mark.skipif(sys.platform != 'linux', reason='for the GNU C library')
def test_pages_are_large():
  if not LARGE_PAGES.exists() or '[never]' in LARGE_PAGES.read_text():
    pytest.skip('the kernel gives no large pages')
  (megabytes,) = printed(LARGE)
  if '[always]' not in LARGE_PAGES.read_text():
    (others,) = printed(LARGE, MALLOC_PERTURB_='0')
    assert int(others) < 64
  assert int(megabytes) >= 192


def test_accelerators_are_left_alone():
  kept, _ = measured(JAX_PLATFORMS='cuda,cpu')
  assert not kept
