"""Where measurements go: TensorBoard events and JSON lines, without TensorFlow.

The interface is that of clu's `MetricWriter` (write_scalars, write_images, write_texts,
write_hparams, flush, close), so a clu writer can be used in their place; `rewind` is ours.
"""

import contextlib
import json
import math
import os
import pathlib
import re
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np


class Writer(Protocol):
  """What the train loop needs of a writer."""

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None: ...

  def write_images(self, step: int, images: Mapping[str, Any]) -> None: ...

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None: ...

  def write_hparams(self, hparams: Mapping[str, Any]) -> None: ...

  def flush(self) -> None: ...

  def close(self) -> None: ...


class _Records:
  """A file that records are appended to, each wholly or, if there is no room for it, not at all."""

  def __init__(self, path: pathlib.Path):
    """Opens or creates `path`."""
    self._path = path
    self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    self._size, self._unflushed = os.fstat(self._fd).st_size, False

  def add(self, record: bytes) -> None:
    """Appends a record; it is seen by other processes at once. Raises `OSError` naming the file."""
    self._unflushed = True
    rest = memoryview(record)
    try:
      while rest:
        rest = rest[os.write(self._fd, rest) :]
    except OSError as error:
      with contextlib.suppress(OSError):
        os.ftruncate(self._fd, self._size)
      raise OSError(error.errno, error.strerror, str(self._path)) from error
    self._size += len(record)

  def flush(self) -> None:
    """Waits until all is on the disk; at once if nothing was added since the last time.

    Raises:
      OSError: naming the file.
    """
    if not self._unflushed:
      return
    try:
      os.fsync(self._fd)
    except OSError as error:
      raise OSError(error.errno, error.strerror, str(self._path)) from error
    self._unflushed = False

  def close(self) -> None:
    """Closes the file, once."""
    if self._fd >= 0:
      fd, self._fd = self._fd, -1
      os.close(fd)


