"""Runs of several processes on this machine, as a cluster would start them."""

import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).parents[2]


def free_port() -> int:
  """A port that nobody listens on."""
  with socket.socket() as s:
    s.bind(('localhost', 0))
    return s.getsockname()[1]


class Group:
  """The processes of one run; what each prints is in `<log>.<number>`."""

  def __init__(
    self,
    arguments: Sequence[str],
    *,
    count: int,
    devices: int,
    log: pathlib.Path,
    cache: pathlib.Path,
    launcher: Sequence[str] = (sys.executable, '-m', 'losa_scenic.main'),
    environments: Sequence[dict[str, str]] | None = None,
  ):
    """Starts them.

    Args:
      arguments: of the program.
      count: of processes; one is started as people start one.
      devices: of each.
      log: where output goes.
      cache: of compiled programs.
      launcher: the program.
      environments: what is said to each through variables, in the place of flags.
    """
    self._log, port = log, free_port()
    self.processes = []
    for i in range(count):
      flags = []
      if count > 1 and environments is None:
        flags = [f'--coordinator_address=localhost:{port}', f'--num_processes={count}']
        flags += [f'--process_id={i}']
      environment = {k: v for k, v in os.environ.items() if not k.startswith(('JAX_', 'XLA_'))}
      environment |= {
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
        'JAX_COMPILATION_CACHE_DIR': str(cache),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
        'PYTHONPATH': str(ROOT),
      }
      if environments is not None:
        environment |= {k: v.format(port=port) for k, v in environments[i].items()}
      with pathlib.Path(f'{log}.{i}').open('ab') as file:
        self.processes.append(
          subprocess.Popen(
            [*launcher, *arguments, *flags], env=environment, cwd=ROOT, stdout=file, stderr=file
          )
        )

  def wait(self, seconds: float = 120) -> list[int]:
    """The exit statuses of all; kills them if one takes too long."""
    try:
      return [process.wait(seconds) for process in self.processes]
    finally:
      for process in self.processes:
        process.kill()

  def printed(self) -> str:
    """What all have printed."""
    texts = [pathlib.Path(f'{self._log}.{i}').read_text() for i in range(len(self.processes))]
    return '\n'.join(f'--- process {i}\n{text}' for i, text in enumerate(texts))
