"""The 19 tasks of VTAB-1K: which images of which TFDS set, and how a label is made of them.

Source: the data definitions of google-research/task_adaptation (Zhai et al. 2019), which the
parameter-efficient fine-tuning literature uses with 800 training and 200 validation images of each
task. Those are taken by position from files in the order TFDS wrote them, so they depend on the
version of the TFDS set: another version may give other images. The versions of published results
are those that task_adaptation and VPT (Jia et al. 2022) name; prepared ones of these go first.

TFDS can no longer prepare some of them. Oxford Pets is where this matters most: 4.0.0 has repaired
images and new files, so its 1,000 training images may not be those of published results.
"""

import dataclasses
import functools
import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import tfds_records
from losa_scenic.dataset_lib.sources import BadImage
from losa_scenic.dataset_lib.tfds_records import Example

NUM_TRAIN = 800
NUM_VALID = 200
# Label = number of the last threshold that is exceeded.
CLEVR_THRESHOLDS = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
KITTI_THRESHOLDS = (-100.0, 8.0, 20.0, 999.0)
_NO_VEHICLE = 1000.0
_VEHICLE_TYPES = 3  # The first types of KITTI: car, van, truck.
_BUCKETS = 16  # of dSprites


def clevr_count(example: Example) -> int:
  """Number of objects of a CLEVR scene, 3..10, as label 0..7."""
  return len(_column(example['objects']['pixel_coords'])) - 3


def clevr_distance(example: Example) -> int:
  """Label 0..5 by the distance to the nearest object: the third of its pixel coordinates."""
  distance = _column(example['objects']['pixel_coords']).min(initial=np.inf)
  return _bin(distance, CLEVR_THRESHOLDS)


def kitti_distance(example: Example) -> int:
  """Label by the nearest car, van or truck: under 8 m, 8 to 20 m, beyond, none (0..3)."""
  depth = _column(example['objects']['location'])
  is_vehicle = np.asarray(example['objects']['type'], np.int64) < _VEHICLE_TYPES
  return _bin(depth[is_vehicle].min(initial=_NO_VEHICLE), KITTI_THRESHOLDS)


def bucket(example: Example, *, key: str, count: int) -> int:
  """One of `count` values, in 16 buckets: floor(value / (count / 16)), label 0..15."""
  return int(example[key]) * _BUCKETS // count


def _column(coordinates: Any) -> np.ndarray:
  """The third coordinate of n objects, float32 [n]; n may be 0."""
  return np.asarray(coordinates, np.float32).reshape(-1, 3)[:, 2]


def _bin(value: float, thresholds: tuple[float, ...]) -> int:
  """The largest i with thresholds[i] < value; -1 if there is none."""
  return int(np.searchsorted(np.asarray(thresholds, np.float32), value, side='left')) - 1


def times_255(image: bytes | np.ndarray, id: str) -> np.ndarray:
  """dSprites, stored as 0 and 1 in one channel, as pixels: uint8 [h, w, 3] of 0 and 255.

  Raises:
    BadImage: for bytes that are no image of 0 and 1.
  """
  if isinstance(image, bytes):
    try:
      with Image.open(io.BytesIO(image), formats=('PNG',)) as opened:
        image = np.array(opened)
    except (OSError, SyntaxError, ValueError) as error:
      raise BadImage(id, f'it cannot be decoded ({error})') from error
  image = image if image.ndim == 3 else image[..., None]
  if image.dtype != np.uint8 or image.max(initial=0) > 1:
    raise BadImage(id, 'dSprites must be stored as 0 and 1')
  return np.ascontiguousarray(np.broadcast_to(image * np.uint8(255), (*image.shape[:2], 3)))


@dataclasses.dataclass(frozen=True)
class Task:
  """One task.

  Attributes:
    name: as in `--config.dataset_configs.task`, and folder of the exported images.
    title: as in the tables of papers.
    group: 'natural', 'specialized' or 'structured'.
    builder: TFDS set, with config.
    version: of the TFDS set, to prepare: the benchmark's where TFDS still can.
    valid: 200 images to choose settings with, as TFDS writes splits.
    test: images to report on.
    num_test: how many these are.
    classes: their names; or how many, where TFDS has the names.
    fields: how the label and the image are read, without `num_classes`.
    aliases: other names and folders.
    benchmark_versions: of published results, the preferred one first; by default `version`.
  """

  name: str
  title: str
  group: str
  builder: str
  version: str
  valid: str
  test: str
  num_test: int
  classes: tuple[str, ...] | int
  fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  aliases: tuple[str, ...] = ()
  benchmark_versions: tuple[str, ...] = ()
  train: str = f'train[:{NUM_TRAIN}]'

  @property
  def num_classes(self) -> int:
    """Number of classes."""
    return self.classes if isinstance(self.classes, int) else len(self.classes)

  @property
  def class_names(self) -> tuple[str, ...]:
    """Their names; empty where TFDS has them."""
    return () if isinstance(self.classes, int) else self.classes

  def source_fields(self) -> tfds_records.Fields:
    """How a TFDS example becomes a record."""
    return tfds_records.Fields(self.num_classes, **self.fields)


def _derived(label: Callable[[Example], int], **objects: bool) -> dict[str, Any]:
  return {'label': label, 'label_features': {'objects': objects}}


def _dsprites(key: str, count: int) -> dict[str, Any]:
  label = functools.partial(bucket, key=key, count=count)
  return {'label': label, 'label_features': {key: True}, 'image': times_255}