class JsonLinesWriter:
  """Scalars as one JSON object a line: {"step": 20, "train_loss": 0.5, ...}; floats exactly."""

  def __init__(self, path: pathlib.Path):
    """Appends to `path`."""
    self._path = path
    self._file: _Records | None = None

  def rewind(self, step: int, evaluated: bool = True) -> None:
    """Forgets lines after `step` (and half-written ones): the run goes on from there.

    The lines that stay are not written again, so it needs no room on the disk.

    Args:
      step: the last one that counts.
      evaluated: whether its evaluation counts too; else it will come again.
    """
    self.close()
    if not self._path.exists():
      return
    data = self._path.read_bytes()
    kept = b''.join(
      line + b'\n'
      for line in data.split(b'\n')
      if (at := _step(line)) < step or (at == step and (evaluated or b'learning_rate"' in line))
    )
    if data.startswith(kept):
      with self._path.open('r+b') as file:
        file.truncate(len(kept))
        os.fsync(file.fileno())
      return
    temporary = self._path.with_name(f'.{self._path.name}.tmp')
    with temporary.open('wb') as file:
      file.write(kept)
      file.flush()
      os.fsync(file.fileno())
    temporary.replace(self._path)

  def write_row(self, row: Mapping[str, Any]) -> None:
    """Appends an object that JSON can hold; it has a 'step'."""
    if self._file is None:
      self._file = _Records(self._path)
    self._file.add(f'{json.dumps(dict(row))}\n'.encode())

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    self.write_row({'step': int(step)} | {k: float(v) for k, v in scalars.items()})

  def write_images(self, step: int, images: Mapping[str, Any]) -> None:
    """Not kept as JSON."""

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """Not kept as JSON."""

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Not kept as JSON."""

  def flush(self) -> None:
    if self._file is not None:
      self._file.flush()

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
      self._file = None


def _step(line: bytes) -> float:
  """The step of a line; infinite if it is no whole one."""
  try:
    return float(json.loads(line)['step'])
  except (ValueError, KeyError, TypeError):
    return math.inf


_SPLITS = ('train', 'valid', 'test')


def tag(name: str) -> str:
  """The TensorBoard tag of a scalar: 'valid_accuracy' -> 'accuracy/valid'.

  TensorBoard groups by what stands before the slash and sorts the groups, so a run opens on the
  accuracy of all splits, then loss, norms, and progress (learning rate, epoch, speed).
  """
  split, _, rest = name.partition('_')
  if split in _SPLITS and rest:
    return f'norms/{rest[3:]}' if rest.startswith('l2_') else f'{rest}/{split}'
  return f'progress/{name.replace("/", "_per_")}'


_EVENTS = 'events.out.tfevents.'


def _event_file(logdir: pathlib.Path) -> pathlib.Path:
  """The name of a new event file: after all that are there, as TensorBoard reads them by name.

  Names start with the second of their making. Where the clock has gone back since, the second
  after that of the last file is taken.
  """
  last = max((file.name for file in logdir.iterdir() if 'tfevents' in file.name), default='')
  stamp, known = int(time.time()), re.match(rf'{re.escape(_EVENTS)}(\d{{10}})\.', last)
  if known:
    stamp = max(stamp, int(known[1]) + 1)
  name = f'{_EVENTS}{stamp:010}.{socket.gethostname()}.{time.time_ns()}'
  # Other programs name theirs differently, but what begins with a name sorts after it.
  return logdir / (name if name > last else f'{last}.{name}')


def _event(step: int, **content: Any) -> bytes:
  """A TensorBoard event as a record of a TFRecord file: length, content, a checksum after each."""
  from tensorboardX import record_writer
  from tensorboardX.proto import event_pb2

  event = event_pb2.Event(step=step, wall_time=time.time(), **content).SerializeToString()
  length = struct.pack('<Q', len(event))
  sums = [struct.pack('<I', record_writer.masked_crc32c(part)) for part in (length, event)]
  return length + sums[0] + event + sums[1]


class TensorBoardWriter:
  """TensorBoard event files, made of tensorboardX's events; tags are those of `tag`.

  Events are written by the calling thread: tensorboardX's own queue would lose those before a
  checkpoint when the process is killed, and `flush` does not wait for it.
  """

  def __init__(self, logdir: pathlib.Path):
    """The event file is created at the first write."""
    self._logdir = logdir
    self._purge_step: int | None = None
    self._events: _Records | None = None

  def _add(self, step: int, **content: Any) -> None:
    from tensorboardX.proto import event_pb2

    if self._events is None:
      self._logdir.mkdir(parents=True, exist_ok=True)
      first = _event(0, file_version='brain.Event:2')
      if self._purge_step is not None:
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        first += _event(self._purge_step, session_log=start)
      events = _Records(_event_file(self._logdir))
      events.add(first)  # Together: without the second, what came before would be shown for ever.
      self._events = events
    self._events.add(_event(step, **content))

  def rewind(self, step: int, evaluated: bool = True) -> None:
    """Tells TensorBoard to forget events after `step`; see `JsonLinesWriter.rewind`."""
    del evaluated  # The same values twice at one step are one point.
    self.close()
    self._purge_step = step + 1

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    from tensorboardX import summary

    for name, value in scalars.items():
      if '=' not in name:  # Members of a population are runs of their own in TensorBoard.
        self._add(int(step), summary=summary.scalar(tag(name), float(value)))

  def write_images(self, step: int, images: Mapping[str, Any]) -> None:
    """Images are uint8 or float in [0, 1], [n h w c]."""
    from tensorboardX import summary

    for name, value in images.items():
      self._add(int(step), summary=summary.image(name, np.asarray(value), dataformats='NHWC'))

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    from tensorboardX import summary

    for name, value in texts.items():
      self._add(int(step), summary=summary.text(name, value))

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    rows = ''.join(f'| {k} | {v} |\n' for k, v in hparams.items())
    self.write_texts(0, {'hparams': f'| name | value |\n|---|---|\n{rows}'})

  def flush(self) -> None:
    if self._events is not None:
      self._events.flush()

  def close(self) -> None:
    if self._events is not None:
      self._events.close()
      self._events = None


class MultiWriter:
  """Writes to several writers."""

  def __init__(self, *writers: Any):
    """Takes the writers in the order in which they are called."""
    self._writers = writers

  def rewind(self, step: int, evaluated: bool = True) -> None:
    """Forgets what was written after `step`, where a writer can; see `JsonLinesWriter.rewind`."""
    for writer in self._writers:
      if hasattr(writer, 'rewind'):
        writer.rewind(step, evaluated)

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    for writer in self._writers:
      writer.write_scalars(step, scalars)

  def write_images(self, step: int, images: Mapping[str, Any]) -> None:
    for writer in self._writers:
      writer.write_images(step, images)

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    for writer in self._writers:
      writer.write_texts(step, texts)

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    for writer in self._writers:
      writer.write_hparams(hparams)

  def flush(self) -> None:
    for writer in self._writers:
      writer.flush()

  def close(self) -> None:
    """Closes all, also if one fails."""
    with contextlib.ExitStack() as stack:
      for writer in self._writers[::-1]:
        stack.callback(writer.close)


def create_default_writer(workdir: pathlib.Path) -> MultiWriter:
  """TensorBoard events in the workdir, and `metrics.jsonl`."""
  return MultiWriter(JsonLinesWriter(workdir / 'metrics.jsonl'), TensorBoardWriter(workdir))
