"""TFDS sets prepared as TFRecord, read once into memory with TensorFlow.

TFRecord files have no random access, which the order of training and resuming need. So the encoded
images of the splits, or the frames of clips, are read at the start and kept; for large sets prepare
array_record files and use `tfds_sets`. Images are in the same order as there.

Needs `pip install losa_scenic[tf]`.
"""

import contextlib
import functools
import importlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import sources, tfds_builders, tfds_records, tfds_sets

MAX_GIGABYTES = 4.0


class MemorySource:
  """Records held in memory; it pickles with all of them. See `sources.Source`."""

  def __init__(self, records: Sequence[sources.Record]) -> None:
    """Keeps the records."""
    self._records = list(records)

  def __len__(self) -> int:
    """Number of images."""
    return len(self._records)

  def __getitem__(self, index: int) -> sources.Record:
    """See `sources.Source`."""
    return self._records[index]


def splits(
  *,
  name: str | None = None,
  root: str | None = None,
  train: str = 'train',
  val: str | None = None,
  test: str | None = None,
  image_key: str | None = None,
  label_key: str = 'label',
  max_gigabytes: float = MAX_GIGABYTES,
) -> sources.Splits:
  """Reads a prepared set into memory.

  Args:
    name: as all but the last, see `tfds_sets.splits`.
    root: see there.
    train: see there.
    val: see there.
    test: see there.
    image_key: see there.
    label_key: see there.
    max_gigabytes: a split whose encoded images are larger (1 GB = 1e9 bytes) is refused.

  Returns:
    Sources in memory.

  Raises:
    errors.UserError: as `tfds_sets.splits`, for files in array_record, for a split that is too
      large, and without TensorFlow.
  """
  open_source = functools.partial(read, max_gigabytes=max_gigabytes)
  keys = {'image_key': image_key, 'label_key': label_key}
  build = functools.partial(tfds_sets.build_splits, open_source, 'tfrecord', 'tfds')
  return build(name=name, root=root, train=train, val=val, test=test, **keys)


def read(
  directory: str | os.PathLike[str] | pathlib.Path,
  split: str,
  fields: tfds_records.Fields,
  *,
  max_gigabytes: float = MAX_GIGABYTES,
) -> MemorySource:
  """Reads a split.

  Args:
    directory: see `tfds_builders.find`.
    split: as TFDS writes it.
    fields: what to read.
    max_gigabytes: more encoded images than this are refused.

  Returns:
    The images in the order of the files.

  Raises:
    errors.UserError: without TensorFlow, for a set, split or field that is not there, a label out
      of range, a damaged file, or too many images.
  """
  tf, tfds = _tensorflow(), tfds_builders.tfds_module()
  builder = tfds_builders.open_builder(directory, 'tfrecord')
  count, name = tfds_builders.count(builder, split), builder.info.full_name
  total = sum(part.num_examples for part in builder.info.splits.values())
  _check_size(builder.info.dataset_size * count / max(total, 1), max_gigabytes, f'{name}/{split}')
  decoders = fields.decoders(builder.info.features, name)
  dataset = builder.as_dataset(
    split=split,
    shuffle_files=False,
    decoders=tfds.decode.PartialDecoding(fields.wanted, decoders),
    # One file after the other: the order of the slices and of array_record.
    read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
  )
  records, size = [], 0
  try:
    for example in tfds.as_numpy(dataset):
      records.append(fields.record(example, f'{name}/{split}[{len(records)}]'))
      size += _size(records[-1].image)
      _check_size(size, max_gigabytes, f'{name}/{split}')
  except tf.errors.OpError as error:
    raise errors.UserError(
      f'{name}/{split}: reading ends at image {len(records)} of {count}: {error.message}'
    ) from error
  return MemorySource(records)


def _size(image: Any) -> int:
  if isinstance(image, list):  # The frames of a clip.
    return sum(map(len, image))
  return len(image) if isinstance(image, bytes) else image.nbytes


def _check_size(size: float, max_gigabytes: float, name: str) -> None:
  if size > max_gigabytes * 1e9:
    raise errors.UserError(
      f'{name}: about {size / 1e9:.2g} GB to keep in memory, and at most {max_gigabytes:g} are '
      'allowed (--config.dataset_configs.max_gigabytes). Prepared as array_record, data set '
      "'tfds' reads it from the disk."
    )


def _tensorflow() -> Any:
  os.environ.setdefault('NO_GCE_CHECK', 'true')
  try:
    tf = importlib.import_module('tensorflow')
  except ModuleNotFoundError as error:
    raise errors.UserError(
      f'Sets prepared as TFRecord need TensorFlow ({error}): pip install losa_scenic[tf], or '
      "prepare the set as array_record for data set 'tfds'."
    ) from error
  # TensorFlow would take the memory of the GPUs, where the model is to be. It refuses where it has
  # them already: then the program uses it for something else.
  with contextlib.suppress(RuntimeError):
    tf.config.set_visible_devices([], 'GPU')
  return tf