def _bucket_names(what: str, count: int) -> tuple[str, ...]:
  members = [[v for v in range(count) if v * _BUCKETS // count == b] for b in range(_BUCKETS)]
  return tuple(f'{what} {values[0]}-{values[-1]}' for values in members)


_COUNTS = tuple(f'{n} objects' for n in range(3, 11))
_DISTANCES = ('under 8', '8 to 8.5', '8.5 to 9', '9 to 9.5', '9.5 to 10', 'over 10')
_VEHICLES = ('under 8 m', '8 to 20 m', 'over 20 m', 'no vehicle')
_AZIMUTHS = tuple(f'azimuth {20 * n} degrees' for n in range(18))
_ELEVATIONS = tuple(f'elevation {30 + 5 * n} degrees' for n in range(9))
_VALID = 'validation[:200]'
_CLEVR = 'train[63000:63200]'
_SPRITES = ('train[589824:590024]', 'train[663552:]', 73_728)
_NORB = ('test[:200]', 'test[50%:]', 12_150)
_RETINOPATHY = 'diabetic_retinopathy_detection/btgraham-300'

# In the order of the tables of papers.
_ROWS = (
  Task('cifar100', 'CIFAR-100', 'natural', 'cifar100', '3.0.2', 'train[45000:45200]', 'test',
       10_000, 100, aliases=('cifar',)),
  Task('caltech101', 'Caltech101', 'natural', 'caltech101', '3.0.2', 'train[2754:2954]', 'test',
       6_084, 102, aliases=('caltech',), benchmark_versions=('3.0.1',)),
  Task('dtd', 'DTD', 'natural', 'dtd', '3.0.1', _VALID, 'test', 1_880, 47),
  Task('oxford_flowers102', 'Flowers102', 'natural', 'oxford_flowers102', '2.1.1', _VALID, 'test',
       6_149, 102, aliases=('flowers102', 'flowers')),
  Task('oxford_iiit_pet', 'Pets', 'natural', 'oxford_iiit_pet', '4.0.0', 'train[2944:3144]', 'test',
       3_669, 37, aliases=('oxford_pet', 'pets'), benchmark_versions=('3.2.0',)),
  Task('svhn', 'SVHN', 'natural', 'svhn_cropped', '3.1.0', 'train[65931:66131]', 'test',
       26_032, 10, aliases=('svhn_cropped',), benchmark_versions=('3.0.0',)),
  Task('sun397', 'Sun397', 'natural', 'sun397/tfds', '4.0.0', _VALID, 'test', 21_750, 397),
  Task('patch_camelyon', 'Camelyon', 'specialized', 'patch_camelyon', '2.0.0', _VALID, 'test',
       32_768, 2, aliases=('camelyon', 'pcam')),
  Task('eurosat', 'EuroSAT', 'specialized', 'eurosat/rgb', '2.0.0', 'train[16200:16400]',
       'train[21600:]', 5_400, 10),
  Task('resisc45', 'Resisc45', 'specialized', 'resisc45', '3.0.0', 'train[18900:19100]',
       'train[25200:]', 6_300, 45),
  Task('diabetic_retinopathy', 'Retinopathy', 'specialized', _RETINOPATHY, '3.0.0', _VALID, 'test',
       42_670, 5, aliases=('retinopathy', 'diabetic_retinopathy_detection')),
  Task('clevr_count', 'Clevr-Count', 'structured', 'clevr', '3.1.0', _CLEVR, 'validation', 15_000,
       _COUNTS, _derived(clevr_count, pixel_coords=True)),
  Task('clevr_dist', 'Clevr-Dist', 'structured', 'clevr', '3.1.0', _CLEVR, 'validation', 15_000,
       _DISTANCES, _derived(clevr_distance, pixel_coords=True), aliases=('clevr_distance',)),
  Task('dmlab', 'DMLab', 'structured', 'dmlab', '2.0.1', _VALID, 'test', 22_735, 6),
  Task('kitti', 'KITTI-Dist', 'structured', 'kitti', '3.2.0', _VALID, 'test', 711, _VEHICLES,
       _derived(kitti_distance, location=True, type=True), aliases=('kitti_dist',),
       benchmark_versions=('3.2.0', '3.1.0')),
  Task('dsprites_loc', 'dSpr-Loc', 'structured', 'dsprites', '2.0.0', *_SPRITES,
       _bucket_names('x position', 32), _dsprites('label_x_position', 32),
       aliases=('dsprites_location',)),
  Task('dsprites_ori', 'dSpr-Ori', 'structured', 'dsprites', '2.0.0', *_SPRITES,
       _bucket_names('orientation', 40), _dsprites('label_orientation', 40),
       aliases=('dsprites_orientation',)),
  Task('smallnorb_azi', 'sNORB-Azim', 'structured', 'smallnorb', '2.0.0', *_NORB, _AZIMUTHS,
       {'label_key': 'label_azimuth'}, aliases=('smallnorb_azimuth', 'snorb_azim')),
  Task('smallnorb_ele', 'sNORB-Elev', 'structured', 'smallnorb', '2.0.0', *_NORB, _ELEVATIONS,
       {'label_key': 'label_elevation'}, aliases=('smallnorb_elevation', 'snorb_elev')),
)  # fmt: skip
TASKS: dict[str, Task] = {
  task.name: dataclasses.replace(
    task, benchmark_versions=task.benchmark_versions or (task.version,)
  )
  for task in _ROWS
}


def find(name: str) -> Task:
  """The task of a name or alias; case and '-' for '_' do not matter.

  Raises:
    errors.UserError: for an unknown name, naming the nearest one.
  """
  wanted = name.lower().replace('-', '_')
  for task in TASKS.values():
    if wanted in (task.name, *task.aliases, task.title.lower().replace('-', '_')):
      return task
  raise errors.unknown('VTAB task', name, TASKS)
