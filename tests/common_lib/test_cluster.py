"""Which environments make a process one of several, and what is missing to join the others."""

import sys

import pytest
from faults.processes import Group

from losa_scenic.common_lib import cluster, errors

SLURM = {
  'SLURM_JOB_ID': '77',
  'SLURM_STEP_NODELIST': 'localhost',
  'SLURM_NTASKS': '2',
  'SLURM_LOCALID': '0',
}


@pytest.mark.parametrize(
  'environment,want',
  [
    ({}, None),
    ({'SLURM_JOB_ID': '77', 'SLURM_NTASKS': '4'}, None),  # A shell in an allocation.
    (SLURM | {'SLURM_NTASKS': '1'}, None),
    (SLURM, 'SLURM'),
    ({'OMPI_COMM_WORLD_SIZE': '1'}, None),
    ({'OMPI_COMM_WORLD_SIZE': '2'}, 'Open MPI'),
    ({'JAX_COORDINATOR_ADDRESS': 'a:1'}, 'JAX'),
    ({'KUBERNETES_SERVICE_HOST': '10.0.0.1'}, None),
  ],
)
def test_launchers(environment, want):
  assert cluster.launcher(environment) == want


def test_alone_nothing_is_joined():
  cluster.join(environment={})


@pytest.mark.parametrize(
  'given,environment,parts',
  [
    (('h:1', None, None), {}, ('--num_processes, --process_id',)),
    ((None, 2, 0), {}, ('--coordinator_address',)),
    (('h:1', 2, 2), {}, ('process_id 2', '0 ... 1')),
    (('h', 2, 1), {}, ("HOST:PORT, not 'h'",)),
    ((None, None, None), {'JAX_COORDINATOR_ADDRESS': 'h:1'}, ('--num_processes',)),
    (
      ('h:1', None, None),
      {'JAX_NUM_PROCESSES': 'two', 'JAX_PROCESS_ID': '0'},
      ("JAX_NUM_PROCESSES must be a number, not 'two'",),
    ),
  ],
)
def test_what_is_missing_or_wrong_is_said(given, environment, parts):
  with pytest.raises(errors.UserError) as e:
    cluster.join(*given, environment=environment)
  for part in parts:
    assert part in str(e.value)


# Joins as the command line does, and says who it is.
PROGRAM = (
  'import jax\n'
  'from losa_scenic.common_lib import cluster, hosts\n'
  'cluster.join()\n'
  'print("joined", hosts.gather(jax.process_index()), hosts.on_first(jax.process_index))\n'
)


@pytest.mark.parametrize(
  'shared,number',
  [
    (SLURM | {'JAX_COORDINATOR_PORT': '{port}'}, 'SLURM_PROCID'),
    (
      {
        'OMPI_MCA_orte_hnp_uri': '1531576320.0;tcp://127.0.0.1:34911',
        'OMPI_COMM_WORLD_SIZE': '2',
        'OMPI_COMM_WORLD_LOCAL_RANK': '0',
        'JAX_COORDINATOR_PORT': '{port}',
      },
      'OMPI_COMM_WORLD_RANK',
    ),
    (
      {'JAX_COORDINATOR_ADDRESS': 'localhost:{port}', 'JAX_NUM_PROCESSES': '2'},
      'JOB_COMPLETION_INDEX',
    ),
  ],
  ids=['SLURM', 'Open MPI', 'Kubernetes'],
)
def test_processes_find_each_other(shared, number, tmp_path):
  group = Group(
    ['-c', PROGRAM],
    count=2,
    devices=1,
    log=tmp_path / 'log',
    cache=tmp_path / 'cache',
    launcher=(sys.executable,),
    environments=[shared | {number: str(i)} for i in range(2)],
  )
  assert group.wait(60) == [0, 0], group.printed()
  assert group.printed().count('joined [0, 1] 0') == 2
