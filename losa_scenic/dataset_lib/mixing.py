"""Mixup and cutmix of the images or clips of a batch, in pairs; see `augment` for the rest."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from losa_scenic.dataset_lib.augment import Augment


class Mixed(NamedTuple):
  """A mixed batch: the target is `share` of the image's own label, the rest of its partner's.

  Attributes:
    images: uint8 [b, h, w, 3], or [b, t, h, w, 3].
    partner_labels: int32 [b].
    share: of the image itself, float32 [b], from about 0.5 (boxes are whole pixels) to 1; 1 where
      nothing was mixed.
  """

  images: np.ndarray
  partner_labels: np.ndarray
  share: np.ndarray


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
    images: uint8 [b, h, w, 3], or clips [b, t, h, w, 3]; not modified.
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
    flat = cv2.addWeighted(image.reshape(-1, 3), share, other.reshape(-1, 3), 1 - share, 0)
    return flat.reshape(image.shape), share
  side = math.sqrt(1 - share)
  height, width = image.shape[-3:-1]
  rows, columns = _span(rng, height, side * height), _span(rng, width, side * width)
  pasted = image.copy()
  pasted[..., rows, columns, :] = other[..., rows, columns, :]
  area = (rows.stop - rows.start) * (columns.stop - columns.start)
  return pasted, 1 - area / (height * width)


def _span(rng: np.random.Generator, size: int, length: float) -> slice:
  """Pixels about a centre that is uniform in [0, size), cut to the image."""
  centre = rng.random() * size
  return slice(max(0, round(centre - length / 2)), min(size, round(centre + length / 2)))
