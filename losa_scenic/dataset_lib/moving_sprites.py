"""Clips of a moving sprite, drawn on demand, where only motion tells the class.

A white shape (see `sprites`) stands at T places of a level line at equal distances, at each in one
of T frames. Shape, size, tilt, and height and length of the line are random. The class is the order
of the places:

  direction   from left to right, or from right to left
  order       one after another in either direction, or shuffled
  speed       one pass, or two quick ones, each over every other place, in either direction

So the frames of a clip, taken without their order, are distributed alike in both classes: no model
that treats frames alone and then takes their mean can be better than chance, which is 50 %.
"""

import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import sources, sprites

# label -> its classes.
LABELS = {
  'direction': ('right', 'left'),
  'order': ('ordered', 'shuffled'),
  'speed': ('slow', 'fast'),
}
_SCALE = (0.3, 0.6)  # 1 reaches 0.22 image sides from the middle of the shape
_LENGTH = (0.5, 0.7)  # of the line, in image sides


class MovingSprites:
  """Clips drawn when they are asked for, as a source.

  Attributes:
    label: a key of `LABELS`.
    labels: int32 [n].
  """

  def __init__(self, label: str, start: int, count: int, frames: int, image_size: int, seed: int):
    """Draws nothing yet.

    Args:
      label: a key of `LABELS`.
      start: number of the first clip, at least 0; the same number is the same clip.
      count: number of clips.
      frames: of each clip.
      image_size: side of the frames in pixels.
      seed: another one gives other clips.
    """
    self.label, self.labels = label, (start + np.arange(count, dtype=np.int32)) % 2
    self._start, self._frames, self._size, self._seed = start, frames, image_size, seed

  def __len__(self) -> int:
    """Number of clips."""
    return len(self.labels)

  def __getitem__(self, index: int) -> sources.Record:
    """See `sources.Source`: pixels uint8 [t, s, s, 3]."""
    number, label = self._start + index, int(self.labels[index])
    # RandomState, unlike default_rng, promises the same numbers in every numpy version.
    rng = np.random.RandomState([self._seed, number])
    places = order(rng, self.label, label, self._frames)
    shape, scale, tilt = rng.randint(len(sprites.SHAPES)), rng.uniform(*_SCALE), rng.uniform()
    length, reach = rng.uniform(*_LENGTH), 0.22 * scale
    left, height = rng.uniform(reach, 1 - reach - length), rng.uniform(reach, 1 - reach)
    across = left + length * places / (self._frames - 1)
    centres = np.stack([across, np.full(self._frames, height)], axis=-1)
    same = np.ones(self._frames)
    pixels = sprites.draw(
      np.full(self._frames, shape), scale * same, 2 * np.pi * tilt * same, centres, self._size
    )
    return sources.Record(pixels, label, f'moving_sprites[{number}]')


def order(rng: np.random.RandomState, label: str, value: int, count: int) -> np.ndarray:
  """The places 0..count-1 of a line, from left to right, in the order of a class.

  Args:
    rng: decides what the class leaves open.
    label: a key of `LABELS`.
    value: class id, 0 or 1.
    count: number of places, at least 4.

  Returns:
    int64 [count], a permutation.
  """
  places = np.arange(count)
  if label == 'speed' and value:
    places = np.concatenate([places[::2], places[1::2]])
  elif label == 'order' and value:
    places = rng.permutation(count)
    while len({*np.diff(places).tolist()}) == 1:
      places = rng.permutation(count)
  backwards = value if label == 'direction' else rng.randint(2)
  return places[::-1] if backwards else places


def splits(
  *,
  image_size: int,
  frames: int,
  label: str = 'direction',
  num_train: int = 2000,
  num_val: int = 200,
  num_test: int = 1000,
  seed: int = 0,
) -> sources.Splits:
  """Clips in three parts that share none.

  Args:
    image_size: side of the frames in pixels.
    frames: of a clip, at least 4.
    label: 'direction', 'order' or 'speed'; 2 classes each.
    num_train: number of training clips.
    num_val: number of validation clips; 0 for no validation split.
    num_test: number of test clips.
    seed: which clips are drawn, at least 0.

  Returns:
    Sources that draw a clip each time it is asked for.

  Raises:
    errors.UserError: for an unknown label or values out of range.
  """
  errors.one_of("label of dataset 'moving_sprites'", label, LABELS)
  counts = {'num_train': num_train, 'num_val': num_val, 'num_test': num_test, 'seed': seed}
  for option, value in counts.items():
    errors.check_at_least(option, value, 0)
  errors.check_at_least('frames', frames, 4)

  def source(start: int, count: int) -> MovingSprites:
    return MovingSprites(label, start, count, frames, image_size, seed)

  return sources.Splits(
    train=source(0, num_train),
    valid=source(num_train, num_val) if num_val else None,
    test=source(num_train + num_val, num_test),
    class_names=LABELS[label],
    about=(f'moving sprites, drawn as they are needed: only their {label} tells the class',),
    clips=True,
    whole=True,
    sided=label == 'direction',
  )
