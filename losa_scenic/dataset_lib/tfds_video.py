"""The feature `Video` of TFDS: a clip as a sequence of encoded images, read without TensorFlow."""

import functools
import importlib.util
from typing import Any

# As `features.json` of a set writes it.
_NAME = 'tensorflow_datasets.core.features.video_feature.Video'


def is_frames(feature: Any, kinds: Any) -> bool:
  """Whether a feature is a sequence of encoded images.

  Args:
    feature: of a set.
    kinds: the module `tensorflow_datasets.features`.
  """
  return isinstance(feature, kinds.Sequence) and isinstance(feature.feature, kinds.Image)


def stored_frames(kinds: Any) -> Any:
  """The feature that reads what `is_frames` stores as a list of encoded images."""
  return kinds.Sequence(kinds.Text())


@functools.cache
def open_without_tensorflow(kinds: Any) -> None:
  """Where TensorFlow is not installed, lets TFDS open sets that have the feature.

  TFDS's own class asks TensorFlow for the name of a type before anything is read. What it stores is
  a sequence of images, which TFDS reads without: that takes its place.

  Args:
    kinds: the module `tensorflow_datasets.features`.
  """
  if importlib.util.find_spec('tensorflow') is not None:
    return
  assert kinds.Video  # Imported later, it would take its place back.

  class EncodedVideo(kinds.Sequence):
    """Frames of any size."""

    ALIASES = (_NAME,)  # Classes that sets name otherwise.

    @classmethod
    def from_json_content(cls, value: Any) -> Any:
      """Sizes and rates of the frames are not needed."""
      del value
      return cls(kinds.Image())
