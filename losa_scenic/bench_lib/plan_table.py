"""A plan as text."""

from collections.abc import Iterator, Mapping
from typing import Any

from losa_scenic.bench_lib import plan_batch

_PARTS = {
  'frozen': 'frozen weights',
  'trainable': 'trained weights',
  'optimizer': "optimizer's state",
  'batch': 'batch',
  'other': 'counters and running means',
  'kept': 'kept for the backward pass, about',
  'workspace': 'workspace',
  'outputs': 'results',
  'total': 'total',
}
_WIDTH = 40


def text(plan: Mapping[str, Any]) -> str:
  """The text of what `planner.plan` returns, without a line break at its end."""
  return '\n'.join(_lines(plan))


def _lines(plan: Mapping[str, Any]) -> Iterator[str]:
  exact = plan['exact']
  yield f'{plan["devices"]} x {plan["device"]} ({plan["kind"]})'
  if exact:
    yield 'Compiled by XLA for that device, not run.'
  else:
    yield 'ESTIMATED by a model of memory, not compiled: weights, optimizer and batch are exact,'
    yield 'what is kept, workspace and so the total are not.'
    yield plan['reason']
  yield (
    f'{plan["backbone"]}, {plan["method"]}: batch of {plan["batch_size"]:,} on all devices, '
    f'{plan["num_classes"]:,} classes (--num_classes; a run learns them from its data)'
  )
  attention = f', attention {plan["attention"]}' if plan['attention'] else ''
  yield (
    f'compute {plan["dtype"]}, frozen weights {plan["frozen_dtype"]}, layers {plan["layer_loop"]}'
    f'{attention}'
  )
  yield ''
  yield f'{"memory of each device":{_WIDTH}} {"MiB":>12}'
  for name, label in _PARTS.items():
    size = plan['memory'][name]
    if size or name == 'total':
      yield f'  {label:{_WIDTH - 2}} {size:12,.1f}'
  fits = 'fits' if plan['fits'] else 'DOES NOT FIT'
  less = '' if plan['device'] == 'cpu' else ', CUDA itself left out'
  yield f'  {fits} into {plan["capacity"]:,.1f} MiB ({plan["device"]}{less})'
  if 'largest_batch' in plan:
    yield ''
    yield _largest(plan['largest_batch'], exact)
  yield ''
  yield from _speed(plan['speed'])
  if 'options' in plan:
    yield ''
    yield from _options(plan['options'])
  yield from ([''] if plan['notes'] else [])
  yield from plan['notes']


def _largest(found: Mapping[str, Any], exact: bool) -> str:
  size = found['batch_size']
  if not size:
    return 'largest batch that fits: none, not even the smallest that was tried'
  more = ' or more' if size >= plan_batch.MOST * 0.97 else ''
  how = 'compiled' if exact else 'estimated'
  return f'largest batch that fits: {size:,}{more} ({found["total"]:,.1f} MiB, {how})'


def _speed(speed: Mapping[str, float | None]) -> Iterator[str]:
  flops = speed['tera_flops']
  yield f'{"operations of a step":{_WIDTH}} {_operations(flops)}'
  if speed['step_ms'] is None:
    yield 'time of a step: no data sheet to bound it by'
    return
  yield 'time of a step at best, by the data sheet: a bound, not a measurement'
  for name, label, unit in (
    ('compute_ms', 'operations', 'ms'),
    ('bandwidth_ms', 'memory traffic, the least possible', 'ms'),
    ('images_per_second', 'images or clips, at most', '/ s'),
  ):
    yield f'  {label:{_WIDTH - 2}} {speed[name]:12,.1f} {unit}'


def _operations(tera: float | None) -> str:
  if tera is None:
    return 'cannot be counted'
  return f'{tera:12,.1f} TFLOP' if tera >= 1 else f'{1e3 * tera:12,.3f} GFLOP'


def _options(rows: list[Mapping[str, Any]]) -> Iterator[str]:
  yield 'options, one at a time: total of each device'
  for row in rows:
    label = ' '.join(f'--config.{key}={value}' for key, value in row['set'].items())
    if 'impossible' in row:
      yield f'  {label}: not possible. {row["impossible"]}'
    else:
      yield f'  {label}: {row["total"]:,.1f} MiB ({row["change"]:+,.1f})'
  if not rows:
    yield '  none that this config does not have already'
