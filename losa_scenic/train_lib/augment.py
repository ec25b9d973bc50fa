"""Augmentation on the device: pure functions of a key and a batch, so a resumed run repeats them.

Order: normalise, random resized crop and flip, colour jitter, then mixup or cutmix.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float

from losa_scenic.common_lib.types import Array, Batch, Config
from losa_scenic.model_lib import vit
from losa_scenic.model_lib.spec import BackboneSpec

Images = Float[Array, 'b h w c']


def make_augment(
  block: Config, spec: BackboneSpec, num_classes: int
) -> Callable[[Array, Batch], Batch] | None:
  """The function that `config.augment` describes, or None if everything is off.

  Args:
    block: fields min_crop_area, flip, color_jitter, mixup_alpha, cutmix_alpha.
    spec: says how integer images are normalised.
    num_classes: width of the label probabilities that mixing makes.

  Returns:
    `augment(rng, batch)`: 'inputs' become normalised floats; labels stay ids [b], or become
    probabilities [b classes] where images are mixed.
  """
  mixes = [
    (mix, alpha)
    for mix, alpha in ((mixup, block.mixup_alpha), (cutmix, block.cutmix_alpha))
    if alpha > 0
  ]
  moves = block.min_crop_area < 1 or block.flip
  if not (mixes or moves or block.color_jitter > 0):
    return None

  def augment(rng: Array, batch: Batch) -> Batch:
    crop_rng, jitter_rng, choice_rng, mix_rng = jax.random.split(rng, 4)
    images, labels = vit.normalize(batch['inputs'], spec), batch['label']
    if moves:
      images = crop_and_flip(crop_rng, images, block.min_crop_area, block.flip)
    if block.color_jitter > 0:
      images = color_jitter(jitter_rng, images, block.color_jitter)
    if mixes:
      labels = jax.nn.one_hot(labels, num_classes)
      branches = [lambda r, x, y, m=m, a=a: m(r, x, y, a) for m, a in mixes]
      choice = jax.random.randint(choice_rng, (), 0, len(branches))
      images, labels = jax.lax.switch(choice, branches, mix_rng, images, labels)
    return {**batch, 'inputs': images, 'label': labels}

  return augment


def crop_and_flip(rng: Array, images: Images, min_area: float, flip: bool) -> Images:
  """Random resized crop (area in [min_area, 1], aspect in [3/4, 4/3]), each flipped half the time.

  Bilinear: crops are only ever enlarged, so nothing aliases. A crop whose side would exceed the
  image is cut to it.
  """
  b, h, w, _ = images.shape
  area_rng, aspect_rng, y_rng, x_rng, flip_rng = jax.random.split(rng, 5)
  area = jax.random.uniform(area_rng, (b,), minval=min_area, maxval=1.0)
  bound = jnp.log(4 / 3) if min_area < 1 else 0.0
  aspect = jnp.exp(jax.random.uniform(aspect_rng, (b,), minval=-bound, maxval=bound))
  crop_h = jnp.minimum(1.0, jnp.sqrt(area / aspect))
  crop_w = jnp.minimum(1.0, jnp.sqrt(area * aspect))
  top = jax.random.uniform(y_rng, (b,)) * (1 - crop_h) * h
  left = jax.random.uniform(x_rng, (b,)) * (1 - crop_w) * w
  flipped = jax.random.bernoulli(flip_rng, 0.5, (b,)) if flip else jnp.zeros((b,), bool)

  def one(image: Array, scale: Array, offset: Array, mirror: Array) -> Array:
    # Output pixel = input pixel * scale + translation, pixel centres at half integers.
    out = jax.image.scale_and_translate(
      image, image.shape, (0, 1), scale, -offset * scale, method='linear', antialias=False
    )
    return jnp.where(mirror, out[:, ::-1], out)

  scale = jnp.stack([1 / crop_h, 1 / crop_w], axis=1)
  return jax.vmap(one)(images, scale, jnp.stack([top, left], axis=1), flipped)


def color_jitter(rng: Array, images: Images, strength: float) -> Images:
  """Brightness, contrast and saturation, each by a factor in [1 - strength, 1 + strength].

  Works on normalised images: brightness shifts by up to `strength`.
  """
  b = images.shape[0]
  light, contrast, saturation = (
    jax.random.uniform(key, (b, 1, 1, 1), minval=-strength, maxval=strength)
    for key in jax.random.split(rng, 3)
  )
  images = images + light
  mean = images.mean(axis=(1, 2, 3), keepdims=True)
  images = mean + (images - mean) * (1 + contrast)
  grey = images.mean(axis=3, keepdims=True)
  return grey + (images - grey) * (1 + saturation)


def mixup(rng: Array, images: Images, labels: Array, alpha: float) -> tuple[Array, Array]:
  """Mixes the batch with its reverse by one Beta(alpha, alpha) draw (Zhang et al. 2018)."""
  share = jax.random.beta(rng, alpha, alpha)
  mixed = share * images + (1 - share) * images[::-1]
  return mixed, share * labels + (1 - share) * labels[::-1]


def cutmix(rng: Array, images: Images, labels: Array, alpha: float) -> tuple[Array, Array]:
  """Pastes one box of the reversed batch; labels mix by its true area (Yun et al. 2019)."""
  b, h, w, _ = images.shape
  del b
  share_rng, y_rng, x_rng = jax.random.split(rng, 3)
  side = jnp.sqrt(1 - jax.random.beta(share_rng, alpha, alpha))
  centre_y, centre_x = jax.random.uniform(y_rng) * h, jax.random.uniform(x_rng) * w
  rows, columns = jnp.arange(h) + 0.5, jnp.arange(w) + 0.5
  in_rows = jnp.abs(rows - centre_y) < side * h / 2
  in_columns = jnp.abs(columns - centre_x) < side * w / 2
  box = in_rows[:, None] & in_columns[None, :]
  share = 1 - box.mean()
  mixed = jnp.where(box[None, :, :, None], images[::-1], images)
  return mixed, share * labels + (1 - share) * labels[::-1]
