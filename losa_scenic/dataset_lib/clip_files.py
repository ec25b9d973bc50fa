"""Clips in video files, as a source."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from losa_scenic.dataset_lib import sources
from losa_scenic.dataset_lib.frame_sampling import WHOLE, Segment

ORDERS = ('forward', 'backward', 'shuffled')


class Clip(NamedTuple):
  """A video file, or a part of one, that nothing was read of yet.

  Attributes:
    path: of the file.
    segment: the part that is meant.
    order: of the frames of a window, one of `ORDERS`.
  """

  path: str
  segment: Segment = WHOLE
  order: str = ORDERS[0]


class ClipFiles(sources.FileSource):
  """Clips in files; which frames are decoded, the pipeline decides.

  Attributes:
    segments: the part of each file that is meant; None for the whole files.
  """

  def __init__(
    self,
    root: str | os.PathLike[str],
    files: Sequence[str],
    labels: Sequence[int] | np.ndarray,
    *,
    num_classes: int,
    segments: Sequence[Segment] | None = None,
  ) -> None:
    """Keeps the names; opens nothing.

    Args:
      root: a folder.
      files: n names relative to it, with '/'; one may occur several times, with other segments.
      labels: integers [n] in [0, num_classes).
      num_classes: number of classes.
      segments: n parts of the files; None for the whole files.

    Raises:
      errors.UserError: for a label out of range or a file outside `root`, naming the file.
      ValueError: for another number of segments.
    """
    super().__init__(root, files, labels, num_classes=num_classes)
    if segments is not None and len(segments) != len(self.files):
      raise ValueError(f'{len(self.files)} files need as many segments, not {len(segments)}.')
    self.segments = None if segments is None else list(segments)

  def __getitem__(self, index: int) -> sources.Record:
    """See `sources.Source`."""
    path = self.id(index)
    segment = WHOLE if self.segments is None else self.segments[index]
    return sources.Record(Clip(path, segment), int(self.labels[index]), path)
