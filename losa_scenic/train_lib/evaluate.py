"""Evaluation of a split, exact in spite of padded batches, with a picture of the predictions."""

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from losa_scenic.dataset_lib import dataset_utils
from losa_scenic.train_lib import metrics, sharding
from losa_scenic.train_lib.program import Program
from losa_scenic.train_lib.state import TrainState
from losa_scenic.train_lib.writers import Writer

_SHOWN = 24  # images in the picture


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
    if shown is None:
      shown = (batch, np.asarray(jax.device_get(predictions)))
  values = metrics.normalize(metrics.accumulate(parts))
  if 'per_class_accuracy' in values:
    values['overall_accuracy'] = values['accuracy']
    values['accuracy'] = values.pop('per_class_accuracy')
  values = {f'{split}_{name}': value for name, value in values.items()}
  writer.write_scalars(step, values)
  if shown is not None:
    batch, predictions = shown
    count = min(_SHOWN, int(batch['batch_mask'].sum()))
    picture = prediction_grid(
      batch['inputs'][:count],
      batch['label'][:count],
      predictions[:count],
      dataset.meta_data['class_names'],
    )
    writer.write_images(step, {f'{split}_predictions': picture[None]})
  return values


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
    inputs: uint8, or float in [-1, 1], [k h w 3].
    labels: class ids [k].
    predictions: class ids [k].
    class_names: name of each class.
    columns: images in a row.
    cell: side of an image in the grid, in pixels.

  Returns:
    uint8 [rows * (cell + caption), columns * cell, 3].
  """
  caption = 30
  rows = -(-len(inputs) // columns)
  canvas = Image.new('RGB', (columns * cell, rows * (cell + caption)), 'white')
  draw = ImageDraw.Draw(canvas)
  draw.font = ImageFont.load_default(11)
  for i, pixels in enumerate(inputs):
    if pixels.dtype != np.uint8:
      pixels = np.clip((pixels + 1) * 127.5, 0, 255).astype(np.uint8)
    x, y = i % columns * cell, i // columns * (cell + caption)
    canvas.paste(
      Image.fromarray(pixels).resize((cell - 4, cell - 4), Image.Resampling.BICUBIC), (x + 2, y + 2)
    )
    right = predictions[i] == labels[i]
    color = (0, 120, 0) if right else (190, 0, 0)
    draw.rectangle((x, y, x + cell - 1, y + cell - 1), outline=color, width=2)
    draw.text((x + 4, y + cell), _fitting(draw, class_names[predictions[i]], cell - 8), fill=color)
    if not right:
      truth = _fitting(draw, f'true: {class_names[labels[i]]}', cell - 8)
      draw.text((x + 4, y + cell + 13), truth, fill=(60, 60, 60))
  return np.asarray(canvas)


def _fitting(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
  """The text, cut so that it is at most `width` pixels wide."""
  if draw.textlength(text) <= width:
    return text
  while text and draw.textlength(f'{text}...') > width:
    text = text[:-1]
  return f'{text}...'
