"""Batches of labelled images as Grain pipelines, in the `Dataset` record of Scenic.

Batch `step` of training is a pure function of (seed, step): `train_ds[step]` needs no state, so a
run resumes exactly with `iterate(train_ds, start=step)`, whatever stopped it, and with any number
of loader processes. Shuffling works on positions, and batches are global: each host then makes its
own part of a batch, so that the order is the same for any number of hosts.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from losa_scenic.common_lib import errors, types
from losa_scenic.dataset_lib import batches, clip_reader, sources
from losa_scenic.dataset_lib.bad_files import BadFiles
from losa_scenic.dataset_lib.batches import Batches
from losa_scenic.dataset_lib.clip_reader import Sampling
from losa_scenic.dataset_lib.fingerprint import fingerprint
from losa_scenic.dataset_lib.pipeline import Pipeline


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A data set as trainers see it; the fields are Scenic's.

  Attributes:
    train_iter: endless shuffled training batches, from the first on.
    valid_iter: validation batches in order, over and over; None without a validation split.
    test_iter: test batches in order, over and over.
    meta_data: see `make_dataset`.
    train_ds: endless; `train_ds[step]` is the batch of that step.
    valid_ds: one pass over the validation images; None without a validation split.
    test_ds: one pass over the test images.
    train_multi_iter: Scenic's sets of several parts; not used here, as all `*_multi_*` fields.
    valid_multi_iter: not used.
    test_multi_iter: not used.
    train_multi_ds: not used.
    valid_multi_ds: not used.
    test_multi_ds: not used.
  """

  train_iter: Iterator[types.Batch] | None = None
  valid_iter: Iterator[types.Batch] | None = None
  test_iter: Iterator[types.Batch] | None = None
  meta_data: dict[str, Any] = dataclasses.field(default_factory=dict)
  train_ds: Any = None
  valid_ds: Any = None
  test_ds: Any = None
  train_multi_iter: Any = None
  valid_multi_iter: Any = None
  test_multi_iter: Any = None
  train_multi_ds: Any = None
  valid_multi_ds: Any = None
  test_multi_ds: Any = None


def make_dataset(splits: sources.Splits, pipeline: Pipeline, name: str = '') -> Dataset:
  """Builds the batches of a data set.

  Every batch is {'inputs': [b, s, s, 3], 'label': int32 [b], 'batch_mask': float32 [b], 'index':
  int32 [b]} and more where images are mixed, see `Loader.batch`; inputs of clips are [b, t, s, s,
  3], and [b, v, t, s, s, 3] in testing with several views. Training runs through one fresh
  permutation of the images per epoch; batches cross epoch borders, so none is dropped and a batch
  may be larger than the set. Evaluation batches are filled up with zeros at `batch_mask` 0.

  Args:
    splits: the images, of any size.
    pipeline: what becomes of them.
    name: name of the set.

  Returns:
    The data set. `meta_data` has num_classes, input_shape (-1, [t,] s, s, 3), input_dtype,
    num_train_examples, num_eval_examples (validation; 0 without), num_test_examples,
    target_is_onehot (False), class_names, metric, name, interpolation, central_crop, about,
    train_crops (None, or how random crops are drawn), clips (None, or the fields of `Sampling`) and
    fingerprints (part -> hash of what it holds).

  Raises:
    errors.UserError: for an empty training or test split, for images where the pipeline is for
      clips, or the reverse, or for settings that the images or clips do not allow.
  """
  _check(splits, pipeline, f"Dataset '{name}'")
  for part, source in (('train', splits.train), ('test', splits.test)):
    if not len(source):
      raise errors.UserError(f"Dataset '{name}': the {part} split is empty.")
  parts = {'train': splits.train, 'valid': splits.valid or (), 'test': splits.test}
  counts = {part: len(source) for part, source in parts.items()}
  bad_files = BadFiles(counts, pipeline.max_bad_fraction, host=pipeline.host, hosts=pipeline.hosts)
  train_ds = batches.train_batches(splits.train, pipeline, bad_files)
  valid_ds = None
  if splits.valid is not None and len(splits.valid):
    valid_ds = batches.eval_batches(splits.valid, pipeline, bad_files, 'valid')
  test_ds = batches.eval_batches(splits.test, pipeline, bad_files, 'test')
  return Dataset(
    train_iter=iterate(train_ds),
    valid_iter=None if valid_ds is None else _forever(valid_ds),
    test_iter=_forever(test_ds),
    meta_data=_meta_data(splits, pipeline, name),
    train_ds=train_ds,
    valid_ds=valid_ds,
    test_ds=test_ds,
  )


