"""`python -m losa_scenic.bench run`: the table of training speed, in markdown or JSON."""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax

from losa_scenic.bench_lib import speed_process, train_speed
from losa_scenic.bench_lib.speed_process import Peak
from losa_scenic.bench_lib.speed_request import WANTED, WANTED_SPEEDS, Request, cores
from losa_scenic.bench_lib.speed_rows import Setting
from losa_scenic.bench_lib.train_speed import REFERENCES, ROWS, Timing

# How far a plan of memory may be off.
_PLAN_ERROR = 0.05
# Of the time limit, the part that may go by before speed is measured.
_MEMORY_SHARE = 0.6
_MEBI = 2**20
_PACKAGES = ('jax', 'torch', 'timm', 'peft')


def report(preset: str | None, given: Mapping[str, Any], as_json: bool = False) -> Iterator[str]:
  """Measures and says so, in markdown or as one JSON object.

  Args:
    preset: a key of `speed_request.PRESETS`, or None.
    given: fields of `speed_request.Request`, None where they are not given.
    as_json: the latter.

  Yields:
    Paragraphs, each as soon as it is known.

  Raises:
    errors.UserError: for mistakes in the options.
  """
  start = time.monotonic()
  request = Request.of(preset, given)
  setting, deadline = request.setting(), start + request.time_limit
  names, failed = train_speed.select(request.rows, setting.device)
  peaks: dict[str, Peak] = {}
  plans: dict[str, int] = {}
  with _kept_programs() if request.memory else contextlib.nullcontext():
    if request.memory:
      early = start + _MEMORY_SHARE * request.time_limit
      with concurrent.futures.ThreadPoolExecutor(1) as pool:
        planned = pool.submit(speed_process.plans, names, setting, early)
        peaks = speed_process.peaks(names, setting, failed, request.row_limit, early)
        plans = planned.result()
      names = [name for name in names if name in peaks]
      if peaks and not as_json:
        yield memory_table(setting, peaks, plans)
    runs = train_speed.prepare_all(names, setting, failed, deadline)
    timings = train_speed.measure(runs, request.rounds, failed, deadline)
  facts = environment(setting)
  if as_json:
    yield as_object(setting, facts, timings, failed, peaks, plans)
    return
  rounds = len(next(iter(timings.values())).wall) if timings else 0
  yield '  \n'.join([*facts, *(f'Left out: {ROWS[n].title}: {why}.' for n, why in failed.items())])
  yield table(setting, timings, f'{rounds} of {request.rounds} rounds')
  wanted = comparison(preset, setting, timings) if preset and request.is_preset(preset) else ''
  if wanted:
    yield wanted


@contextlib.contextmanager
def _kept_programs() -> Iterator[None]:
  """Compiled programs are kept for processes that begin inside the context, and for this one."""
  names = ('JAX_COMPILATION_CACHE_DIR', 'TORCHINDUCTOR_CACHE_DIR')
  before = {name: os.environ.get(name) for name in names}
  with tempfile.TemporaryDirectory() as folder:
    os.environ |= dict.fromkeys(names, folder)
    jax.config.update('jax_compilation_cache_dir', folder)
    try:
      yield
    finally:
      jax.config.update('jax_compilation_cache_dir', before[names[0]])
      for name, value in before.items():
        os.environ.pop(name)
        os.environ |= {name: value} if value is not None else {}


def environment(setting: Setting) -> list[str]:
  """The machine, the versions and the threads, a line each."""
  kind = jax.devices()[0].device_kind
  if setting.device == 'cpu':
    kind = _cpu_model()
  found = []
  for package in _PACKAGES:
    with contextlib.suppress(metadata.PackageNotFoundError):
      found.append(f'{package} {metadata.version(package)}')
  own = _xla_threads()
  threads = f'cores: {cores()}; threads of XLA: {"unknown" if own is None else own}'
  if 'torch' in sys.modules:
    threads += f', of PyTorch: {sys.modules["torch"].get_num_threads()}'
    threads += f'; torch.compile: {setting.torch_compile}'
  return [kind, ', '.join(found), threads]


def _cpu_model() -> str:
  with contextlib.suppress(OSError):
    for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines():
      if line.startswith('model name'):
        return line.partition(':')[2].strip()
  return platform.processor() or platform.machine()


def _xla_threads() -> int | None:
  """Threads in which XLA computes products on a CPU; None where they cannot be counted."""
  try:
    names = [p.read_text().strip() for p in pathlib.Path('/proc/self/task').glob('*/comm')]
  except OSError:
    return None
  return sum(name == 'tf_XLAEigen' for name in names) or None


