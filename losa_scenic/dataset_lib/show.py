"""A contact sheet of what a model is shown of a data set; a clip is a strip of a few frames."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from losa_scenic.common_lib import errors, types
from losa_scenic.dataset_lib import contact_sheet, dataset_utils
from losa_scenic.dataset_lib.augment import Augment
from losa_scenic.dataset_lib.bad_files import BadFiles
from losa_scenic.dataset_lib.clip_reader import Sampling
from losa_scenic.dataset_lib.contact_sheet import Cell
from losa_scenic.dataset_lib.loader import Loader
from losa_scenic.dataset_lib.request import Request

SPLITS = ('train', 'valid', 'test')
_MOST = 2000  # images, or frames of clips, on a sheet
_STRIP = 4  # frames of a clip
# How many images, images with epochs, and clips are drawn if nobody says it.
_IMAGES, _ROWS, _CLIPS = 48, 6, 12
_MARGIN = 2
_RED = (190, 0, 0)
# Looking at a set is no run: unreadable images are named, and do not end it.
_BAD_FRACTION = 0.99


def sheet(
  request: Request, *, split: str, count: int | None, epoch: int, epochs: int | None
) -> np.ndarray:
  """Draws a contact sheet.

  Args:
    request: the data set.
    split: one of `SPLITS`.
    count: number of images or clips, at most as many as there are; None for a sheet of usual size.
      Of a clip that the model is shown in several views, each of them is drawn.
    epoch: of training, from 0; the first one with `epochs`.
    epochs: one row per image with so many epochs of it; None for one epoch. With it an image is
      mixed with that of the next or previous row, not with its neighbour in the training order.

  Returns:
    uint8 [height, width, 3].

  Raises:
    errors.UserError: for values out of range, a split that is not there, or epochs of a split that
      is not for training.
  """
  errors.one_of('split', split, SPLITS)
  for option, value, least in (('count', count, 1), ('epoch', epoch, 0), ('epochs', epochs, 1)):
    if value is not None:
      errors.check_at_least(f'--{option}', value, least)
  if split != 'train' and (epoch or epochs):
    raise errors.UserError(f'--epoch and --epochs are of training; {split} images never change.')
  sampling = request.sampling
  if count is None:
    count = _ROWS if epochs else _IMAGES if sampling is None else _CLIPS
  each = 1 if sampling is None else _STRIP * sampling.views(split)
  if count * (epochs or 1) * each > _MOST:
    what = 'images' if sampling is None else 'frames of clips'
    raise errors.UserError(f'At most {_MOST:,} {what} fit on a sheet (--count, --epochs).')
  side = contact_sheet.shown_side(request.view.image_size)
  if epochs:
    cells = _epochs(request, count, epoch, epochs)
    columns, headers = epochs, [f'epoch {epoch + i}' for i in range(epochs)]
  else:
    cells = _first(request, count, epoch) if split == 'train' else _spread(request, split, count)
    columns = 8 if side >= 150 else 12
    columns, headers = min(len(cells), columns if sampling is None else columns // _STRIP), ()
  return contact_sheet.draw(
    cells,
    columns=columns,
    cell=side + 2 * _MARGIN,
    margin=_MARGIN,
    title=_title(request, split, epoch, epochs),
    headers=headers,
  )


def _first(request: Request, count: int, epoch: int) -> list[Cell]:
  """The first training images of an epoch, in their order."""
  # Images are mixed in pairs of the order, so that any even size of batches shows the same.
  size = request.batch_size if request.batch_size % 2 else 2
  dataset = request.dataset(size, size, max_bad_fraction=_BAD_FRACTION)
  total = dataset.meta_data['num_train_examples']
  start = epoch * total
  stop = start + min(count, total)
  batches = dataset_utils.iterate(dataset.train_ds, start // size, -(-stop // size))
  cells = [cell for batch in batches for cell in _cells(batch, dataset.meta_data['class_names'])]
  return cells[start % size :][: stop - start]


def _spread(request: Request, split: str, count: int) -> list[Cell]:
  """Validation or test images from all over the split: in order they are often of one class."""
  dataset = request.dataset(1, 1, max_bad_fraction=_BAD_FRACTION)
  batches = getattr(dataset, f'{split}_ds')
  if batches is None:
    raise errors.UserError(f'{request.title}: there are no validation images (--split).')
  names = dataset.meta_data['class_names']
  return [cell for i in _positions(len(batches), count) for cell in _cells(batches[i], names)]


def _epochs(request: Request, count: int, epoch: int, epochs: int) -> list[Cell]:
  """Training images from all over the split, a row each."""
  splits = request.splits()
  bad_files = BadFiles({'train': len(splits.train)}, _BAD_FRACTION)
  loader = Loader(
    splits.train,
    request.view,
    sampling=request.sampling,
    augment=request.augment,
    seed=request.seed,
    max_bad_fraction=_BAD_FRACTION,
  )
  count = min(count, len(splits.train))
  # One more where the last row would have no partner to be mixed with.
  indices = np.array(_positions(len(splits.train), count + count % 2))
  columns = []
  for number in range(epoch, epoch + epochs):
    batch = loader.batch(indices, np.full(len(indices), number))
    bad_files.add(batch.pop('problems', ()))
    columns.append(list(_cells(batch, splits.class_names)))
  return [column[row] for row in range(count) for column in columns]


def _positions(total: int, count: int) -> list[int]:
  """`count` positions, or all if there are fewer, evenly spaced in [0, total)."""
  count = min(count, total)
  return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def _cells(batch: types.Batch, class_names: Sequence[str]) -> Iterator[Cell]:
  for i, pixels in enumerate(batch['inputs']):
    if not batch['batch_mask'][i]:
      yield Cell(None, ('cannot be read',), (_RED,), frame=_RED)
      continue
    if pixels.ndim == 5:
      views = [contact_sheet.strip(view, _STRIP) for view in pixels]
    else:
      views = [pixels if pixels.ndim == 3 else contact_sheet.strip(pixels, _STRIP)]
    partner, share = None, 1.0
    if 'partner_label' in batch:
      partner, share = int(batch['partner_label'][i]), float(batch['label_share'][i])
    label = int(batch['label'][i])
    caption = contact_sheet.mixed_caption(class_names, label, partner, share)
    for number, picture in enumerate(views):
      which = (f'view {number + 1} of {len(views)}',) if len(views) > 1 else ()
      yield Cell(picture, (*caption, *which))


def _frames(sampling: Sampling | None) -> Iterator[str]:
  """Which frames are shown."""
  if sampling is not None:
    for field in dataclasses.fields(sampling):
      value = getattr(sampling, field.name)
      if value != field.default:
        yield f'{field.name}={value}'


def _title(request: Request, split: str, epoch: int, epochs: int | None) -> str:
  size = request.view.image_size
  parts = [request.title, split, f'{size} x {size} pixels', *_frames(request.sampling)]
  if split == 'train':
    parts += [f'seed {request.seed}'] if epochs else [f'epoch {epoch}', f'seed {request.seed}']
    given = {
      field.name: getattr(request.augment, field.name)
      for field in dataclasses.fields(Augment)
      if getattr(request.augment, field.name) != field.default
    }
    changed = [name if value is True else f'{name}={value}' for name, value in given.items()]
    parts.append(' '.join(changed) or 'no augmentation')
  return ', '.join(parts)
