"""Any set of labelled images or clips of TFDS that is prepared as array_record files.

  python -c "import tensorflow_datasets as tfds; \
      tfds.builder('caltech101').download_and_prepare(file_format='array_record')"
  ... --config.dataset_name=tfds --config.dataset_configs.name=caltech101

Needs `pip install losa_scenic[tfds]`, and no TensorFlow to read (to prepare, sets that are not
stored as image files do). For sets prepared as TFRecord, the default of TFDS, see `tfds_tfrecord`.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import sources, tfds_builders, tfds_records

_IMAGE_KEYS = ('image', 'video')
# (directory, split, fields) -> the images.
OpenSource = Callable[[pathlib.Path, str, tfds_records.Fields], sources.Source]


def splits(
  *,
  name: str | None = None,
  root: str | None = None,
  train: str = 'train',
  val: str | None = None,
  test: str | None = None,
  image_key: str | None = None,
  label_key: str = 'label',
) -> sources.Splits:
  """Opens a prepared set.

  Args:
    name: 'caltech101', 'eurosat/rgb', 'eurosat/rgb:2.0.0'; without a version the newest that is
      prepared. May be left out if `root` is the folder of a prepared set.
    root: the TFDS data folder (by default $TFDS_DATA_DIR or ~/tensorflow_datasets), or the folder
      of one version of a set.
    train: images to train on, as TFDS writes splits: 'train', 'train[:80%]', 'train[:800]+test'.
    val: images to choose settings with; by default 'validation' if there is one.
    test: images to report on; by default 'test' if there is one, else 'validation', which is then
      not used for choosing.
    image_key: feature of the image or clip; by default 'image' if there is one, else 'video'.
    label_key: feature of the label, a `ClassLabel`.

  Returns:
    Sources that read a record each time, with the class names of the set.

  Raises:
    errors.UserError: if the set is not prepared, or as TFRecord, or has no such splits or features,
      or if splits overlap.
  """
  keys = {'image_key': image_key, 'label_key': label_key}
  build = functools.partial(build_splits, tfds_records.TfdsSource, 'array_record', 'tfds_tfrecord')
  return build(name=name, root=root, train=train, val=val, test=test, **keys)


def build_splits(
  open_source: OpenSource,
  file_format: str,
  other: str,
  *,
  name: str | None,
  root: str | None,
  train: str,
  val: str | None,
  test: str | None,
  image_key: str | None,
  label_key: str,
) -> sources.Splits:
  """What the data sets of both file formats do.

  Args:
    open_source: how images of this format are read.
    file_format: 'array_record' or 'tfrecord'.
    other: data set for the other format.
    name: this and the rest, see `splits`.
    root: see `splits`.
    train: see `splits`.
    val: see `splits`.
    test: see `splits`.
    image_key: see `splits`.
    label_key: see `splits`.

  Raises:
    errors.UserError: see `splits`.
  """
  directory = tfds_builders.find(name, root, file_format)
  builder = tfds_builders.open_builder(directory, file_format, f'--config.dataset_name={other}')
  train, val, test = _chosen(builder, train, val, test)
  parts = [part for part in (train, val, test) if part is not None]
  counts = {part: tfds_builders.count(builder, part) for part in parts}
  for i, part in enumerate(parts):
    for later in parts[i + 1 :]:
      tfds_builders.check_disjoint(builder, part, later)
  class_names = _class_names(builder, label_key)
  if image_key is None:
    here = [key for key in _IMAGE_KEYS if key in builder.info.features]
    image_key = here[0] if here else _IMAGE_KEYS[0]
  fields = tfds_records.Fields(len(class_names), image_key, label_key)
  opened = {part: open_source(directory, part, fields) for part in parts}
  for source in opened.values():
    tfds_records.check_first(source)
  roles = [('train', train), ('valid', val), ('test', test)]
  clips = fields.is_clip(builder.info.features)
  noun = 'clips' if clips else 'images'
  return sources.Splits(
    train=opened[train],
    valid=None if val is None else opened[val],
    test=opened[test],
    class_names=class_names,
    about=(
      f'{builder.info.full_name}, {len(class_names)} classes, in {directory}',
      *(f'{role}: {counts[part]:,} {noun}, {part}' for role, part in roles if part is not None),
    ),
    clips=clips,
  )


def _chosen(
  builder: Any, train: str, val: str | None, test: str | None
) -> tuple[str, str | None, str]:
  """The three splits, with the defaults that this set has."""
  names = list(builder.info.splits)
  if test is None:
    test = next((part for part in ('test', 'validation') if part in names and part != train), None)
  if test is None:
    raise errors.UserError(
      f'{builder.info.full_name} has no test or validation split (there: {", ".join(names)}): cut '
      'one off, e.g. --config.dataset_configs.train=train[:80%] '
      '--config.dataset_configs.val=train[80%:90%] --config.dataset_configs.test=train[90%:].'
    )
  if val is None and 'validation' in names and 'validation' not in (train, test):
    val = 'validation'
  return train, val, test


def _class_names(builder: Any, label_key: str) -> tuple[str, ...]:
  features, name = builder.info.features, builder.info.full_name
  kind = tfds_builders.tfds_module().features.ClassLabel
  labels = sorted(key for key, feature in features.items() if isinstance(feature, kind))
  if label_key not in labels and label_key in features:
    raise errors.UserError(
      f"Feature '{label_key}' of {name} is no class label. Known: {', '.join(labels) or '(none)'} "
      '(--config.dataset_configs.label_key).'
    )
  if label_key not in labels:
    raise errors.unknown(f'class label of {name}', label_key, labels)
  if not features[label_key].num_classes:
    raise errors.UserError(f"Class label '{label_key}' of {name} does not say its classes.")
  return tuple(features[label_key].names)
