"""Ways from JPEG files to training batches, the same boxes and mirrorings in each: what to compare.

All but this package's own are handed the boxes, and so are spared drawing them. They are written as
their libraries' guides and common training scripts have it.
"""

import dataclasses
import functools
import importlib.util
import io
import os
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
from PIL import Image

from losa_scenic.dataset_lib import augment, dataset_utils, decode, resize, sources
from losa_scenic.dataset_lib.loader import Loader

# What ImageNet training usually takes.
AUGMENT = augment.Augment(min_crop_area=0.08, flip=True)
SEED = 0
PILLOW = 'torchvision-style (Pillow)'

# Positions [b] and their images uint8 [b, s, s, 3].
Batch = tuple[np.ndarray, np.ndarray]
# One pass over all images.
Pass = Callable[[], Iterator[Batch]]
Maker = Callable[['Work'], Pass]


@dataclasses.dataclass(frozen=True)
class Work:
  """What is to be loaded.

  Attributes:
    source: n JPEG files; n is a multiple of `batch_size`.
    boxes: what is cut out of each.
    flips: whether it is mirrored then, bool [n].
    batch_size: images of a batch.
    image_size: side of the result in pixels.
    cores: that may be used.
  """

  source: sources.FileSource
  boxes: tuple[resize.Box, ...]
  flips: np.ndarray
  batch_size: int
  image_size: int
  cores: int

  @property
  def paths(self) -> list[str]:
    """The files."""
    return [os.path.join(self.source.root, file) for file in self.source.files]

  def positions(self) -> Iterator[np.ndarray]:
    """The positions [b] of each batch."""
    for start in range(0, len(self.source), self.batch_size):
      yield np.arange(start, start + self.batch_size)


def work(source: sources.FileSource, batch_size: int, image_size: int, cores: int) -> Work:
  """Draws what this package's loader draws in its first epoch.

  Args:
    source: upright JPEG files.
    batch_size: images of a batch; as many files as make no whole batch are left out.
    image_size: side of the result in pixels.
    cores: that may be used.
  """
  batch_size = min(batch_size, len(source))
  files = source.files[: len(source) - len(source) % batch_size]
  source = sources.FileSource(source.root, files, np.zeros(len(files), int), num_classes=1)
  boxes, flips = [], []
  for i in range(len(source)):
    record, rng = source[i], augment.generator(SEED, 0, i)
    assert isinstance(record.image, bytes)
    header = decode.read_header(record.image, record.id)
    box = augment.random_crop(rng, header.height, header.width, AUGMENT.min_crop_area)
    boxes.append(resize.Box(*box))
    flips.append(rng.random() < 0.5)
  return Work(source, tuple(boxes), np.array(flips), batch_size, image_size, cores)


def own(given: Work) -> Pass:
  """This package's, batch by batch."""
  view = resize.View(given.image_size)
  loader = Loader(given.source, view, augment=AUGMENT, seed=SEED)

  def batches() -> Iterator[Batch]:
    for positions in given.positions():
      yield positions, loader.batch(positions, np.zeros(len(positions), int))['inputs']

  return batches


def own_ahead(given: Work) -> Pass:
  """This package's, as training reads it: shuffled, and batches made ahead in threads."""
  pipeline = dataset_utils.Pipeline(
    batch_size=given.batch_size,
    eval_batch_size=given.batch_size,
    shuffle_seed=SEED,
    dtype_str='uint8',
    view=resize.View(given.image_size),
    augment=AUGMENT,
    cache_gigabytes=0.0,
  )
  splits = sources.Splits(given.source, None, given.source, ('all',))
  train_ds = dataset_utils.make_dataset(splits, pipeline).train_ds

  def batches() -> Iterator[Batch]:
    for batch in dataset_utils.iterate(train_ds, 0, len(given.source) // given.batch_size):
      yield np.asarray(batch['index']), np.asarray(batch['inputs'])

  return batches


def pillow(given: Work) -> Pass:
  """Pillow, step by step what torchvision's RandomResizedCrop and flip do by default."""

  def image(path: str, box: resize.Box, flip: bool) -> np.ndarray:
    with Image.open(path) as file:
      decoded = file.convert('RGB')
    corners = (box.left, box.top, box.left + box.width, box.top + box.height)
    size = (given.image_size, given.image_size)
    shown = decoded.crop(corners).resize(size, Image.Resampling.BILINEAR)
    if flip:
      shown = shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(shown)

  return _stacked(given, image)


def opencv(given: Work) -> Pass:
  """OpenCV with bilinear interpolation of the four nearest pixels, its default."""

  def image(path: str, box: resize.Box, flip: bool) -> np.ndarray:
    with open(path, 'rb') as file:
      encoded = np.frombuffer(file.read(), np.uint8)
    decoded = cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB)
    assert decoded is not None
    part = decoded[box.top : box.top + box.height, box.left : box.left + box.width]
    shown = cv2.resize(part, (given.image_size, given.image_size), interpolation=cv2.INTER_LINEAR)
    return cv2.flip(shown, 1) if flip else shown

  return _stacked(given, image)


