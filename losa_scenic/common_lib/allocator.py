"""Memory that the C library keeps for the process instead of giving it back between steps.

For each step XLA allocates one large buffer. The GNU C library asks the kernel for it each time and
returns it each time, so that every page of it is faulted in and cleared again: of a ViT-B/16 step
on cached features 29,000 pages, a third of the CPU time. And the pages are small, so that finding
them takes time: large ones made steps with LoSA up to a twentieth quicker.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import platform

import jax

# Of <malloc.h>.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_NEVER = -1  # the library's name for it
_MADV_HUGEPAGE = 14  # of <sys/mman.h>, on Linux


def keep_memory() -> bool:
  """Lets the process keep what it has freed, from now on, in large pages where there are any.

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
  library = ctypes.CDLL(None)
  options = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER))
  done = all(library.mallopt(option, value) for option, value in options)
  if done:
    _enlarge_pages(library)
  return done


def _enlarge_pages(library: ctypes.CDLL) -> None:
  """Asks for large pages where the library will take memory from.

  Addresses are reserved for as much as half of the machine has, so that what is asked holds for
  all of them; pages come when they are used. Where the system refuses either, pages stay small.
  """
  library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
  library.free.argtypes = [ctypes.c_void_p]
  library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
  page = os.sysconf('SC_PAGE_SIZE')
  size = os.sysconf('SC_PHYS_PAGES') * page // 2
  start = library.malloc(size)
  if start:
    first = -(-start // page) * page
    library.madvise(first, start + size - first, _MADV_HUGEPAGE)
    library.free(start)


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
