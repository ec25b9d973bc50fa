"""Augmentation on the host: what `config.augment` describes, on images uint8 [h, w, 3], red first.

Order: random resized crop (the box here, the resizing by the loader), flip, colour jitter,
RandAugment, random erasing, then mixup or cutmix of the batch. Everything is a pure function of a
`np.random.Generator`, made from the seed, the epoch and the image's position, so a run that goes on
after a stop, or that has another number of processes, repeats the same images.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import randaugment
from losa_scenic.dataset_lib.resize import INTERPOLATIONS, Box

_CROP_ASPECT = (3 / 4, 4 / 3)
_ERASED_AREA = (0.02, 0.33)
_ERASED_ASPECT = (0.3, 3.3)
_TRIES = 10
_JITTERS = (randaugment.brightness, randaugment.contrast, randaugment.saturation)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
  """What is done to training images; by default nothing.

  Attributes:
    min_crop_area: random resized crops have at least this share of the area, and width / height in
      [3/4, 4/3]; 1 = no crops.
    flip: whether images are mirrored left-right, half of the time.
    color_jitter: brightness, contrast and saturation, each by a factor in [1 - s, 1 + s], in random
      order; in [0, 1].
    randaugment_ops: RandAugment (see `randaugment`): this many random operations ...
    randaugment_magnitude: ... of this strength, in [0, 10].
    erasing_probability: of random erasing, for each image.
    mixup_alpha: mixup by shares from Beta(alpha, alpha); 0 = off.
    cutmix_alpha: the same of cutmix; with both on, each image draws one of them.
    interpolation: how crops are resized: one of `resize.INTERPOLATIONS`.
  """

  min_crop_area: float = 1.0
  flip: bool = False
  color_jitter: float = 0.0
  randaugment_ops: int = 0
  randaugment_magnitude: float = 9.0
  erasing_probability: float = 0.0
  mixup_alpha: float = 0.0
  cutmix_alpha: float = 0.0
  interpolation: str = 'fast'

  def __post_init__(self) -> None:
    """Raises `errors.UserError` for values out of range, naming 'augment.' and the field."""
    if not 0 < self.min_crop_area <= 1:
      raise errors.UserError(f'augment.min_crop_area must be in (0, 1]: {self.min_crop_area}.')
    for field, most in (
      ('color_jitter', 1),
      ('randaugment_magnitude', 10),
      ('erasing_probability', 1),
    ):
      if not 0 <= getattr(self, field) <= most:
        raise errors.UserError(f'augment.{field} must be in [0, {most}]: {getattr(self, field)}.')
    for field in ('mixup_alpha', 'cutmix_alpha'):
      if not 0 <= getattr(self, field) < math.inf:
        raise errors.UserError(f'augment.{field} must be at least 0: {getattr(self, field)}.')
    errors.one_of('augment.interpolation', self.interpolation, INTERPOLATIONS)
    ops = self.randaugment_ops
    if isinstance(ops, bool) or not isinstance(ops, int) or ops < 0:
      raise errors.UserError(f'augment.randaugment_ops must be an integer of at least 0: {ops}.')

  @property
  def crops(self) -> bool:
    """Whether images are cropped."""
    return self.min_crop_area < 1

  @property
  def mixes(self) -> bool:
    """Whether the images of a batch are mixed."""
    return self.mixup_alpha > 0 or self.cutmix_alpha > 0

  @property
  def active(self) -> bool:
    """Whether anything is done."""
    alone = self.flip or self.color_jitter > 0 or self.randaugment_ops > 0
    return self.crops or alone or self.erasing_probability > 0 or self.mixes


class Mixed(NamedTuple):
  """A mixed batch: the target is `share` of the image's own label, the rest of its partner's.

  Attributes:
    images: uint8 [b, h, w, 3].
    partner_labels: int32 [b].
    share: of the image itself, float32 [b], from about 0.5 (boxes are whole pixels) to 1; 1 where
      nothing was mixed.
  """

  images: np.ndarray
  partner_labels: np.ndarray
  share: np.ndarray


def generator(seed: int, epoch: int, index: int, stream: int = 0) -> np.random.Generator:
  """The random numbers of one image in one epoch.

  Philox (Salmon et al. 2011), keyed by seed and epoch; index and stream are the upper half of its
  counter. So no two of them overlap, and making one takes a few microseconds. NumPy promises the
  raw numbers for all its versions and platforms, but not how others are made of them.

  Args:
    seed: any integer; taken modulo 2^64.
    epoch: in [0, 2^64).
    index: the image's position, in [0, 2^64).
    stream: the use that is made of it, in [0, 2^64).
  """
  key = int(seed) % 2**64 + (int(epoch) << 64)
  counter = (int(index) << 192) + (int(stream) << 128)
  return np.random.Generator(np.random.Philox(key=key, counter=counter))


def random_crop(rng: np.random.Generator, height: int, width: int, min_area: float) -> Box:
  """The box of a random resized crop (Szegedy et al. 2015), drawn as by torchvision.

  Ten tries of an area, uniform in [min_area, 1] of the image's, and width / height, log-uniform in
  [3/4, 4/3]; if no try fits, the largest central box of an allowed shape.

  Args:
    rng: decides.
    height: of the image, in pixels, at least 1.
    width: the same.
    min_area: least share of the area, in (0, 1].
  """
  box = _random_box(rng, height, width, (min_area, 1.0), _CROP_ASPECT)
  if box is not None:
    return box
  low, high = _CROP_ASPECT
  crop_height = min(height, round(width / low))
  crop_width = min(width, round(height * high))
  return Box((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)


def apply(augment: Augment, rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
  """Flip, colour jitter, RandAugment and random erasing, in this order, of those that are on.

  Args:
    augment: says what is on.
    rng: decides.
    image: uint8 [h, w, 3]; not modified.

  Returns:
    uint8 [h, w, 3]; `image` itself if nothing was done to it.
  """
  if augment.flip and rng.random() < 0.5:
    image = cv2.flip(image, 1)
  if augment.color_jitter > 0:
    image = color_jitter(rng, image, augment.color_jitter)
  if augment.randaugment_ops:
    image = randaugment.randaugment(
      rng, image, augment.randaugment_ops, augment.randaugment_magnitude
    )
  if augment.erasing_probability > 0 and rng.random() < augment.erasing_probability:
    image = erase(rng, image)
  return image


def color_jitter(rng: np.random.Generator, image: np.ndarray, strength: float) -> np.ndarray:
  """Brightness, contrast and saturation by random factors, in random order, as by torchvision.

  Args:
    rng: decides.
    image: uint8 [h, w, 3]; not modified.
    strength: the factors are uniform in [1 - strength, 1 + strength].
  """
  factors = rng.uniform(1 - strength, 1 + strength, len(_JITTERS))
  for i in rng.permutation(len(_JITTERS)):
    image = _JITTERS[i](image, float(factors[i]))
  return image


def erase(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
  """Random erasing (Zhong et al. 2020): a box is filled with noise, uniform in 0..255.

  The box has 2 to 33 % of the area, and width / height log-uniform in [0.3, 3.3]. An image in which
  no box fits in ten tries (a very long one) stays as it is.
  """
  height, width = image.shape[:2]
  box = _random_box(rng, height, width, _ERASED_AREA, _ERASED_ASPECT)
  if box is None:
    return image
  erased = image.copy()
  top, left, height, width = box
  noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
  erased[top : top + height, left : left + width] = noise
  return erased


def mix(
  augment: Augment,
  rngs: Sequence[np.random.Generator],
  images: np.ndarray,
  labels: np.ndarray,
) -> Mixed:
  """Mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019) of neighbours in a batch.

  Image 2i is mixed with image 2i + 1, and that one with it, each by a draw of its own. So nothing
  depends on the size of the batch: parts of even size, as several hosts or processes make them,
  give the images that the whole batch gives. An odd last image stays as it is. Of the two shares
  that are drawn an image gets the larger: its partner is in the batch too, and else both might show
  nearly the same.

  Args:
    augment: says which; with both on, each image draws one of them.
    rngs: one generator for each image. Images beyond them (empty slots) stay as they are.
    images: uint8 [b, h, w, 3]; not modified.
    labels: class ids, integers [b].

  Returns:
    The mixed images, and by what their labels are to be mixed.

  Raises:
    ValueError: for more generators than images.
  """
  if len(rngs) > len(images):
    raise ValueError(f'{len(rngs)} generators for {len(images)} images.')
  partners, paired = np.arange(len(images)), len(rngs) - len(rngs) % 2
  partners[:paired] ^= 1
  mixed, share = images.copy(), np.ones(len(images), np.float32)
  if augment.mixes:
    for i in range(paired):
      mixed[i], share[i] = _mix_two(augment, rngs[i], images[i], images[partners[i]])
  return Mixed(mixed, np.asarray(labels)[partners].astype(np.int32), share)


def _mix_two(
  augment: Augment, rng: np.random.Generator, image: np.ndarray, other: np.ndarray
) -> tuple[np.ndarray, float]:
  """An image mixed with another, and its own share in it."""
  is_mixup = augment.mixup_alpha > 0
  if is_mixup and augment.cutmix_alpha > 0:
    is_mixup = rng.random() < 0.5
  alpha = augment.mixup_alpha if is_mixup else augment.cutmix_alpha
  share = rng.beta(alpha, alpha)
  share = max(share, 1 - share)
  if is_mixup:
    return cv2.addWeighted(image, share, other, 1 - share, 0), share
  side = math.sqrt(1 - share)
  rows, columns = (_span(rng, size, side * size) for size in image.shape[:2])
  pasted = image.copy()
  pasted[rows, columns] = other[rows, columns]
  area = (rows.stop - rows.start) * (columns.stop - columns.start)
  return pasted, 1 - area / (image.shape[0] * image.shape[1])


def _span(rng: np.random.Generator, size: int, length: float) -> slice:
  """Pixels about a centre that is uniform in [0, size), cut to the image."""
  centre = rng.random() * size
  return slice(max(0, round(centre - length / 2)), min(size, round(centre + length / 2)))


def _random_box(
  rng: np.random.Generator,
  height: int,
  width: int,
  areas: tuple[float, float],
  aspects: tuple[float, float],
) -> Box | None:
  """A box of random area (share of the image's), width / height and place; None if none fits."""
  low, high = math.log(aspects[0]), math.log(aspects[1])
  for _ in range(_TRIES):
    area = rng.uniform(*areas) * height * width
    aspect = math.exp(rng.uniform(low, high))
    box_height, box_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
    if 0 < box_height <= height and 0 < box_width <= width:
      top = int(rng.integers(height - box_height + 1))
      left = int(rng.integers(width - box_width + 1))
      return Box(top, left, box_height, box_width)
  return None
