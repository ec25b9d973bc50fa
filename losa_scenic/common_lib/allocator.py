"""Memory that the C library keeps for the process instead of giving it back between steps.

For each step XLA allocates one large buffer. The GNU C library asks the kernel for it each time and
returns it each time, so that every page of it is faulted in and cleared again: of a ViT-B/16 step
on cached features 29,000 pages, a third of the CPU time.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import platform

import jax

# Of <malloc.h>.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_NEVER = 2**31 - 1


def keep_memory() -> bool:
  """Lets the process keep what it has freed, from now on.

  To be called before JAX has started its threads, which else have arenas of their own, where large
  buffers always go back. All threads then share one arena. So it is for runs on CPUs, and does
  nothing where JAX may use a GPU or TPU, without the GNU C library, or where the user has chosen
  how memory is allocated (GLIBC_TUNABLES, MALLOC_..., LD_PRELOAD).

  Returns:
    Whether it did anything.
  """
  chosen = [name for name in os.environ if name.startswith(('GLIBC_TUNABLES', 'MALLOC_'))]
  if chosen or os.environ.get('LD_PRELOAD') or platform.libc_ver()[0] != 'glibc' or not _on_cpu():
    return False
  set_option = ctypes.CDLL(None).mallopt
  options = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER))
  return all(set_option(option, value) for option, value in options)


def _on_cpu() -> bool:
  """Whether JAX will run on CPUs; it is not started to find out."""
  named = jax.config.jax_platforms
  if named:
    return named == 'cpu'
  return not (
    importlib.metadata.entry_points(group='jax_plugins')
    or importlib.util.find_spec('jax_plugins')
    or importlib.util.find_spec('libtpu')
  )