def torchvision(given: Work) -> Pass:
  """torchvision's own functions on Pillow images, its default, and PyTorch's stacking."""
  torch: Any = importlib.import_module('torch')
  functional: Any = importlib.import_module('torchvision.transforms.functional')
  torch.set_num_threads(given.cores)

  def image(path: str, box: resize.Box, flip: bool) -> Any:
    with open(path, 'rb') as file:
      decoded = Image.open(io.BytesIO(file.read())).convert('RGB')
    shown = functional.resized_crop(decoded, *box, [given.image_size, given.image_size])
    return functional.pil_to_tensor(functional.hflip(shown) if flip else shown)

  def batches() -> Iterator[Batch]:
    paths = given.paths
    for positions in given.positions():
      images = [image(paths[i], given.boxes[i], bool(given.flips[i])) for i in positions]
      yield positions, torch.stack(images).permute(0, 2, 3, 1).numpy()

  return batches


def tf_data(given: Work, *, fused: bool, antialias: bool) -> Pass:
  """tf.data.

  Args:
    given: what is to be loaded.
    fused: whether only the box is decoded.
    antialias: of `tf.image.resize`, whose default is False.
  """
  tf: Any = importlib.import_module('tensorflow')

  def image(path: Any, box: Any, flip: Any) -> Any:
    encoded = tf.io.read_file(path)
    if fused:
      part = tf.image.decode_and_crop_jpeg(encoded, box, channels=3)
    else:
      decoded = tf.image.decode_jpeg(encoded, channels=3)
      part = tf.image.crop_to_bounding_box(decoded, box[0], box[1], box[2], box[3])
    shown = tf.image.resize(part, [given.image_size] * 2, antialias=antialias)
    shown = tf.cast(tf.round(shown), tf.uint8)
    return tf.cond(flip, lambda: tf.image.flip_left_right(shown), lambda: shown)

  options = tf.data.Options()
  options.threading.private_threadpool_size = given.cores
  boxes = np.array(given.boxes, np.int32)
  images = tf.data.Dataset.from_tensor_slices((given.paths, boxes, given.flips))
  images = images.map(image, num_parallel_calls=given.cores).batch(given.batch_size)
  images = images.prefetch(2).with_options(options)

  def batches() -> Iterator[Batch]:
    yield from zip(given.positions(), images.as_numpy_iterator(), strict=True)

  return batches


def all_loaders() -> tuple[dict[str, Maker], list[str]]:
  """Every loader.

  Returns:
    Name -> maker, of those whose library can be imported; and what the others lack.
  """
  found: dict[str, Maker] = {
    'losa_scenic': own,
    'losa_scenic, made ahead in threads': own_ahead,
    PILLOW: pillow,
    'torchvision': torchvision,
  }
  for name, fused, antialias in (
    ('tf.data: decode, crop, antialiased', False, True),
    ('tf.data: fused crop, antialiased', True, True),
    ('tf.data: fused crop, not antialiased', True, False),
  ):
    found[name] = functools.partial(tf_data, fused=fused, antialias=antialias)
  found['OpenCV, not antialiased'] = opencv
  lacks = []
  for module, prefix in (('torchvision', 'torchvision'), ('tensorflow', 'tf.data')):
    try:
      importlib.import_module(module)
    except Exception as error:  # Of a broken installation too.
      lacks.append(f'{module}: {error}')
      found = {k: v for k, v in found.items() if not k.startswith(prefix) or k == PILLOW}
  return found, lacks


def limit_threads(cores: int) -> None:
  """Makes TensorFlow use no more threads than there are cores; before its first work.

  OpenCV uses none of its own once `loader` is imported, and Pillow never does.
  """
  if importlib.util.find_spec('tensorflow') is not None:
    tf: Any = importlib.import_module('tensorflow')
    tf.config.threading.set_intra_op_parallelism_threads(cores)
    tf.config.threading.set_inter_op_parallelism_threads(cores)


def _stacked(given: Work, image: Callable[[str, resize.Box, bool], np.ndarray]) -> Pass:
  """Batches of what `image` makes of a path, a box and whether to mirror it."""

  def batches() -> Iterator[Batch]:
    paths = given.paths
    for positions in given.positions():
      shown = [image(paths[i], given.boxes[i], bool(given.flips[i])) for i in positions]
      yield positions, np.stack(shown)

  return batches
