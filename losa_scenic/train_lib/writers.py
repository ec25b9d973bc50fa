"""Where measurements go: TensorBoard events and JSON lines, without TensorFlow.

The interface is that of clu's `MetricWriter` (write_scalars, write_images, write_texts,
write_hparams, flush, close), so a clu writer can be used in their place; `rewind` is ours.
"""

import json
import os
import pathlib
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


class TensorBoardWriter:
  """TensorBoard event files through tensorboardX."""

  def __init__(self, logdir: pathlib.Path):
    """The event file is created at the first write."""
    self._logdir = logdir
    self._purge_step: int | None = None
    self._events = None

  def _open(self):
    if self._events is None:
      import tensorboardX

      self._events = tensorboardX.SummaryWriter(str(self._logdir), purge_step=self._purge_step)
    return self._events

  def rewind(self, step: int) -> None:
    """Tells TensorBoard to forget events after `step`."""
    self.close()
    self._purge_step = step + 1

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    for name, value in scalars.items():
      self._open().add_scalar(name, float(value), int(step))

  def write_images(self, step: int, images: Mapping[str, Any]) -> None:
    """Images are uint8 or float in [0, 1], [n h w c]."""
    for name, value in images.items():
      self._open().add_images(name, np.asarray(value), int(step), dataformats='NHWC')

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    for name, value in texts.items():
      self._open().add_text(name, value, int(step))

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    rows = ''.join(f'| {k} | {v} |\n' for k, v in hparams.items())
    self._open().add_text('hparams', f'| name | value |\n|---|---|\n{rows}', 0)

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