def memory_table(setting: Setting, peaks: Mapping[str, Peak], plans: Mapping[str, int]) -> str:
  """Markdown: the peak of each row, in a process of its own, and how it compares to a plan."""
  what = 'of the GPU' if setting.device == 'gpu' else 'of the process, libraries included'
  lines = [
    f'**Peak memory {what}, MiB; {_described(setting)}**',
    '',
    '| row | peak | plan | peak / plan |',
    '| --- | ---: | ---: | ---: |',
  ]
  for name, peak in peaks.items():
    cells = [ROWS[name].title, peak.text(), '', '']
    if name in plans:
      share = peak.bytes / plans[name]
      near = 'as planned' if abs(share - 1) <= _PLAN_ERROR else 'off'
      cells[2:] = f'{plans[name] / _MEBI:,.0f}', f'{share:.2f} ({near})'
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines)


def table(setting: Setting, timings: Mapping[str, Timing], rounds: str) -> str:
  """Markdown: medians; in brackets the quartiles; ratios of speed in wall and in CPU time."""
  references = [name for name in REFERENCES if name in timings]
  heads = [f'x {ROWS[name].title}' for name in references]
  columns = ['row', 'ms / image', 'CPU ms / image', 'images / s', *heads]
  lines = [
    f'**{_described(setting)}; {rounds}; ratios: wall / CPU time**',
    '',
    f'| {" | ".join(columns)} |',
    f'| --- |{" ---: |" * (len(columns) - 1)}',
  ]
  for name, timing in timings.items():
    wall, cpu = (_spread(times, setting.batch_size) for times in timing)
    speed = setting.batch_size / statistics.median(timing.wall)
    ratios = [_both(timings, name, other) for other in references]
    lines.append(f'| {" | ".join([ROWS[name].title, wall, cpu, _short(speed), *ratios])} |')
  return '\n'.join(lines)


def comparison(preset: str, setting: Setting, timings: Mapping[str, Timing]) -> str:
  """Markdown: the speeds that a preset wants of rows that were measured; '' if there are none."""
  lines = [
    f'| {ROWS[row].title} | {ROWS[other].title} | {_both(timings, row, other)} | {least:.2f} |'
    for where, row, other, least in WANTED
    if where == preset and row in timings and other in timings
  ]
  for where, row, least in WANTED_SPEEDS:
    if where == preset and row in timings:
      speed = setting.batch_size / statistics.median(timings[row].wall)
      lines.append(f'| {ROWS[row].title} | one image a second | {_short(speed)} | {least:.0f} |')
  head = ['| row | times as fast as | wall / CPU | wanted |', '| --- | --- | ---: | ---: |']
  return '\n'.join([*head, *lines]) if lines else ''


def as_object(
  setting: Setting,
  facts: Sequence[str],
  timings: Mapping[str, Timing],
  failed: Mapping[str, str],
  peaks: Mapping[str, Peak],
  plans: Mapping[str, int],
) -> str:
  """All of it as one JSON object: seconds of a step of every round, bytes."""
  rows = {}
  for name in dict.fromkeys([*timings, *peaks, *failed]):
    row: dict[str, Any] = {'title': ROWS[name].title}
    if name in timings:
      row |= {'wall_seconds': timings[name].wall, 'cpu_seconds': timings[name].cpu}
    if name in peaks:
      row |= {'peak_bytes': peaks[name].bytes, 'peak_bytes_before': peaks[name].before}
    row |= {'planned_bytes': plans[name]} if name in plans else {}
    row |= {'failed': failed[name]} if name in failed else {}
    rows[name] = row
  return json.dumps({'setting': dataclasses.asdict(setting), 'machine': facts, 'rows': rows})


def _described(setting: Setting) -> str:
  spec = setting.spec
  return (
    f'{setting.backbone}, {spec.image_size} px, batch {setting.batch_size}, {setting.dtype}, '
    f'{setting.num_classes} classes'
  )


def _both(timings: Mapping[str, Timing], row: str, other: str) -> str:
  ratios = (train_speed.ratio(timings, row, other, clock) for clock in ('wall', 'cpu'))
  return ' / '.join('' if r is None else f'{r:.3f}' if r < 2 else f'{r:.2f}' for r in ratios)


def _spread(seconds: Sequence[float], images: int) -> str:
  """Median and quartiles, in ms an image."""
  quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
  low, _, high = (_short(1000 * q / images) for q in quartiles)
  return f'{_short(1000 * statistics.median(seconds) / images)} ({low} to {high})'


def _short(value: float) -> str:
  return f'{value:.0f}' if value >= 1000 else f'{value:.3g}'
