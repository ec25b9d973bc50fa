"""Memory that a run holds. A GB is 2**30 bytes here, as memory is sold."""

import os
import pathlib
import resource
import sys

import jax

_GB = 2**30


def host_gb() -> float | None:
  """What this process holds of the machine's memory now; None where it cannot be read."""
  try:
    pages = pathlib.Path('/proc/self/statm').read_text().split()[1]
    return int(pages) * os.sysconf('SC_PAGE_SIZE') / _GB
  except (OSError, ValueError, IndexError):
    return None


def peak_host_gb() -> float:
  """The most that this process has held of the machine's memory."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak * (1 if sys.platform == 'darwin' else 1024) / _GB


def peak_device_gb() -> float | None:
  """The most that this process has held of a device's memory, of the fullest of its devices.

  None where devices do not count it: a CPU, or a GPU with another allocator than JAX's own.
  """
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [s['peak_bytes_in_use'] for s in stats if 'peak_bytes_in_use' in s]
  return max(peaks) / _GB if peaks else None
