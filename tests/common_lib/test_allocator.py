"""Large buffers are not faulted in again for every step."""

import os
import subprocess
import sys

import pytest

# 64 MB made and freed on another thread, as XLA does it, a few times.
FAULTS = """
import resource, threading
import numpy as np
from losa_scenic.common_lib import allocator
done = allocator.keep_memory()
def step():
  np.ones(2**24, np.float32)
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


def measured(**variables):
  environment = {k: v for k, v in os.environ.items() if not k.startswith(('GLIBC_', 'MALLOC_'))}
  environment |= {'JAX_PLATFORMS': 'cpu', **variables}
  done = subprocess.run(
    [sys.executable, '-c', FAULTS], env=environment, capture_output=True, text=True, check=True
  )
  kept, faults = done.stdout.split()
  return kept == 'True', int(faults)


@pytest.mark.skipif(sys.platform != 'linux', reason='for the GNU C library')
def test_pages_stay():
  kept, faults = measured()
  without, others = measured(MALLOC_PERTURB_='0')  # The user has chosen: it is left alone.
  assert kept and not without
  assert faults < others / 20


def test_accelerators_are_left_alone():
  kept, _ = measured(JAX_PLATFORMS='cuda,cpu')
  assert not kept
