"""What a model is shown of the image at a position."""

from collections.abc import Sequence

import numpy as np

from losa_scenic.dataset_lib import augment as augment_lib
from losa_scenic.dataset_lib import decode, resize
from losa_scenic.dataset_lib.cache import Cache
from losa_scenic.dataset_lib.sources import Record, Source

# A reduced image keeps this many pixels per pixel that is wanted: shrinking twice costs detail.
_SPARE = 1.25


class ImageReader:
  """Reads, decodes, crops and augments images; a pure function of (seed, epoch, position).

  Attributes:
    shape: of what is shown, (s, s, 3).
    lasting: whether what could not be read once need not be tried again.
  """

  lasting = True

  def __init__(
    self,
    source: Source,
    view: resize.View,
    augment: augment_lib.Augment,
    seed: int = 0,
    cache_bytes: int = 0,
  ) -> None:
    """Reads nothing yet.

    Args:
      source: the images.
      view: what of an image is shown where nothing is augmented.
      augment: what is drawn at random.
      seed: of the augmentation.
      cache_bytes: keep decoded images in memory if those of the split fit into this many bytes.
    """
    self.shape = (view.image_size, view.image_size, 3)
    self._source, self._view, self._augment, self._seed = source, view, augment, seed
    self._cache = Cache(len(source), None if augment.crops else view.image_size, cache_bytes)

  def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Images uint8 [b, s, s, 3] and labels int32 [b] if all are kept and none is augmented."""
    if self._augment.active:
      return None
    images = self._cache.gather(indices)
    return None if images is None else (images, self._cache.labels[indices])

  def show(self, index: int, epoch: int) -> tuple[np.ndarray, int]:
    """The image at a position in an epoch, uint8 [s, s, 3], and its label.

    Raises:
      BadImage: if it cannot be read.
    """
    if not self._augment.active:
      return self._viewed(index)
    rng = augment_lib.generator(self._seed, epoch, index)
    image, label = self._cropped(index, rng) if self._augment.crops else self._viewed(index)
    return augment_lib.apply(self._augment, rng, image), label

  def _viewed(self, index: int) -> tuple[np.ndarray, int]:
    image, label = self._cache.get(index)
    if image is None:
      record = self._source[index]
      pixels, label = _decoded(record), record.label
      box = self._view.box(*pixels.shape[:2])
      image = resize.resize(pixels, self._view.image_size, self._view.interpolation, box)
      self._cache.put(index, image, label)
    return image, label

  def _cropped(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    pixels, label = self._cache.get(index)
    if pixels is None:
      record = self._source[index]
      label = record.label
      if isinstance(record.image, bytes):
        header = decode.read_header(record.image, record.id)
        # Not a matter of the cache: what is shown must not depend on what was kept.
        if header.reducible and is_large(header.height, header.width, self._view.image_size):
          return self._cropped_file(record.image, record.id, header, rng), label
        pixels = decode.decode(record.image, record.id, header)
      else:
        pixels = _decoded(record)
      self._cache.put(index, pixels, label)
    box = augment_lib.crop_box(self._augment, self._view, rng, *pixels.shape[:2])
    size = self._view.image_size
    return resize.resize(pixels, size, self._augment.interpolation, box), label

  def _cropped_file(
    self, encoded: bytes, name: str, header: decode.Header, rng: np.random.Generator
  ) -> np.ndarray:
    """A random crop of a large JPEG, of which no more detail is decoded than the crop needs."""
    box = augment_lib.crop_box(self._augment, self._view, rng, header.height, header.width)
    enough = min(box.height, box.width) / (_SPARE * self._view.image_size)
    reduction = next((r for r in decode.REDUCTIONS if r <= enough), 1)
    pixels = decode.decode(encoded, name, header, reduction)
    box = _reduced(box, reduction, pixels.shape)
    return resize.resize(pixels, self._view.image_size, self._augment.interpolation, box)


def _decoded(record: Record) -> np.ndarray:
  """Pixels uint8 [h, w, 3]."""
  if isinstance(record.image, np.ndarray):
    return record.image
  if not isinstance(record.image, bytes):
    raise TypeError(f'{record.id}: an image is wanted, not {type(record.image).__name__}.')
  return decode.decode(record.image, record.id)


def _reduced(box: resize.Box, reduction: int, shape: Sequence[int]) -> resize.Box:
  """The box in an image that was decoded at 1 / reduction of its size."""
  if reduction == 1:
    return box
  top, left = box.top // reduction, box.left // reduction
  bottom = min(shape[0], -(-(box.top + box.height) // reduction))
  right = min(shape[1], -(-(box.left + box.width) // reduction))
  return resize.Box(top, left, bottom - top, right - left)


def is_large(height: int, width: int, image_size: int) -> bool:
  """Whether a JPEG of this size is decoded at a fraction of it where a random crop allows that."""
  return min(height, width) >= min(decode.REDUCTIONS) * _SPARE * image_size
