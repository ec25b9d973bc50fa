"""Joins the processes that one command was started in, on one machine or on many."""

import importlib.util
import os
import socket
import time
from collections.abc import Mapping

import jax

from losa_scenic.common_lib import errors

# Variables that hold the number of processes and this one's number: ours, those of SLURM, Open MPI
# and of indexed jobs of Kubernetes. The first that is set counts.
_COUNTS = ('JAX_NUM_PROCESSES', 'SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE')
_NUMBERS = ('JAX_PROCESS_ID', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK', 'JOB_COMPLETION_INDEX')
# Launchers of which JAX finds out everything else.
_MANAGED = ('SLURM', 'Open MPI', 'Kubernetes')
# `srun` sets it, and a shell inside an allocation does not have it.
_SLURM_STEP = 'SLURM_STEP_NODELIST'
# How long the first ones wait for the last one to start, and all for one that does not answer.
_START_SECONDS, _HEARTBEAT_SECONDS = 300, 100


def join(
  address: str | None = None,
  processes: int | None = None,
  number: int | None = None,
  environment: Mapping[str, str] = os.environ,
) -> None:
  """Makes this process one of several, if it is. Must come before the first use of a device.

  What is not given is looked up: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID,
  else what SLURM (`srun`), Open MPI (`mpirun`) or an indexed job of Kubernetes says.

  Args:
    address: 'HOST:PORT' of process 0.
    processes: how many there are.
    number: which one this is, from 0.
    environment: the process's.

  Raises:
    errors.UserError: if something is missing or wrong, or process 0 is not found. Where others do
      not come, JAX aborts the process.
  """
  found = launcher(environment)
  given = (address, processes, number)
  if given == (None, None, None) and found is None:
    return
  address = address or environment.get('JAX_COORDINATOR_ADDRESS')
  processes = _integer(environment, _COUNTS) if processes is None else processes
  number = _integer(environment, _NUMBERS) if number is None else number
  named = {'coordinator_address': address, 'num_processes': processes, 'process_id': number}
  missing = [f'--{name}' for name, value in named.items() if value is None]
  if missing and found not in _MANAGED:
    raise errors.UserError(
      f'This is one process of several, but nothing says {", ".join(missing)}.'
    )
  if number is not None and processes is not None and not 0 <= number < processes:
    raise errors.UserError(f'--process_id {number} must be in 0 ... {processes - 1}.')
  if address is not None and not address.rpartition(':')[2].isdigit():
    raise errors.UserError(f"--coordinator_address must be HOST:PORT, not '{address}'.")
  if address is not None and number != 0:
    _wait_for(address)
  # Its handler would take SIGTERM away from ours.
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(
      address,
      processes,
      number,
      initialization_timeout=_START_SECONDS,
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    )
  except (RuntimeError, ValueError) as e:
    line = str(e).splitlines()[0] if str(e) else type(e).__name__
    raise errors.UserError(
      f'Process {number} of {processes or "several"} cannot join the others'
      + (f' at {address}' if address else '')
      + f': {line}'
    ) from e


def _wait_for(address: str) -> None:
  """Waits until somebody listens there: JAX would abort the process without a word for people."""
  host, _, port = address.rpartition(':')
  end, problem = time.monotonic() + _START_SECONDS, 'nobody answers'
  while time.monotonic() < end:
    try:
      socket.create_connection((host.strip('[]'), int(port)), timeout=5).close()
      return
    except OSError as e:
      problem = e.strerror or str(e)
      time.sleep(0.2)
  raise errors.UserError(
    f'Process 0 was not found at {address} in {_START_SECONDS} s: {problem}. Start all processes '
    'at about the same time, and see that this port of its host can be reached.'
  )


def launcher(environment: Mapping[str, str]) -> str | None:
  """Who started this process as one of several; None if it is alone."""
  if environment.get('JAX_COORDINATOR_ADDRESS'):
    return 'JAX'
  if _SLURM_STEP in environment and int(environment.get('SLURM_NTASKS', 1)) > 1:
    return 'SLURM'
  if int(environment.get('OMPI_COMM_WORLD_SIZE', 1)) > 1:
    return 'Open MPI'
  # JAX asks the cluster through this package how many there are.
  in_job = {'JOB_COMPLETION_INDEX', 'KUBERNETES_SERVICE_HOST'} <= environment.keys()
  return 'Kubernetes' if in_job and importlib.util.find_spec('kubernetes') else None


def _integer(environment: Mapping[str, str], names: tuple[str, ...]) -> int | None:
  for name in names:
    text = environment.get(name)
    if text is not None:
      try:
        return int(text)
      except ValueError:
        raise errors.UserError(f'{name} must be a number, not {text!r}.') from None
  return None
