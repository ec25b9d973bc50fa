"""The report of a check as text for a terminal, and its list of images or clips as CSV."""

import csv
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from losa_scenic.dataset_lib.check_report import ASPECTS, NAMED, SHORT_SIDES, Repeat, Report, plural

_SHOWN = 10  # of each kind of trouble; the others are only in the file
_BAR = 32  # characters
_CLASSES = 20  # so many classes get a bar each
_CSV_COLUMNS = ('problem', 'split', 'index', 'id', 'reason')


def text(report: Report, bar: str = '#') -> str:
  """The whole report; its last line begins with 'fine:' or 'trouble:'.

  Args:
    report: what was found.
    bar: a character to draw bars with.
  """
  lines = [report.name, *(f'  {line}' for line in report.about), '']
  for section in (
    _splits(report),
    _classes(report, bar),
    _shapes(report, bar),
    _clips(report, bar),
    _broken(report),
    _repeats(report),
    _reading(report),
  ):
    lines += [*section, '']
  return '\n'.join([*lines, *(f'note: {note}' for note in report.notes), _verdict(report)])


def _verdict(report: Report) -> str:
  """One line: 'fine: ...' or 'trouble: ...'."""
  if report.troubles:
    return f'trouble: {"; ".join(report.troubles)}'
  return f'fine: {plural(report.images, report.noun)}, nothing to mend'


def write_csv(report: Report, path: str | os.PathLike[str]) -> int:
  """Lists the broken images, then the repeated ones, one a row.

  Args:
    report: what was found.
    path: of the file; one that exists is replaced.

  Returns:
    The number of rows under the header (problem, split, index, id, reason); `problem` is 'broken'
    or what `Repeat.kinds` says, and the reason of a repeat names the image it repeats.
  """
  rows = [('broken', *problem) for problem in report.broken]
  for repeat in report.repeats:
    again, first = repeat.again, repeat.first
    reason = f'same content as {first.split} {report.noun} {first.id} of class {first.label}'
    rows.append(('+'.join(repeat.kinds), again.split, again.index, again.id, reason))
  # Names of files need not be UTF-8: they are written as the bytes that they are.
  with pathlib.Path(path).open('w', newline='', encoding='utf-8', errors='surrogateescape') as file:
    writer = csv.writer(file)
    writer.writerow(_CSV_COLUMNS)
    writer.writerows(rows)
  return len(rows)


def _splits(report: Report) -> Iterator[str]:
  rows = [['', f'{report.noun}s', 'broken', 'duplicates', 'size']]
  columns = [
    [part.images, part.broken, part.duplicates, part.bytes] for part in report.parts.values()
  ]
  sums = [sum(column) for column in zip(*columns, strict=True)]
  for name, (*numbers, size) in zip([*report.parts, 'all'], [*columns, sums], strict=True):
    rows.append([name, *(f'{number:,}' for number in numbers), _size(size)])
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  for first, *others in rows:
    numbers = (f'{cell:>{width}}' for cell, width in zip(others, widths[1:], strict=True))
    yield f'  {first:<{widths[0]}}  {"  ".join(numbers)}'


