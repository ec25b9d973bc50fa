"""Rows of the table of training speed in processes of their own: memory, and limits of time.

python -m losa_scenic.bench_lib.speed_process peak ROW SETTING
python -m losa_scenic.bench_lib.speed_process plan ROW SETTING GPU

with the setting as JSON; prints a JSON object. A process starts with no memory used, so its peak is
that of its row alone; it can be ended when it takes too long; and what it compiles is found again
by the process that measures speed.
"""

import concurrent.futures
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax

from losa_scenic.bench_lib import (
  gpu_memory,
  gpu_targets,
  peers,
  plan_step,
  speed_rows,
  train_speed,
)
from losa_scenic.bench_lib.speed_rows import Setting
from losa_scenic.common_lib import allocator, errors
from losa_scenic.train_lib import memory

_MEBI = 2**20
_GIBI = 2**30


class Peak(NamedTuple):
  """What a row took of memory.

  Attributes:
    bytes: the most at any time: of the GPU, or on a CPU what the process held (PyTorch, JAX and
      their libraries are in it).
    before: the most before the first step. Where it is no less, the peak is that of initialisation.
  """

  bytes: int
  before: int

  def text(self) -> str:
    """In MiB, marked where a step may take less."""
    return f'{"at most " if self.before >= self.bytes else ""}{self.bytes / _MEBI:,.0f}'


def peaks(
  names: Sequence[str], setting: Setting, failed: dict[str, str], row_limit: float, deadline: float
) -> dict[str, Peak]:
  """Peak memory of rows. On a GPU, those of other libraries are prepared beside this package's.

  Args:
    names: keys of `train_speed.ROWS`.
    setting: what all rows have in common.
    failed: gets the reasons of rows that fail.
    row_limit: seconds after which a row is ended.
    deadline: a time of `time.monotonic` after which none begins, and all end.
  """
  found: dict[str, Peak] = {}

  def lane(own: Sequence[str]) -> None:
    for name in own:
      result = _call(['peak', name, _text(setting)], min(row_limit, deadline - time.monotonic()))
      if isinstance(result, str):
        failed[name] = result
      else:
        found[name] = Peak(result['bytes'], result['before'])

  others = [name for name in names if train_speed.ROWS[name].library]
  own = [name for name in names if name not in others]
  lanes = [own, others] if setting.device == 'gpu' else [names]
  with concurrent.futures.ThreadPoolExecutor(len(lanes)) as pool:
    list(pool.map(lane, lanes))
  return found


def plans(names: Sequence[str], setting: Setting, deadline: float) -> dict[str, int]:
  """Bytes that rows take by XLA's plan for this GPU; {} if there is no plan for its kind.

  Args:
    names: keys of `train_speed.ROWS`; those that are no train steps of this package have no plan.
    setting: what all rows have in common.
    deadline: a time of `time.monotonic` after which none begins, and all end.
  """
  kind = jax.devices()[0].device_kind
  targets = [name for name, gpu in gpu_targets.TARGETS.items() if gpu.kind == kind]
  found = {}
  for name in names if targets else ():
    if train_speed.ROWS[name].fields is not None:
      arguments = ['plan', name, _text(setting), targets[0]]
      result = _call(arguments, deadline - time.monotonic(), JAX_PLATFORMS='cpu')
      if not isinstance(result, str):
        found[name] = result['bytes']
  return found


def _text(setting: Setting) -> str:
  return json.dumps(dataclasses.asdict(setting))


def _call(arguments: Sequence[str], limit: float, **variables: str) -> Mapping[str, int] | str:
  """What a process of its own prints, or why it failed."""
  if limit <= 0:
    return 'no time was left for it'
  command = [sys.executable, '-m', 'losa_scenic.bench_lib.speed_process', *arguments]
  environment = {**os.environ, 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false', **variables}
  seconds = None if math.isinf(limit) else limit
  try:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
  except subprocess.TimeoutExpired:
    return f'not ready after {limit:.3g} s'
  lines = done.stdout.splitlines()
  if done.returncode or not lines:
    ending = done.stderr.strip().splitlines()[-1:] or [f'exit code {done.returncode}']
    return train_speed.reason(RuntimeError(ending[0]))
  result = json.loads(lines[-1])
  return result.get('failed') or result


def main(arguments: Sequence[str]) -> None:
  """Does one row; prints {'bytes', ..}, or {'failed': reason}."""
  what, name, text, *rest = arguments
  setting = Setting(**json.loads(text))
  result: Mapping[str, int | str]
  try:
    result = _peak(name, setting) if what == 'peak' else _plan(name, setting, *rest)
  except Exception as e:
    result = {'failed': train_speed.reason(e)}
  print(json.dumps(result))


def _peak(name: str, setting: Setting) -> dict[str, int]:
  row = train_speed.ROWS[name]
  run = row.make(setting)
  before = _used(row.library, setting.device)
  for _ in range(2):
    run(1)
  return {'bytes': _used(row.library, setting.device), 'before': before}


def _used(library: str, device: str) -> int:
  """The most memory that this process has used; PyTorch begins anew with each call."""
  if device == 'cpu':
    return int(memory.peak_host_gb() * _GIBI)
  if not library:
    return int((memory.peak_device_gb() or 0) * _GIBI)
  cuda = peers.library('torch').cuda
  used = cuda.max_memory_allocated()
  cuda.reset_peak_memory_stats()
  return used


def _plan(name: str, setting: Setting, target: str) -> dict[str, int]:
  fields = train_speed.ROWS[name].fields
  if fields is None:
    raise errors.UserError(f'{name} is no train step of this package.')
  step = plan_step.of_config(speed_rows.config_of(setting, fields), setting.num_classes)
  return {'bytes': gpu_memory.of_step(step, target).total}


if __name__ == '__main__':
  allocator.keep_memory()  # As in runs.
  main(sys.argv[1:])
