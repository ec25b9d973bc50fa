"""What `check` found out about a data set."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from losa_scenic.dataset_lib.bad_files import Problem

# Ends of the buckets of the histograms, each part of the bucket above it.
SHORT_SIDES = (16, 32, 64, 128, 224, 256, 384, 512, 1024, 2048)
ASPECTS = (0.5, 0.75, 0.95, 1.05, 1.34, 2.0)
# Of each kind of repeat so many are named.
NAMED = 1000
# Data set -> attribute of `Report` -> why what it counts is a property of the set, and no trouble.
EXPECTED = {
  'sprites': dict.fromkeys(('leaks', 'conflicts'), 'symmetric shapes look the same when turned'),
  'vtab': {'empty_classes': 'the benchmark has 1,000 training images, whatever the classes'},
}


@dataclasses.dataclass(frozen=True)
class Image:
  """One image by name.

  Attributes:
    split: 'train', 'valid' or 'test'.
    index: its position there.
    id: its name.
    label: class name.
  """

  split: str
  index: int
  id: str
  label: str


@dataclasses.dataclass(frozen=True)
class Repeat:
  """An image that was there before: `again` has the content of `first`."""

  again: Image
  first: Image

  @property
  def kinds(self) -> tuple[str, ...]:
    """'leak' between splits or 'duplicate' within one, and 'labels' if the labels differ."""
    kind = 'duplicate' if self.again.split == self.first.split else 'leak'
    return (kind,) if self.again.label == self.first.label else ('labels', kind)


@dataclasses.dataclass(frozen=True)
class Part:
  """One split.

  Attributes:
    images: number of them, readable or not.
    broken: number that cannot be read.
    bytes: of the readable images as they are stored; of parts of a video file, the whole file.
    duplicates: number of images that repeat an earlier one of this split.
    class_counts: number of readable images of each class.
  """

  images: int
  broken: int
  bytes: int
  duplicates: int
  class_counts: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Clips:
  """How long the readable clips of all splits are.

  Attributes:
    frames: smallest, median and largest number of frames (of a part of a file, those of the part);
      empty if no clip can be read.
    seconds: the same of the durations; empty if no clip has a frame rate.
    frame_rates: frames per second, with up to two decimals ('29.97') -> number of clips, most
      frequent first.
    varying: number of clips whose frames stay on screen for different times.
    sampling: the fields of `clip_reader.Sampling` that a run would use; None if they are not known.
    short: number of clips that are shorter than a window of it; None if that is not known.
  """

  frames: tuple[int, ...]
  seconds: tuple[float, ...]
  frame_rates: Mapping[str, int]
  varying: int
  sampling: Mapping[str, Any] | None
  short: int | None


@dataclasses.dataclass(frozen=True)
class Reading:
  """How long it takes to read.

  Attributes:
    cores: of this machine.
    jobs: threads that the check read with.
    check_seconds: of reading every image of all splits once.
    sample: training images that were made into batches for the measurement, read before.
    images_per_second: of making them, nothing cached.
    epoch_seconds: what all training images would take at that rate.
    decoded_bytes: of the training images that the cache of the loader may keep, decoded.
    decoded_anew: number of those that it does not keep: large ones, of which random crops decode
      no more than they need.
    cache_bytes: of that cache.
  """

  cores: int
  jobs: int
  check_seconds: float
  sample: int
  images_per_second: float
  epoch_seconds: float
  decoded_bytes: int
  decoded_anew: int
  cache_bytes: int


@dataclasses.dataclass(frozen=True)
class Report:
  """What is in a data set; of a set of clips, each 'image' is a clip.

  Attributes:
    name: of the set.
    about: what was found where, see `sources.Splits`.
    class_names: one per class.
    image_size: side of what the model is shown, in pixels.
    parts: the splits by name, in the order train, valid, test.
    kinds: number of images of each format and mode ('JPEG RGB'), most frequent first; images that
      are stored as pixels are 'pixels RGB', video files 'mp4 h264' by their extension and codec,
      and clips of encoded frames 'frames JPEG RGB'.
    rotated: number of images that their EXIF orientation turns or mirrors, or of clips that are
      turned for display.
    sizes: (width, height) of the images with the smallest, median and largest short side; empty if
      no image can be read.
    distinct_sizes: number of different sizes.
    short_sides: number of images in the buckets below, between and above `SHORT_SIDES`.
    aspects: number of images by width / height in those of `ASPECTS`.
    enlarged: number of images whose short side is below `image_size`.
    broken: images that cannot be read.
    leaks: (split, later split) -> number of images of the later one that are in the first too.
    conflicts: number of images that have another label than the first of the same content.
    repeats: images that were there before, by name; of many only some, see `check`.
    reading: how long it takes; None if no training image can be read, or if it is not known which
      frames of clips to read.
    expected: what is no trouble in this set, and why; see `EXPECTED`.
    clips: lengths and rates; None for a set of images.
  """

  name: str
  about: tuple[str, ...]
  class_names: tuple[str, ...]
  image_size: int
  parts: Mapping[str, Part]
  kinds: Mapping[str, int]
  rotated: int
  sizes: tuple[tuple[int, int], ...]
  distinct_sizes: int
  short_sides: tuple[int, ...]
  aspects: tuple[int, ...]
  enlarged: int
  broken: tuple[Problem, ...]
  leaks: Mapping[tuple[str, str], int]
  conflicts: int
  repeats: tuple[Repeat, ...]
  reading: Reading | None
  expected: Mapping[str, str] = dataclasses.field(default_factory=dict)
  clips: Clips | None = None

  @property
  def noun(self) -> str:
    """'image' or 'clip': what this is a set of."""
    return 'image' if self.clips is None else 'clip'

  @property
  def images(self) -> int:
    """Number of images in all splits."""
    return sum(part.images for part in self.parts.values())

  @property
  def empty_classes(self) -> tuple[str, ...]:
    """Names of the classes without a readable training image."""
    counts = self.parts['train'].class_counts
    return tuple(n for n, count in zip(self.class_names, counts, strict=True) if not count)

  @property
  def troubles(self) -> tuple[str, ...]:
    """What ought to be mended, one short text each; empty if nothing."""
    return tuple(text for what, text in self._findings() if what not in self.expected)

  @property
  def notes(self) -> tuple[str, ...]:
    """What would be trouble in another set, with the reason why it is none in this one."""
    return tuple(
      f'{text} ({self.expected[what]})' for what, text in self._findings() if what in self.expected
    )

  def _findings(self) -> list[tuple[str, str]]:
    """(attribute, what is found there) of all that may be trouble."""
    texts = [('broken', len(self.broken), '{} cannot be read')]
    texts += [('leaks', n, f'{{}} of {b} also in {a}') for (a, b), n in self.leaks.items()]
    texts += [('conflicts', self.conflicts, '{} repeated with another label')]
    found = [(what, text.format(plural(count, self.noun))) for what, count, text in texts if count]
    if self.empty_classes:
      number = plural(len(self.empty_classes), 'class', 'classes')
      found.append(('empty_classes', f'{number} without a training {self.noun}'))
    return found + [
      ('parts', f'no {name} {self.noun}s') for name, part in self.parts.items() if not part.images
    ]

  def to_json(self) -> dict[str, Any]:
    """The report as dicts, lists, numbers and texts, with `troubles` and `notes`."""
    plain = dataclasses.asdict(self)
    plain['broken'] = [problem._asdict() for problem in self.broken]
    plain['leaks'] = {'/'.join(pair): count for pair, count in self.leaks.items()}
    derived = ('empty_classes', 'troubles', 'notes')
    return plain | {name: getattr(self, name) for name in derived}


def plural(number: int, one: str, many: str = '') -> str:
  """'1 image', '2,000 images'."""
  return f'{number:,} {one if number == 1 else many or one + "s"}'
