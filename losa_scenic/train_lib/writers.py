"""Where measurements go: TensorBoard events and JSON lines, without TensorFlow.

The interface is that of clu's `MetricWriter` (write_scalars, write_images, write_texts,
write_hparams, flush, close), so a clu writer can be used in their place; `rewind` is ours.
"""

import json
import os
import pathlib
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


class JsonLinesWriter:
  """Scalars as one JSON object a line: {"step": 20, "train_loss": 0.5, ...}; floats exactly."""

  def __init__(self, path: pathlib.Path):
    """Appends to `path`."""
    self._path = path
    self._file = None

  def rewind(self, step: int) -> None:
    """Forgets lines after `step` (and a half-written last one): the run goes on from there."""
    self.close()
    if not self._path.exists():
      return
    kept = []
    for line in self._path.read_text().splitlines():
      try:
        if json.loads(line)['step'] <= step:
          kept.append(line)
      except (json.JSONDecodeError, KeyError):
        break
    temporary = self._path.with_name(f'.{self._path.name}.tmp')
    temporary.write_text(''.join(f'{line}\n' for line in kept))
    temporary.replace(self._path)

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    if self._file is None:
      self._file = open(self._path, 'a')  # noqa: SIM115 (kept open until close)
    row = {'step': int(step)} | {k: float(v) for k, v in scalars.items()}
    self._file.write(json.dumps(row) + '\n')
    self._file.flush()

  def write_images(self, step: int, images: Mapping[str, Any]) -> None:
    """Not kept as JSON."""

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """Not kept as JSON."""

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Not kept as JSON."""

  def flush(self) -> None:
    if self._file is not None:
      self._file.flush()
      os.fsync(self._file.fileno())

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
      self._file = None


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


class TensorBoardWriter:
  """TensorBoard event files through tensorboardX; tags are those of `tag`.

  Events are written by the calling thread: tensorboardX's own queue would lose those before a
  checkpoint when the process is killed, and `flush` does not wait for it.
  """

  def __init__(self, logdir: pathlib.Path):
    """The event file is created at the first write."""
    self._logdir = logdir
    self._purge_step: int | None = None
    self._events = None

  def _add(self, step: int, **content: Any) -> None:
    from tensorboardX import event_file_writer
    from tensorboardX.proto import event_pb2

    if self._events is None:
      self._logdir.mkdir(parents=True, exist_ok=True)
      # TensorBoard reads files in the order of their names; no two may be the same.
      self._events = event_file_writer.EventsWriter(
        str(self._logdir / 'events'), filename_suffix=f'.{time.time_ns()}'
      )
      if self._purge_step is not None:
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(self._purge_step, session_log=start)
    self._events.write_event(event_pb2.Event(step=step, wall_time=time.time(), **content))

  def rewind(self, step: int) -> None:
    """Tells TensorBoard to forget events after `step`."""
    self.close()
    self._purge_step = step + 1

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    from tensorboardX import summary

    for name, value in scalars.items():
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

  def rewind(self, step: int) -> None:
    """Forgets what was written after `step`, where a writer can."""
    for writer in self._writers:
      if hasattr(writer, 'rewind'):
        writer.rewind(step)

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
    for writer in self._writers:
      writer.close()


def create_default_writer(workdir: pathlib.Path) -> MultiWriter:
  """TensorBoard events in the workdir, and `metrics.jsonl`."""
  return MultiWriter(JsonLinesWriter(workdir / 'metrics.jsonl'), TensorBoardWriter(workdir))
