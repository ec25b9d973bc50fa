"""Augmentation on the host: what `config.augment` describes, on images uint8 [h, w, 3], red first.

Order: random crop (the box here, the resizing by the reader), flip, colour jitter, RandAugment,
random erasing, then mixup or cutmix of the batch; of a clip every frame gets the same. Everything
is a pure function of a `np.random.Generator`, made from the seed, the epoch and the image's
position, so a run that goes on after a stop, or that has another number of processes, repeats the
same images.
"""

import copy
import dataclasses
import math
from typing import Any

import cv2
import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import randaugment
from losa_scenic.dataset_lib.resize import INTERPOLATIONS, Box, View

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
      [3/4, 4/3]; 1 = no such crops.
    square_crops: in their stead, squares anywhere in the image. Their side is what
      `View.central_crop` says (else the shorter one), divided by a factor uniform in [min_scale,
      max_scale]: the scale jitter of ViViT (0.9 to 1.33).
    min_scale: see there; above 0.
    max_scale: see there; at least `min_scale`.
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
  square_crops: bool = False
  min_scale: float = 1.0
  max_scale: float = 1.0
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
    if self.square_crops and self.min_crop_area < 1:
      raise errors.UserError('Choose one: augment.square_crops or augment.min_crop_area.')
    if not 0 < self.min_scale <= self.max_scale < math.inf:
      raise errors.UserError(
        'augment.min_scale must be above 0 and at most augment.max_scale: '
        f'{self.min_scale}, {self.max_scale}.'
      )
    if not self.square_crops and (self.min_scale, self.max_scale) != (1, 1):
      raise errors.UserError('augment.min_scale and max_scale need augment.square_crops.')
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
    return self.min_crop_area < 1 or self.square_crops

  @property
  def crop_settings(self) -> dict[str, Any] | None:
    """How crops are drawn; None without."""
    if not self.crops:
      return None
    names = ('min_scale', 'max_scale') if self.square_crops else ('min_crop_area',)
    return {name: getattr(self, name) for name in (*names, 'interpolation')}

  @property
  def mixes(self) -> bool:
    """Whether the images of a batch are mixed."""
    return self.mixup_alpha > 0 or self.cutmix_alpha > 0

  @property
  def active(self) -> bool:
    """Whether anything is done."""
    return self.crops or self.alone or self.mixes

  @property
  def alone(self) -> bool:
    """Whether `apply` does anything."""
    drawn = self.flip or self.color_jitter > 0 or self.randaugment_ops > 0
    return drawn or self.erasing_probability > 0


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


def crop_box(
  augment: Augment, view: View, rng: np.random.Generator, height: int, width: int
) -> Box:
  """The box of the random crop that is on.

  Args:
    augment: says which, and how large.
    view: what is shown without a crop.
    rng: decides.
    height: of the image, in pixels, at least 1.
    width: the same.
  """
  if not augment.square_crops:
    return random_crop(rng, height, width, augment.min_crop_area)
  shorter = min(height, width)
  scale = rng.uniform(augment.min_scale, augment.max_scale)
  side = min(shorter, max(1, round((view.central_crop or 1.0) * shorter / scale)))
  top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
  return Box(top, left, side, side)


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


def apply_to_clip(augment: Augment, rng: np.random.Generator, frames: np.ndarray) -> np.ndarray:
  """`apply` with the same random numbers for every frame.

  Args:
    augment: says what is on.
    rng: decides; afterwards in the state that one frame leaves.
    frames: uint8 [t, h, w, 3]; not modified.

  Returns:
    uint8 [t, h, w, 3].
  """
  if not augment.alone:
    return frames
  state = copy.deepcopy(rng.bit_generator.state)
  shown = np.empty_like(frames)
  for i, frame in enumerate(frames):
    rng.bit_generator.state = state
    shown[i] = apply(augment, rng, frame)
  return shown


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
