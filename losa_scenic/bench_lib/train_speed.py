"""How fast steps of training are, next to the forward pass and to timm and peft.

All rows are measured in one process, some steps of each in turn, after two calls that are not
timed. Every round so gives a ratio of any two rows, whatever else the machine was doing then; a
ratio is the median of those of the rounds. The other libraries get images that are normalised
already, this package's steps the bytes of the images; its train step also computes the norms and
metrics that a run logs.
"""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from losa_scenic.bench_lib import peers
from losa_scenic.bench_lib.speed_rows import OWN, Row, Run, Setting
from losa_scenic.common_lib import errors

ROWS: dict[str, Row] = {**peers.PEERS, **OWN}
# What speeds are compared to, where it is measured.
REFERENCES = ('forward', 'timm_forward', 'peft_lora32', 'timm_full')
# Long enough for a clock, and for a GPU to reach its pace; most steps on CPUs take longer.
LEAST_SECONDS = 0.3
# PyTorch's threads spin for a moment after their work.
_SETTLE_SECONDS = 0.05


class Timing(NamedTuple):
  """What was measured of one row.

  Attributes:
    wall: seconds of a step, of each round.
    cpu: the same in CPU time of all threads of the process.
  """

  wall: list[float]
  cpu: list[float]


def prepare(name: str, setting: Setting) -> tuple[Run, int]:
  """Compiles a row and calls it twice.

  Args:
    name: a key of `ROWS`.
    setting: what all rows have in common.

  Returns:
    What runs it, and how many steps take `LEAST_SECONDS`.
  """
  run = ROWS[name].make(setting)
  run(1)
  start = time.perf_counter()
  run(1)
  return run, math.ceil(LEAST_SECONDS / (time.perf_counter() - start))


def measure(
  runs: Mapping[str, tuple[Run, int]],
  rounds: int,
  failed: dict[str, str],
  deadline: float = math.inf,
) -> dict[str, Timing]:
  """Times every row in turn, round after round.

  Args:
    runs: as `prepare` returns them, by name.
    rounds: how many.
    failed: gets the reasons of rows that fail on the way, such as a lack of memory; they are left
      out then.
    deadline: a time of `time.monotonic` before which rounds end, at the pace of the first one.
  """
  timings = {name: Timing([], []) for name in runs}
  start = time.monotonic()
  for number in range(rounds):
    now = time.monotonic()
    if number and now + (now - start) / number > deadline:
      break
    names = [name for name in timings if name not in failed]
    first = number % max(1, len(names))  # So that none always follows the same other one.
    for name in names[first:] + names[:first]:
      run, steps = runs[name]
      time.sleep(_SETTLE_SECONDS)
      try:
        wall, cpu = time.perf_counter(), time.process_time()
        run(steps)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
      except Exception as e:
        failed[name] = reason(e)
        continue
      timings[name].wall.append(wall / steps)
      timings[name].cpu.append(cpu / steps)
  return {name: timing for name, timing in timings.items() if name not in failed}


def reason(error: Exception) -> str:
  """Why a row failed, on one line."""
  text = ' '.join(str(error).split()) or type(error).__name__
  if isinstance(error, MemoryError) or 'out of memory' in text.lower():
    return 'out of memory'
  return 'out of memory' if 'RESOURCE_EXHAUSTED' in text else text[:200]


def ratio(timings: Mapping[str, Timing], row: str, reference: str, clock: str) -> float | None:
  """How many times as fast as another row it is: the median over the rounds.

  Args:
    timings: what was measured.
    row: a key of it.
    reference: another one.
    clock: 'wall' or 'cpu'.

  Returns:
    None if one of them was not measured.
  """
  if row not in timings or reference not in timings:
    return None
  own, other = getattr(timings[row], clock), getattr(timings[reference], clock)
  return statistics.median(b / a for a, b in zip(own, other, strict=True))


def select(rows: str, device: str) -> tuple[list[str], dict[str, str]]:
  """The rows that can be measured, and why others cannot.

  Args:
    rows: names joined by commas, 'default' or 'all'.
    device: one of `speed_rows.DEVICES`.

  Raises:
    errors.UserError: for an unknown name, or one that is given twice.
  """
  if rows in ('default', 'all'):
    chosen = [name for name, row in ROWS.items() if rows == 'all' or row.default]
  else:
    chosen = [errors.one_of('row', name, ROWS) for name in rows.split(',')]
  if len(set(chosen)) < len(chosen):
    raise errors.UserError(f'--rows names a row twice: {rows}.')
  needed = dict.fromkeys(ROWS[name].library for name in chosen if ROWS[name].library)
  lacks = {library: peers.lack(library, device) for library in needed}
  missing = {
    name: f'{ROWS[name].library}: {lacks[ROWS[name].library]}'
    for name in chosen
    if lacks.get(ROWS[name].library)
  }
  return [name for name in chosen if name not in missing], missing


def prepare_all(
  names: Sequence[str],
  setting: Setting,
  failed: dict[str, str],
  deadline: float = math.inf,
) -> dict[str, tuple[Run, int]]:
  """`prepare` of rows that begin before a deadline.

  Args:
    names: keys of `ROWS`.
    setting: what all rows have in common.
    failed: gets the reasons of rows that fail, such as a lack of memory.
    deadline: a time of `time.monotonic`.

  Raises:
    errors.UserError: of a row that cannot be, whatever the machine.
  """
  runs = {}
  for name in names:
    if time.monotonic() > deadline:
      failed[name] = 'no time was left for it'
      continue
    try:
      runs[name] = prepare(name, setting)
    except errors.UserError:
      raise
    except Exception as e:
      failed[name] = reason(e)
  return runs
