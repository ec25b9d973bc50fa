"""How a clip is played, forward, backward or shuffled: exact labels made of any set of clips.

Every clip occurs three times, once in each class, and the frames of a window are the same for all
three but for their order (in evaluation; in training each has a window of its own at random). So
only what changes over time tells the class: a model that treats frames alone and takes their mean
is right for one clip in three.
"""

from losa_scenic.common_lib import config as config_lib
from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import clip_files, detect, sources

CLASSES = clip_files.ORDERS


class Playback:
  """Every clip of a source in each order: positions 3 i + k are clip i in the order k.

  Attributes:
    source: the clips.
  """

  def __init__(self, source: sources.Source) -> None:
    """Keeps the source."""
    self.source = source

  def __len__(self) -> int:
    """Number of clips, times three."""
    return len(self.source) * len(CLASSES)

  def id(self, index: int) -> str | None:
    """See `sources.name`."""
    number, label = divmod(index, len(CLASSES))
    name = sources.name(self.source, number)
    return None if name is None else f'{name} ({CLASSES[label]})'

  def __getitem__(self, index: int) -> sources.Record:
    """See `sources.Source`."""
    number, label = divmod(index, len(CLASSES))
    image, _, name = self.source[number]
    if not isinstance(image, clip_files.Clip):
      raise errors.UserError(f'{name}: playback is for clips in video files.')
    return sources.Record(image._replace(order=CLASSES[label]), label, f'{name} ({CLASSES[label]})')


def splits(*, frames: int, root: str | None = None, of: str = 'auto') -> sources.Splits:
  """Opens a set of clips and takes the way of playing for its labels.

  Args:
    frames: of a window, at least 4: of fewer, a shuffle is hardly one.
    root: clips in video files, of the set `of` with its default options; required.
    of: a data set, or 'auto' for whatever is found at `root`.

  Returns:
    The parts of that set, each three times as long.

  Raises:
    errors.UserError: as the set at `root`, or if it holds images.
  """
  from losa_scenic.dataset_lib import datasets  # Which knows this set in turn.

  errors.check_at_least('frames', frames, 4)
  try:
    name = detect.detect(root) if of == datasets.AUTO else of
  except errors.UserError as error:
    raise errors.UserError(f'playback: {error} Here: --config.dataset_configs.of=NAME.') from error
  make = datasets.get_dataset(name)
  if make is splits:
    raise errors.UserError("playback: 'of' must be another set.")
  found = config_lib.build(make, block={'root': root}, what=f"dataset '{name}'")
  if not found.clips:
    raise errors.UserError(f"{root} holds images ('{name}'); playback is for clips.")
  valid = None if found.valid is None else Playback(found.valid)
  return sources.Splits(
    Playback(found.train),
    valid,
    Playback(found.test),
    CLASSES,
    (*found.about, f'labels: how each clip is played ({", ".join(CLASSES)})'),
    clips=True,
  )
