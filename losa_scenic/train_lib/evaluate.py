"""Evaluation of a split, exact in spite of padded batches, with a picture of the predictions."""

import jax
import numpy as np

from losa_scenic.dataset_lib import contact_sheet, dataset_utils
from losa_scenic.train_lib import metrics, sharding
from losa_scenic.train_lib.program import Program
from losa_scenic.train_lib.state import TrainState
from losa_scenic.train_lib.writers import Writer

_SHOWN = 24  # images in the picture
_GREEN, _RED = (0, 120, 0), (190, 0, 0)


def evaluate(
  program: Program,
  state: TrainState,
  dataset: dataset_utils.Dataset,
  split: str,
  step: int,
  writer: Writer,
) -> dict[str, float]:
  """Metrics over every example of a split, each counted once.

  Args:
    program: the run's fixed parts.
    state: its trainable parameters are evaluated.
    dataset: has `<split>_ds`.
    split: 'valid' or 'test'.
    step: steps done, for the writer.
    writer: receives the scalars and a grid of images with their predictions.

  Returns:
    {'<split>_accuracy', '<split>_loss', ...}; where the dataset's metric is 'per_class',
    '<split>_accuracy' is the mean of the per-class accuracies.
  """
  batches = getattr(dataset, f'{split}_ds')
  parts, shown = [], None
  for batch in dataset_utils.iterate(batches, 0, len(batches)):
    batch_here = sharding.put(batch, program.mesh)
    part, predictions = program.eval_step(state, program.frozen, batch_here)
    parts.append(part)
    if shown is None and batch['batch_mask'].any():
      shown = (batch, np.asarray(jax.device_get(predictions)))
  values = metrics.normalize(metrics.accumulate(parts))
  if 'per_class_accuracy' in values:
    values['overall_accuracy'] = values['accuracy']
    values['accuracy'] = values.pop('per_class_accuracy')
  values = {f'{split}_{name}': value for name, value in values.items()}
  writer.write_scalars(step, values)
  if shown is not None:
    batch, predictions = shown
    real = np.flatnonzero(batch['batch_mask'])[:_SHOWN]  # Unreadable images are masked too.
    picture = prediction_grid(
      pictures(batch['inputs'][real], len(program.model.backbone.spec.input_shape)),
      batch['label'][real],
      predictions[real],
      dataset.meta_data['class_names'],
    )
    writer.write_images(step, {f'{split}_predictions': picture[None]})
  return values


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
