"""A data set as a command asks for it: its name, options and view, before it is opened."""

import dataclasses
import difflib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from losa_scenic.common_lib import config as config_lib
from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import dataset_utils, datasets, detect, resize, sources
from losa_scenic.dataset_lib.augment import Augment


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
  """

  name: str
  options: Mapping[str, Any]
  augment: Augment
  image_size: int
  interpolation: str = 'bicubic'
  seed: int = 0
  batch_size: int = 2
  workers: int = 0

  @property
  def title(self) -> str:
    """The name, and where it is."""
    root = self.options.get('root')
    return f'{self.name} {root}' if root else self.name

  @property
  def view(self) -> resize.View:
    """What of an image is shown where nothing is augmented."""
    get = self.options.get
    dataset_utils.check_at_least('image_size', get('image_size', self.image_size), 1)
    return resize.View(
      get('image_size', self.image_size),
      get('interpolation', self.interpolation),
      get('central_crop'),
    )

  @property
  def cache_bytes(self) -> int:
    """What the loader may keep of decoded images."""
    default = dataset_utils.Pipeline.cache_gigabytes
    gigabytes = 0 if self.workers else self.options.get('cache_gigabytes', default)
    return int(gigabytes * 1e9)

  def splits(self) -> sources.Splits:
    """Opens the images as they are stored.

    Raises:
      errors.UserError: as the set's function does.
    """
    return datasets.open_splits(self.name, self.view.image_size, self.options)[1]

  def dataset(self, batch_size: int, eval_batch_size: int, **more: Any) -> dataset_utils.Dataset:
    """Builds the batches, uint8, in threads.

    Args:
      batch_size: training images per batch.
      eval_batch_size: validation and test images per batch.
      **more: options in the place of its own.

    Raises:
      errors.UserError: as `datasets.build_dataset`.
    """
    return datasets.build_dataset(
      self.name,
      batch_size=batch_size,
      eval_batch_size=eval_batch_size,
      shuffle_seed=self.seed,
      image_size=self.image_size,
      interpolation=self.interpolation,
      dataset_configs={**self.options, **more},
      augment=dataclasses.asdict(self.augment),
    )


def read(
  dataset: str,
  options: Mapping[str, str],
  augment: Mapping[str, str],
  *,
  image_size: int,
  seed: int,
) -> Request:
  """The request that a command line makes.

  Args:
    dataset: a file or folder, or a name: a key of `datasets.DATASETS` or 'auto'. What exists is
      taken as a path, unless the options say where the named set is.
    options: texts of the set's options.
    augment: texts of fields of `Augment`.
    image_size: see `Request`.
    seed: see `Request`.

  Raises:
    errors.UserError: for what is neither there nor known, naming the nearest match, for unknown
      options and for values that are none.
  """
  texts = dict(options)
  path, known = pathlib.Path(dataset).expanduser(), {*datasets.DATASETS, datasets.AUTO}
  named = dataset in known and ('root' in texts or not path.exists())
  if not named:
    if not path.exists():
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
    seed=seed,
  )


def pairs(flag: str, texts: Sequence[str]) -> dict[str, str]:
  """['task=dtd'] -> {'task': 'dtd'}.

  Raises:
    errors.UserError: for a text without '=', or a key given twice; `flag` is named.
  """
  found: dict[str, str] = {}
  for text in texts:
    key, equals, value = text.partition('=')
    if not key or not equals:
      raise errors.UserError(f"{flag} takes KEY=VALUE, not '{text}'.")
    if key in found:
      raise errors.UserError(f'{flag} {key} is given twice.')
    found[key] = value
  return found


def unknown(dataset: str) -> errors.UserError:
  """The error for a data set that is neither there nor known, naming the nearest of both."""
  path, known = pathlib.Path(dataset).expanduser(), {*datasets.DATASETS, datasets.AUTO}
  beside = []
  if path.parent.is_dir():
    beside = [str(path.parent / other.name) for other in path.parent.iterdir()]
  near = difflib.get_close_matches(str(path), [*beside, *known], n=1)
  hint = f" Did you mean '{near[0]}'?" if near else ''
  return errors.UserError(
    f"'{dataset}' is neither a file or folder nor the name of a data set.{hint} Names: "
    f'{", ".join(sorted(known))}.'
  )


def _typed(name: str, texts: Mapping[str, str]) -> dict[str, Any]:
  """Options of a data set from their texts."""
  splits_fn, common = datasets.get_dataset(name), datasets.COMMON_OPTIONS
  known = config_lib.options(splits_fn)
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
