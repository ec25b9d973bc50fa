"""Evaluation of a split, exact in spite of padded batches, with a picture of the predictions."""

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from losa_scenic.common_lib import hosts
from losa_scenic.common_lib.types import Batch
from losa_scenic.dataset_lib import contact_sheet, dataset_utils
from losa_scenic.train_lib import metrics, sharding, stopping
from losa_scenic.train_lib.program import Program
from losa_scenic.train_lib.state import TrainState
from losa_scenic.train_lib.writers import Writer

_SHOWN = 24  # images in the picture
_IN_FLIGHT = 2  # batches on the devices while the next one is made ready
_GREEN, _RED = (0, 120, 0), (190, 0, 0)


class Watch(NamedTuple):
  """Who follows an evaluation.

  Attributes:
    each: called with the number of batches that are done, from 0, and of all; what it raises ends
      the evaluation.
    requests: of the processes of a run, exchanged with the batches.
  """

  each: Callable[[int, int], None]
  requests: stopping.Requests


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What an evaluation found.

  Attributes:
    values: {'<split>_accuracy', '<split>_loss', ...}; where the dataset's metric is 'per_class',
      '<split>_accuracy' is the mean of the per-class accuracies.
    split: 'valid' or 'test'.
    picture: images with what was predicted, uint8 [h w 3]; None if none could be read, and
      on all processes but the first.
  """

  values: dict[str, float]
  split: str
  picture: np.ndarray | None

  def write(self, step: int, writer: Writer) -> None:
    """Hands it to a writer, as that of `step`."""
    writer.write_scalars(step, self.values)
    if self.picture is not None:
      writer.write_images(step, {f'{self.split}_predictions': self.picture[None]})


def evaluate(
  program: Program,
  state: TrainState,
  dataset: dataset_utils.Dataset,
  split: str,
  watch: Watch | None = None,
) -> Evaluation:
  """Metrics over every example of a split, each counted once.

  Args:
    program: the run's fixed parts.
    state: its trainable parameters are evaluated.
    dataset: has `<split>_ds`.
    split: 'valid' or 'test'.
    watch: follows the batches.
  """
  return found(program, dataset, split, *measure(program, state, dataset, split, watch))


def measure(
  program: Program,
  state: TrainState,
  dataset: dataset_utils.Dataset,
  split: str,
  watch: Watch | None = None,
) -> tuple[dict[str, tuple[Any, Any]], tuple[Batch, Any] | None]:
  """What the eval step says of a split; the arguments are those of `evaluate`.

  Returns:
    Sums and normalizers by name, and the first batch with something in it with the predictions of
    the step, as it returns them; None if there is no such batch, and on all processes but the
    first.
  """
  batches = getattr(dataset, f'{split}_ds')
  flying: collections.deque[Any] = collections.deque()
  total, shown = {}, None

  def land(many: int) -> None:
    nonlocal total
    while len(flying) > many:
      part = jax.device_get(flying.popleft())
      asked = part.pop(stopping.ASKED, None)
      if asked is not None and watch is not None:
        watch.requests.hear(asked[0])
      total = metrics.accumulate([part], total)

  iterator = dataset_utils.iterate(batches, 0, len(batches))
  for done in range(len(batches)):
    if watch is None:
      batch = next(iterator)
    else:
      watch.each(done, len(batches))
      with watch.requests.interruptible():
        batch = next(iterator)
    marked = batch if watch is None else watch.requests.mark(batch)
    part, predictions = program.eval_step(state, program.frozen, sharding.put(marked, program.mesh))
    flying.append(part)
    if shown is None and hosts.is_first() and batch['batch_mask'].any():
      # Predictions are those of all processes, those for the batch of the first one come first.
      shown = (batch, jax.device_get(predictions))
    land(_IN_FLIGHT)
  land(0)
  if watch is not None:
    watch.each(len(batches), len(batches))
  return total, shown


def found(
  program: Program,
  dataset: dataset_utils.Dataset,
  split: str,
  total: Mapping[str, tuple[Any, Any]],
  shown: tuple[Batch, np.ndarray] | None,
) -> Evaluation:
  """The evaluation that `measure` has measured, of one model."""
  values = metrics.normalize(total)
  if 'per_class_accuracy' in values:
    values['overall_accuracy'] = values['accuracy']
    values['accuracy'] = values.pop('per_class_accuracy')
  values = {f'{split}_{name}': value for name, value in values.items()}
  batches = getattr(dataset, f'{split}_ds')
  return Evaluation(
    values, split, None if shown is None else _picture(program, dataset, batches, *shown)
  )


def _picture(
  program: Program,
  dataset: dataset_utils.Dataset,
  batches: Any,
  batch: Batch,
  predictions: np.ndarray,
) -> np.ndarray:
  real = np.flatnonzero(batch['batch_mask'])[:_SHOWN]  # Unreadable images are masked too.
  return prediction_grid(
    pictures(batches.pictures(batch, real), len(program.model.backbone.spec.input_shape)),
    batch['label'][real],
    predictions[real],
    dataset.meta_data['class_names'],
  )


def pictures(inputs: np.ndarray, dimensions: int) -> np.ndarray:
  """A picture of each input: an image itself; of a clip some frames of its middle view in a row.

  Args:
    inputs: [k h w 3], [k t h w 3] or [k v t h w 3].
    dimensions: of one input of the model: 3 for images, 4 for clips.

  Returns:
    [k h W 3], of clips W is larger than w.
  """
  if inputs.ndim > dimensions + 1:
    inputs = inputs[:, inputs.shape[1] // 2]
  return np.stack([contact_sheet.strip(clip) for clip in inputs]) if dimensions == 4 else inputs


def prediction_grid(
  inputs: np.ndarray,
  labels: np.ndarray,
  predictions: np.ndarray,
  class_names: tuple[str, ...],
  columns: int = 6,
  cell: int = 128,
) -> np.ndarray:
  """Images with what was predicted: green where right, red (and the true class) where wrong.

  Args:
    inputs: uint8, or float in [-1, 1], [k h w 3]; wide ones are strips of clips.
    labels: class ids [k].
    predictions: class ids [k].
    class_names: name of each class.
    columns: images in a row; of strips a third as many.
    cell: side of an image in the grid, in pixels.

  Returns:
    uint8 [rows * (cell + caption), columns * cell, 3].
  """
  cells = []
  for pixels, label, predicted in zip(inputs, labels, predictions, strict=True):
    color = _GREEN if predicted == label else _RED
    truth = () if predicted == label else (f'true: {class_names[label]}',)
    cells.append(
      contact_sheet.Cell(
        pixels, (class_names[predicted], *truth), (color, contact_sheet.GREY), frame=color
      )
    )
  if inputs.shape[2] > 2 * inputs.shape[1]:
    columns = max(1, columns // 3)
  return contact_sheet.draw(cells, columns=columns, cell=cell)
