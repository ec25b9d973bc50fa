"""Images or clips of a TFDS set in array_record files, by position, without TensorFlow.

Encoded images stay encoded, clips are lists of them, and of an example only the features that are
asked for are parsed.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import sources, tfds_builders, tfds_video
from losa_scenic.dataset_lib.sources import BadImage, Record

# An example as TFDS gives it: feature -> bytes, number, array, or a dict or list of these.
Example = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Fields:
  """What of an example is read, and how it becomes a record. It pickles if its functions do.

  Attributes:
    num_classes: labels lie in [0, num_classes).
    image_key: feature of the image: encoded, or pixels uint8 [h, w, 1] or [h, w, 3]; or of the
      clip: a sequence of encoded images, such as a `Video`, or pixels uint8 [t, h, w, 1 or 3].
    label_key: feature of the label, if `label` is None.
    label: makes the label from the example where it is not stored as such.
    label_features: the features that `label` reads, e.g. {'objects': {'type': True}}.
    image: (stored image, its name) -> image, where it must be changed before it is one; else None.
  """

  num_classes: int
  image_key: str = 'image'
  label_key: str = 'label'
  label: Callable[[Example], int] | None = None
  label_features: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  image: Callable[[bytes | np.ndarray, str], bytes | np.ndarray] | None = None

  @property
  def wanted(self) -> dict[str, Any]:
    """The features to read, as `tfds.decode.PartialDecoding` takes them."""
    return {self.image_key: True, **(self.label_features or {self.label_key: True})}

  def decoders(self, features: Any, where: str) -> dict[str, Any] | None:
    """The decoders that leave an encoded image as it is.

    Args:
      features: the features of the set, a `tfds.features.FeaturesDict`.
      where: name of the set, for messages.

    Raises:
      errors.UserError: if the set has no such features, or the image is neither encoded nor uint8.
    """
    tfds = tfds_builders.tfds_module()
    for key in self.wanted:
      if key not in features:
        raise errors.unknown(f'feature of {where}', key, features)
    feature = features[self.image_key]
    if isinstance(feature, tfds.features.Image) or tfds_video.is_frames(feature, tfds.features):
      return {self.image_key: tfds.decode.SkipDecoding()}
    shape = getattr(feature, 'shape', None)
    if not isinstance(shape, tuple) or feature.np_dtype != np.uint8 or not _is_pixels(shape):
      raise errors.UserError(
        f"Feature '{self.image_key}' of {where} is no image: {feature}. Needed is an encoded image "
        'or uint8 [h, w, 1] or [h, w, 3], or a clip of such frames.'
      )
    return None

  def is_clip(self, features: Any) -> bool:
    """Whether the set holds clips, see `decoders`."""
    kinds, feature = tfds_builders.tfds_module().features, features[self.image_key]
    if isinstance(feature, kinds.Image):
      return False
    return tfds_video.is_frames(feature, kinds) or len(feature.shape) == 4

  def record(self, example: Example, id: str) -> Record:
    """The record of an example that was read with `decoding`.

    Raises:
      errors.UserError: for a label out of range: the set is not what it was taken for.
    """
    label = int(self.label(example) if self.label else example[self.label_key])
    if not 0 <= label < self.num_classes:
      hint = ' This split seems to have no labels: choose another.' if label == -1 else ''
      raise errors.UserError(
        f'{id}: label {label} is outside 0..{self.num_classes - 1} ({self.num_classes} classes).'
        f'{hint}'
      )
    image = example[self.image_key]
    if isinstance(image, np.ndarray) and image.dtype == object:  # Frames, of TensorFlow.
      image = image.tolist()
    elif isinstance(image, np.ndarray):
      # Grey pixels are shown alike in all three channels.
      image = np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:-1], 3)))
    if self.image is not None:
      image = self.image(image, id)
    return Record(image, label, id)


class TfdsSource:
  """A split of a set that is prepared as array_record; see `sources.Source`.

  It pickles as what it was made of, and opens its files again where it arrives.

  Attributes:
    directory: of the prepared set.
    split: as TFDS writes it.
    fields: what is read.
  """

  def __init__(self, directory: str | os.PathLike[str], split: str, fields: Fields) -> None:
    """Opens the set; the files are opened when they are read.

    Args:
      directory: see `tfds_builders.find`.
      split: 'train', 'train[:80%]', 'train[100:200]+test'.
      fields: what to read.

    Raises:
      errors.UserError: for a set, split or field that is not there, or another file format.
    """
    self.directory, self.split, self.fields = os.fspath(directory), split, fields
    builder = tfds_builders.open_builder(self.directory)
    tfds_builders.count(builder, split)
    self._name = builder.info.full_name
    self._decoders = fields.decoders(builder.info.features, self._name)
    self._features = _only(builder.info.features, fields.wanted)
    tfds = tfds_builders.tfds_module()
    if tfds_video.is_frames(self._features[fields.image_key], tfds.features):
      # Without TensorFlow, TFDS has no way to leave the images of a sequence as they are.
      stored = {**self._features, fields.image_key: tfds_video.stored_frames(tfds.features)}
      self._features, self._decoders = tfds.features.FeaturesDict(stored), None
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    try:
      self._examples = builder.as_data_source(split, deserialize_method=raw)
    except ImportError as error:
      raise errors.UserError(
        f'Reading array_record files needs more ({error}): pip install losa_scenic[tfds].'
      ) from error

  def __reduce__(self):
    """What it was made of."""
    return type(self), (self.directory, self.split, self.fields)

  def __len__(self) -> int:
    """Number of images."""
    return len(self._examples)

  def id(self, index: int) -> str:
    """See `sources.name`."""
    return f'{self._name}/{self.split}[{index}]'

  def __getitem__(self, index: int) -> Record:
    """See `sources.Source`; also raises `UserError` for a label out of range."""
    id = self.id(index)
    try:
      serialized = self._examples[index]
    except Exception as error:  # The library of the files raises kinds of its own.
      raise BadImage(id, f'the record cannot be read ({_one_line(error)})') from error
    try:
      example = self._features.deserialize_example_np(serialized, decoders=self._decoders)
    except Exception as error:
      # Records have checksums: this one is as it was written, and its features.json is wrong.
      raise errors.UserError(f'{id}: TFDS cannot parse it ({_one_line(error)}).') from error
    return self.fields.record(example, id)


def _is_pixels(shape: tuple[int | None, ...]) -> bool:
  return len(shape) in (3, 4) and shape[-1] in (1, 3)


def _one_line(error: Exception) -> str:
  return ' '.join(str(error).split())[:300]


def _only(feature: Any, wanted: Mapping[str, Any] | bool) -> Any:
  """The wanted part of a feature. (`PartialDecoding` can take it out too, but with TensorFlow.)"""
  if isinstance(wanted, bool):
    return feature
  kinds = tfds_builders.tfds_module().features
  if isinstance(feature, kinds.Sequence):
    return kinds.Sequence(_only(feature.feature, wanted))
  return kinds.FeaturesDict({key: _only(feature[key], part) for key, part in wanted.items()})


def check_first(source: sources.Source) -> None:
  """Raises `UserError` if the first label shows that the whole split has none."""
  with contextlib.suppress(BadImage):  # One unreadable image is the loader's to report.
    source[0]
