"""A data set as a command asks for it: its name, options and view, before it is opened."""

import contextlib
import dataclasses
import difflib
import functools
import os
from collections.abc import Mapping
from typing import Any

from losa_scenic.common_lib import config as config_lib
from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import dataset_utils, datasets, detect, resize, sources
from losa_scenic.dataset_lib.augment import Augment
from losa_scenic.dataset_lib.clip_reader import Sampling
from losa_scenic.dataset_lib.pipeline import Pipeline

FRAMES = 16  # of clips, where nobody says how many


@dataclasses.dataclass(frozen=True)
class Request:
  """What `datasets.build_dataset` is to build.

  Attributes:
    name: a key of `datasets.DATASETS`.
    options: its options and `datasets.COMMON_OPTIONS`.
    augment: what is drawn at random in training.
    image_size: side of the images in pixels, unless the options say another.
    interpolation: how they are resized, unless the options say another.
    seed: of the training order and of the augmentation.
    batch_size: training images per batch.
    workers: number of loader processes.
    frames: of a clip, as the backbone has them, 0 for images; None for `FRAMES` of sets of clips
      and 0 of others.
  """

  name: str
  options: Mapping[str, Any]
  augment: Augment
  image_size: int
  interpolation: str = 'bicubic'
  seed: int = 0
  batch_size: int = 2
  workers: int = 0
  frames: int | None = None

  @property
  def title(self) -> str:
    """The name, and where it is."""
    root = self.options.get('root')
    return f'{self.name} {root}' if root else self.name

  @functools.cached_property
  def pipeline(self) -> Pipeline:
    """How a run would make batches of it.

    Raises:
      errors.UserError: as `splits`.
    """
    frames = self.frames if self.frames is not None else FRAMES
    return self._pipeline(frames if self._opened.clips else 0)

  def _pipeline(self, frames: int) -> Pipeline:
    return datasets.make_pipeline(
      self.options,
      batch_size=self.batch_size,
      eval_batch_size=self.batch_size,
      image_size=self.image_size,
      interpolation=self.interpolation,
      frames=frames,
      shuffle_seed=self.seed,
      augment=dataclasses.asdict(self.augment),
      workers=self.workers,
    )

  @property
  def view(self) -> resize.View:
    """What of an image is shown where nothing is augmented; see `pipeline`."""
    return self.pipeline.view

  @property
  def sampling(self) -> Sampling | None:
    """Which frames of clips are shown, None for images; see `pipeline`."""
    return self.pipeline.sampling

  @property
  def cache_bytes(self) -> int:
    """What the loader may keep of decoded images; see `pipeline`."""
    return 0 if self.workers else int(self.pipeline.cache_gigabytes * 1e9)

  def splits(self) -> sources.Splits:
    """Opens the images as they are stored, once.

    Raises:
      errors.UserError: as the set's function does, for options that a run refuses, and for frames
        of a set of images or none of a set of clips.
    """
    return self._opened

  @functools.cached_property
  def _opened(self) -> sources.Splits:
    # Options are looked at before the set, which may take a while to open; whether those of clips
    # are allowed is only known then.
    frames = FRAMES if self.frames is None else self.frames
    size = self._pipeline(frames).view.image_size
    opened = datasets.open_splits(self.name, size, self.options, frames=frames)[1]
    given = [name for name in datasets.CLIP_OPTIONS if self.options.get(name) is not None]
    if opened.clips and not frames:
      raise errors.UserError(
        f'{self.title} holds clips, but the backbone is for images: give '
        '--config.backbone_configs.frames=N.'
      )
    if not opened.clips and (self.frames or given):
      option = '--config.backbone_configs.frames' if self.frames else f'{given[0]}'
      raise errors.UserError(f'{self.title} holds images: {option} is for clips.')
    return opened

  def dataset(self, batch_size: int, eval_batch_size: int, **more: Any) -> dataset_utils.Dataset:
    """Builds the batches, uint8, in threads.

    Args:
      batch_size: training images per batch.
      eval_batch_size: validation and test images per batch.
      **more: fields of `Pipeline` in the place of its own.

    Raises:
      errors.UserError: as `splits` and `dataset_utils.make_dataset`.
    """
    sizes = {'batch_size': batch_size, 'eval_batch_size': eval_batch_size}
    pipeline = dataclasses.replace(self.pipeline, **sizes, workers=0, **more)
    return dataset_utils.make_dataset(self.splits(), pipeline, self.name)


def read(
  dataset: str,
  options: Mapping[str, str],
  augment: Mapping[str, str],
  *,
  image_size: int,
  frames: int | None = None,
  seed: int,
) -> Request:
  """The request that a command line makes.

  Args:
    dataset: a file or folder, or a name: a key of `datasets.DATASETS` or 'auto'. What exists is
      taken as a path, unless the options say where the named set is.
    options: texts of the set's options.
    augment: texts of fields of `Augment`.
    image_size: see `Request`.
    frames: see `Request`; at least 1.
    seed: see `Request`.

  Raises:
    errors.UserError: for what is neither there nor known, naming the nearest match, for unknown
      options and for values that are none.
  """
  if frames is not None:
    errors.check_at_least('--frames', frames, 1)
  texts = dict(options)
  # In `pathlib`, names that are too long for the file system and unknown '~users' are errors.
  path, known = os.path.expanduser(dataset), {*datasets.DATASETS, datasets.AUTO}
  named = dataset in known and ('root' in texts or not os.path.exists(path))
  if not named:
    if not os.path.exists(path):
      raise unknown(dataset)
    if 'root' in texts:
      raise errors.UserError(f'{path} is the root already: root={texts["root"]} is too much.')
    texts['root'] = dataset
  name = dataset if named else datasets.AUTO
  if name == datasets.AUTO:
    name = detect.detect(texts.get('root'))
  given = {key: config_lib.from_text(Augment, key, text) for key, text in augment.items()}
  return Request(
    name=name,
    options=_typed(name, texts),
    augment=config_lib.build(Augment, block=given, what='augment'),
    image_size=image_size,
    frames=frames,
    seed=seed,
  )


def unknown(dataset: str) -> errors.UserError:
  """The error for a data set that is neither there nor known, naming the nearest of both."""
  path = os.path.normpath(os.path.expanduser(dataset))
  known = {*datasets.DATASETS, datasets.AUTO}
  folder, beside = os.path.dirname(path), []
  with contextlib.suppress(OSError):  # It is not there, or not ours to list.
    beside = [os.path.join(folder, name) for name in os.listdir(folder or '.')]
  near = difflib.get_close_matches(path, [*beside, *known], n=1)
  hint = f" Did you mean '{near[0]}'?" if near else ''
  return errors.UserError(
    f"'{dataset}' is neither a file or folder nor the name of a data set.{hint} Names: "
    f'{", ".join(sorted(known))}.'
  )


def _typed(name: str, texts: Mapping[str, str]) -> dict[str, Any]:
  """Options of a data set from their texts."""
  splits_fn, common = datasets.get_dataset(name), datasets.COMMON_OPTIONS
  known = config_lib.options(splits_fn) - datasets.DRAWN
  values: dict[str, Any] = {}
  for key, text in texts.items():
    if key not in known | set(common):
      raise errors.unknown(f"option of dataset '{name}'", key, known | set(common))
    if key in common:
      try:
        values[key] = common[key](text)
      except ValueError:
        raise errors.UserError(
          f'{key} must be of type {common[key].__name__}, not {text!r}.'
        ) from None
    else:
      values[key] = config_lib.from_text(splits_fn, key, text)
  return config_lib.to_dict(values)
