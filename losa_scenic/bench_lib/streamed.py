"""What a streamed step does on a GPU that is not there: its memory, and when its transfers run.

XLA's plan for a program is a list of operations in the order in which they are started. From it one
reads whether the copy of a layer's weights out of the host's memory has the layer's products
between its start and its end, so that they hide it.
"""

import dataclasses
import itertools
import re
from typing import Any

from losa_scenic.bench_lib import gpu_memory, plan_step
from losa_scenic.bench_lib.plan_step import Memory
from losa_scenic.common_lib.types import Config

_HOST_SPACE = 'S(5)'  # XLA's number for pinned memory of the host.
_COMPUTATION = re.compile(r'(?:ENTRY )?(%[\w.-]+) \(.*\{$')
_OPERATION = re.compile(r'\s*(?:ROOT )?(%[\w.-]+) = (.*?)\s([a-z][\w-]*)\((%[\w.-]+)?')
_CALLED = re.compile(r'(?:calls|body|to_apply)=(%[\w.-]+)')


@dataclasses.dataclass(frozen=True)
class Visit:
  """A layer as scheduled: a pass through a loop's body, or what runs up to the next transfer.

  Attributes:
    transfers: copies out of the host's memory that start there.
    by_kernel: those of them that a kernel makes, which takes multiprocessors from the products; the
      others are made by the copy engine.
    hidden: 'product' and 'attention' in their order, those that start while a transfer runs.
    exposed: those that start while none does.
  """

  transfers: int
  by_kernel: int
  hidden: tuple[str, ...]
  exposed: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Streamed:
  """A compiled step.

  Attributes:
    memory: of one device.
    host: bytes of pinned host memory for each device.
    visits: see `visits`.
    text: the scheduled program.
  """

  memory: Memory
  host: int
  visits: tuple[Visit, ...]
  text: str

  def parts(self) -> dict[str, Any]:
    """All of it but the text, as JSON can hold it."""
    visits = [dataclasses.asdict(visit) for visit in self.visits]
    return {**self.memory.parts(), 'host': self.host, 'visits': visits}


def compile_run(config: Config, num_classes: int, target: str, devices: int = 1) -> Streamed:
  """Compiles the train step of a run for GPUs of one host.

  Args:
    config: as `run_config.resolve` returns it.
    num_classes: width of the classifier.
    target: a key of `gpu_targets.TARGETS`.
    devices: number of GPUs.

  Raises:
    errors.UserError: as `plan_step.of_config` and `gpu_memory.compile_step`.
  """
  step = plan_step.of_config(config, num_classes)
  compiled = gpu_memory.compile_step(step, target, devices)
  plan, text = compiled.memory_analysis(), compiled.as_text()
  host = plan.host_argument_size_in_bytes + plan.host_temp_size_in_bytes
  return Streamed(plan_step.memory_of(compiled), host, visits(text), text)


def visits(text: str) -> tuple[Visit, ...]:
  """What a scheduled program does around its reads of the host's memory, in the order of the text.

  Args:
    text: `jax.stages.Compiled.as_text()` of a program for a GPU.

  Returns:
    One visit a loop that reads the host's memory. If there is none: one a transfer, from its start
    to that of the next one; after the end of the last one comes what is no layer's.
  """
  computations = _computations(text)
  bodies = dict.fromkeys(re.findall(r' while\(.*body=(%[\w.-]+)', text))
  found = [_visit(computations[body], computations) for body in bodies]
  found = [visit for visit in found if visit.transfers]
  entry = re.search(r'^ENTRY (%[\w.-]+)', text, re.MULTILINE)
  if entry and not found:
    found = [_visit(lines, computations) for lines in _parts(computations[entry[1]])]
  return tuple(found)


def _parts(lines: list[str]) -> list[list[str]]:
  """The lines from each start of a transfer on; of the last one up to its end."""
  starts = [i for i, line in enumerate(lines) if _starts(line)]
  if not starts:
    return []
  name = _OPERATION.match(lines[starts[-1]])
  ends = (i for i, line in enumerate(lines) if name and f'-done({name[1]})' in line)
  cuts = [*starts, next(ends, len(lines)) + 1]
  return [lines[a:b] for a, b in itertools.pairwise(cuts)]


def _starts(line: str) -> bool:
  """Whether a transfer out of the host's memory starts here."""
  match = _OPERATION.match(line)
  return match is not None and match[3].endswith('-start') and _HOST_SPACE in match[2]


def _computations(text: str) -> dict[str, list[str]]:
  """{name: its lines in their order}."""
  found: dict[str, list[str]] = {}
  lines: list[str] = []
  for line in text.splitlines():
    if (match := _COMPUTATION.match(line)) is not None:
      lines = found.setdefault(match[1], [])
    elif line.startswith('  '):
      lines.append(line)
  return found


def _visit(lines: list[str], computations: dict[str, list[str]]) -> Visit:
  running: set[str] = set()
  transfers = by_kernel = 0
  hidden: list[str] = []
  exposed: list[str] = []
  for line in lines:
    match = _OPERATION.match(line)
    if match is None:
      continue
    name, _, operation, operand = match.groups()
    if _starts(line):
      running.add(name)
      transfers += 1
      # A fusion of this kind is a slice that is looked up and then copied as it is.
      by_kernel += operation == 'fusion-start' and 'kind=kCustom' not in line
    elif operation.endswith('-done'):
      running.discard(operand)
    else:
      (hidden if running else exposed).extend(_work(line, operation, computations))
  return Visit(transfers, by_kernel, tuple(hidden), tuple(exposed))


def _work(line: str, operation: str, computations: dict[str, list[str]]) -> list[str]:
  """What an operation computes of a layer: itself, or what it calls."""
  if operation == 'custom-call':
    target = re.search(r'custom_call_target="([^"]*)"', line)
    if target is not None and 'cudnn' in target[1]:
      return ['attention']
    return ['product'] if target is not None and 'cublas' in target[1] else []
  if operation in ('dot', 'convolution'):
    return ['product']
  found = []
  for called in _CALLED.findall(line):
    for inner in computations.get(called, ()):
      if (match := _OPERATION.match(inner)) is not None:
        found += _work(inner, match[3], computations)
  return found