def iterate(ds: Batches, start: int = 0, stop: int | None = None) -> Iterator[types.Batch]:
  """Yields `ds[start], ..., ds[stop - 1]`, prepared ahead of time.

  Threads or processes start with the first batch and end with the iterator; at most a few batches
  wait.

  Args:
    ds: training or evaluation batches of `Dataset`.
    start: position of the first batch, e.g. the step to resume from.
    stop: position after the last batch; None for the end of `ds`, which training never reaches.

  Yields:
    Batches in order, the same for any number of loader processes.

  Raises:
    errors.UserError: if too many images cannot be read.
  """
  yield from ds.iterate(start, stop)


def _check(splits: sources.Splits, pipeline: Pipeline, what: str) -> None:
  """Raises `UserError` for a pipeline that is not for these images or clips."""
  sampling = pipeline.sampling
  if splits.clips and sampling is None:
    raise errors.UserError(
      f'{what} holds clips, but the backbone is for images: give '
      '--config.backbone_configs.frames=N.'
    )
  if sampling is not None and not splits.clips:
    raise errors.UserError(
      f'{what} holds images, but the backbone is for clips of {sampling.num_frames} frames.'
    )
  if splits.sided and pipeline.augment.flip:
    raise errors.UserError(
      f'{what}: left and right tell classes apart, so augment.flip would give wrong labels.'
    )
  if sampling is None:
    return
  plain = dataclasses.asdict(Sampling(sampling.num_frames, num_test_crops=sampling.num_test_crops))
  given = [name for name, value in dataclasses.asdict(sampling).items() if value != plain[name]]
  if splits.whole and given:
    raise errors.UserError(
      f'{what} makes clips of {sampling.num_frames} frames, which are shown as they are: leave out '
      f'dataset_configs.{", ".join(given)}.'
    )
  if sampling.frames_per_second is not None and len(splits.train):
    try:
      record = splits.train[0]
    except sources.BadImage:
      return
    clip_reader.check_rate(record, sampling)


def _meta_data(splits: sources.Splits, pipeline: Pipeline, name: str) -> dict[str, Any]:
  augment, sampling = pipeline.augment, pipeline.sampling
  return {
    'num_classes': len(splits.class_names),
    'input_shape': (-1, *pipeline.input_shape),
    'input_dtype': getattr(jnp, pipeline.dtype_str),
    'num_train_examples': len(splits.train),
    'num_eval_examples': 0 if splits.valid is None else len(splits.valid),
    'num_test_examples': len(splits.test),
    'target_is_onehot': False,
    'class_names': tuple(splits.class_names),
    'metric': pipeline.metric,
    'name': name,
    'interpolation': pipeline.view.interpolation,
    'central_crop': pipeline.view.central_crop,
    'about': splits.about,
    'train_crops': augment.crop_settings,
    'clips': None if sampling is None else dataclasses.asdict(sampling),
    'fingerprints': {
      part: fingerprint(source)
      for part, source in (('train', splits.train), ('valid', splits.valid), ('test', splits.test))
      if source is not None
    },
  }


def _forever(ds: Batches) -> Iterator[types.Batch]:
  while True:
    yield from iterate(ds)