def _classes(report: Report, bar: str) -> Iterator[str]:
  counts = np.array(report.parts['train'].class_counts)
  names = report.class_names
  order = np.argsort(-counts, kind='stable')
  yield f'{plural(len(names), "class", "classes")}, training {report.noun}s of each'
  if len(names) <= _CLASSES:
    yield from _bars({names[i]: int(counts[i]) for i in order}, bar)
  else:
    chosen = {'largest': order[0], 'median': order[len(order) // 2], 'smallest': order[-1]}
    width = len(f'{counts[order[0]]:,}')
    for what, i in chosen.items():
      yield f'  {what:<8}  {counts[i]:>{width},}  {names[i]}'
  if len(counts) and 0 < counts.min() < counts.max():
    yield f'  largest / smallest class: {counts.max() / counts.min():.3g}'
  if report.empty_classes:
    yield f'  without a training {report.noun}: {_some(report.empty_classes)}'


def _shapes(report: Report, bar: str) -> Iterator[str]:
  if not report.sizes:
    return
  smallest, median, largest = (f'{width} x {height}' for width, height in report.sizes)
  if report.distinct_sizes == 1:
    yield f'all {report.noun}s are {smallest} pixels (width x height)'
  else:
    yield (
      f'short side, pixels (smallest {report.noun} {smallest}, median {median}, largest {largest})'
    )
    yield from _bars(_buckets(report.short_sides, SHORT_SIDES, _pixels), bar)
    yield ''
    yield 'width / height'
    yield from _bars(_buckets(report.aspects, ASPECTS, _ratio), bar)
  if report.enlarged:
    share = report.enlarged / sum(report.short_sides)
    yield f'  {"all" if share == 1 else _percent(share)} are enlarged to {report.image_size} pixels'
  yield ''
  yield 'formats'
  yield from _bars(report.kinds, bar)
  if report.rotated:
    how = 'turned or mirrored by the EXIF orientation' if report.clips is None else 'turned upright'
    yield f'  {plural(report.rotated, report.noun)} {how}'


def _clips(report: Report, bar: str) -> Iterator[str]:
  clips = report.clips
  if clips is None or not clips.frames:
    return
  shortest, median, longest = (f'{number:,}' for number in clips.frames)
  if shortest == longest:
    yield f'all clips have {shortest} frames'
  else:
    yield f'length: {shortest} to {longest} frames, median {median}'
  if clips.seconds:
    shortest, median, longest = (f'{number:.3g}' for number in clips.seconds)
    yield f'  {shortest} to {longest} s, median {median} s'
  if clips.sampling is not None and clips.short:
    what = {'loop': 'begin again', 'pad': 'stand still at their last frame'}
    yield (
      f'  {plural(clips.short, "clip")} shorter than the window of {clips.sampling["num_frames"]} '
      f'frames: they {what[clips.sampling["short_clips"]]}'
    )
  if clips.frame_rates:
    yield ''
    yield 'frames per second'
    rates = list(clips.frame_rates.items())
    others = sum(count for _, count in rates[_SHOWN:])
    yield from _bars(dict([*rates[:_SHOWN], *([('others', others)] if others else [])]), bar)
  if clips.varying:
    yield f'  {plural(clips.varying, "clip")} of varying rate, read by time'


def _pixels(low: float | None, high: float | None) -> str:
  if low is None:
    return f'below {high}'
  return f'{low} and more' if high is None else f'{low} - {int(high) - 1}'


def _ratio(low: float | None, high: float | None) -> str:
  if low is None:
    return f'below {high:g}'
  if high is None:
    return f'{low:g} and more'
  return 'square' if low < 1 < high else f'{low:g} - {high:g}'


def _buckets(counts: Sequence[int], ends: Sequence[float], name) -> dict[str, int]:
  """Name of each bucket -> count, without the empty ones at both ends."""
  borders = [None, *ends, None]
  filled = np.flatnonzero(counts)
  return {name(borders[i], borders[i + 1]): counts[i] for i in range(filled[0], filled[-1] + 1)}


def _bars(counts: Mapping[str, int], bar: str) -> Iterator[str]:
  total, most = max(1, sum(counts.values())), max(1, *counts.values())
  names = {name: name if len(name) <= 30 else f'{name[:29]}~' for name in counts}
  width = max(map(len, names.values()))
  digits = len(f'{most:,}')
  for name, count in counts.items():
    length = max(1, round(_BAR * count / most)) if count else 0
    share = _percent(count / total) if count else ''
    line = f'  {names[name]:<{width}}  {count:>{digits},}  {bar * length:<{_BAR}}  {share:>6}'
    yield line.rstrip()


def _broken(report: Report) -> Iterator[str]:
  if not report.broken:
    yield f'every {report.noun} can be read'
    return
  yield f'{plural(len(report.broken), report.noun)} cannot be read'
  for problem in report.broken[:_SHOWN]:
    yield f'  {problem.split:<5}  {problem.id}: {problem.reason}'
  yield from _more(len(report.broken))


def _repeats(report: Report) -> Iterator[str]:
  duplicates = {name: part.duplicates for name, part in report.parts.items() if part.duplicates}
  if not (duplicates or report.leaks or report.conflicts):
    yield f'no two {report.noun}s have the same content'
    return
  shown = {'labels': [], 'leak': [], 'duplicate': []}
  for repeat in report.repeats:
    shown[repeat.kinds[0]].append(repeat)
  if report.conflicts:
    yield f'{plural(report.conflicts, report.noun)} repeated with another label'
    yield from _pairs(shown['labels'], labels=True)
  if report.leaks:
    counts = ', '.join(f'{count:,} of {b} in {a}' for (a, b), count in report.leaks.items())
    yield f'the same {report.noun} in two splits: {counts}'
    # Those with another label are named above.
    yield from _pairs(shown['leak'])
  if duplicates:
    counts = ', '.join(f'{count:,} in {name}' for name, count in duplicates.items())
    yield f'{report.noun}s that repeat one of their own split: {counts}'
    yield from _pairs(shown['duplicate'])


def _pairs(repeats: Sequence[Repeat], labels: bool = False) -> Iterator[str]:
  for repeat in repeats[:_SHOWN]:
    again, first = (
      f'{image.split} {image.id}' + (f' ({image.label})' if labels else '')
      for image in (repeat.again, repeat.first)
    )
    yield f'  {again} = {first}'
  if len(repeats) == NAMED:
    yield f'  ... and more (--csv=FILE lists the first {NAMED:,})'
  else:
    yield from _more(len(repeats))


def _more(count: int) -> Iterator[str]:
  if count > _SHOWN:
    yield f'  ... and {count - _SHOWN:,} more (--csv=FILE)'


def _reading(report: Report) -> Iterator[str]:
  reading = report.reading
  if reading is None:
    return
  noun = report.noun
  cores = plural(reading.cores, 'core')
  yield 'reading'
  yield (
    f'  this check  {report.images / max(reading.check_seconds, 1e-9):>7,.0f} {noun}s/s in '
    f'{plural(reading.jobs, "thread")}: all {noun}s in {_seconds(reading.check_seconds)}'
  )
  yield (
    f'  training    {reading.images_per_second:>7,.0f} {noun}s/s at {_input(report)} on {cores}: '
    f'an epoch in {_seconds(reading.epoch_seconds)}'
  )
  yield f'              (batches of {plural(reading.sample, noun)} that had been read before)'
  decoded, room = _size(reading.decoded_bytes), _size(reading.cache_bytes)
  if reading.decoded_anew:
    large = plural(reading.decoded_anew, 'large image')
    yield f'  decoded     {large} anew for each random crop, no more of them than it needs'
  if not reading.decoded_bytes:
    return
  if not reading.cache_bytes:
    yield f'  decoded     {decoded} in each epoch: nothing is kept'
  elif reading.decoded_bytes <= reading.cache_bytes:
    yield f'  decoded     {decoded}, which fits the cache of {room}: decoded only once'
  else:
    what = 'decoded' if report.clips is None else 'what does not fit is decoded'
    yield (
      f'  decoded     {decoded}, more than the cache of {room}: {what} anew in each epoch '
      '(option cache_gigabytes)'
    )


def _input(report: Report) -> str:
  """What the model is shown: '224 x 224', '16 x 224 x 224'."""
  clip = report.clips.sampling if report.clips else None
  sides = (*((clip['num_frames'],) if clip else ()), report.image_size, report.image_size)
  return ' x '.join(map(str, sides))


def _some(names: Sequence[str]) -> str:
  more = f' and {len(names) - _SHOWN:,} more' if len(names) > _SHOWN else ''
  return ', '.join(names[:_SHOWN]) + more


def _percent(share: float) -> str:
  return f'{share:.1%}'.replace('%', ' %') if share < 0.0995 else f'{share:.0%}'.replace('%', ' %')


def _size(number: int) -> str:
  """Bytes in units of 1000, as disks and `cache_gigabytes` count them."""
  power = next((p for p in (1, 2, 3) if number < 999.5 * 1000**p), 4)
  return f'{number / 1000**power:.3g} {("kB", "MB", "GB", "TB")[power - 1]}'


def _seconds(seconds: float) -> str:
  if seconds < 90:
    return f'{seconds:.2g} s' if seconds < 10 else f'{seconds:.0f} s'
  minutes = seconds / 60
  return f'{minutes:.0f} min' if minutes < 90 else f'{minutes / 60:.1f} h'
