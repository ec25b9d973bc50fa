"""VTAB-1K: 19 tasks of 800 training, 200 validation and all test images (see `vtab_tasks`).

Results are comparable only along the same path from file to model. Two are in use:

  data_path='lists'  images exported as JPEG with lists 'path label', as NOAH does (also FacT,
      Convpass, RepAdapter, SSF, HST): one folder a task with train800.txt, val200.txt, test.txt.
      These papers resize with Pillow's bicubic filter.
  data_path='tfds'   the images of the TFDS sets as they are (VPT, TOAST, the original benchmark),
      prepared as array_record; 'tfds_tfrecord' for sets prepared as TFRecord, which are read into
      memory with TensorFlow. These papers resize with TensorFlow's bilinear rule, no antialiasing.

Both resize the whole image to a square. Resizing and normalisation are options of every data set:
--config.dataset_configs.interpolation=bicubic or bilinear_tf, and .normalisation=imagenet, as most
of these papers have it, inception (mean and deviation 0.5) or unit.

The last training of a task takes train + val, --config.dataset_configs.train_split=trainval, and is
judged by the test accuracy of the last epoch.

In another version of a TFDS set than that of published results, the 1,000 training images may be
others; a run says so. TFDS can no longer prepare the published versions of Caltech101, Oxford Pets
and SVHN: those that were prepared earlier are read.
"""

import functools
import os
import pathlib
from typing import Any

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import (
  folders,
  list_labels,
  list_rows,
  sources,
  tfds_builders,
  tfds_records,
  tfds_tfrecord,
  vtab_tasks,
)
from losa_scenic.dataset_lib.vtab_tasks import Task

DATA_PATHS = ('lists', 'tfds', 'tfds_tfrecord')
LISTS = {'train': 'train800.txt', 'val': 'val200.txt', 'test': 'test.txt'}


def splits(
  *,
  task: str | None = None,
  root: str | None = None,
  data_path: str = 'lists',
  max_gigabytes: float | None = None,
) -> sources.Splits:
  """One task.

  Args:
    task: a key of `vtab_tasks.TASKS` or one of its aliases; required.
    root: with 'lists' the folder that holds the tasks' folders, or that of the task; required. With
      the others the TFDS data folder (by default $TFDS_DATA_DIR or ~/tensorflow_datasets), or the
      folder of one version of the set.
    data_path: where the images come from, see above: one of `DATA_PATHS`.
    max_gigabytes: with 'tfds_tfrecord': larger splits are refused; default
      `tfds_tfrecord.MAX_GIGABYTES`.

  Returns:
    800 / 200 / test images with the number of classes that the benchmark has.

  Raises:
    errors.UserError: for an unknown task, missing or unprepared files, a number of images other
      than the benchmark's, or a label out of range.
  """
  if not task:
    raise errors.UserError(
      "Dataset 'vtab' needs a task: --config.dataset_configs.task=NAME, one of "
      f'{", ".join(vtab_tasks.TASKS)}.'
    )
  found = vtab_tasks.find(task)
  errors.one_of('data_path', data_path, DATA_PATHS)
  if max_gigabytes is not None and data_path != 'tfds_tfrecord':
    raise errors.UserError(f"max_gigabytes has no effect with data_path '{data_path}'.")
  if data_path == 'lists':
    result = _from_lists(found, root)
  else:
    result = _from_tfds(found, root, data_path, max_gigabytes)
  _check_sizes(found, result)
  return result


def _check_sizes(task: Task, found: sources.Splits) -> None:
  needed = {
    'train': (found.train, vtab_tasks.NUM_TRAIN),
    'val': (found.valid, vtab_tasks.NUM_VALID),
    'test': (found.test, task.num_test),
  }
  for part, (source, count) in needed.items():
    if source is not None and len(source) != count:
      raise errors.UserError(
        f'VTAB-1K {task.title}: the {part} split has {len(source):,} images, but the benchmark has '
        f'{count:,}. ({"; ".join(found.about)})'
      )


def _from_lists(task: Task, root: str | None) -> sources.Splits:
  folder = _task_folder(task, folders.checked_root('vtab', root))
  for name in LISTS.values():
    if not (folder / name).is_file():
      raise errors.UserError(
        f'{folder / name}: there is no such file. A task needs {", ".join(LISTS.values())}.'
      )
  rows = {part: list_rows.read(folder / name, folder, part)[part] for part, name in LISTS.items()}
  for listed in rows.values():
    if not any(os.path.exists(folder / path) for path in (listed.paths[0], listed.paths[-1])):
      raise errors.UserError(
        f'{listed.where(0)}: {folder / listed.paths[0]} does not exist, nor does the last image of '
        f'the list: paths must be relative to {folder}.'
      )
  names = task.class_names or folders.class_names(folder)
  names = names or tuple(f'class {label}' for label in range(task.num_classes))
  if len(names) != task.num_classes:
    raise errors.UserError(
      f'{folder / folders.CLASSES_FILE}: {len(names)} names, but {task.title} has '
      f'{task.num_classes} classes.'
    )
  labels, names = list_labels.class_ids(rows, names)
  parts = {
    part: sources.FileSource(folder, listed.paths, labels[part], num_classes=len(names))
    for part, listed in rows.items()
  }
  about = [f'VTAB-1K {task.title}: {len(names)} classes, exported images in {folder}']
  about += [f'{part}: {len(rows[part].paths):,} images in {name}' for part, name in LISTS.items()]
  return sources.Splits(parts['train'], parts['val'], parts['test'], names, tuple(about))


def _task_folder(task: Task, root: pathlib.Path) -> pathlib.Path:
  """The folder of a task in `root`, or `root` itself."""
  if (root / LISTS['train']).is_file():
    try:
      other = vtab_tasks.find(root.resolve().name)
    except errors.UserError:
      other = task  # A folder of any other name.
    if other != task:
      raise errors.UserError(f"{root} is the folder of task '{other.name}', not '{task.name}'.")
    return root
  names = (task.name, *task.aliases)
  found = [root / name for name in names if (root / name).is_dir()]
  if not found:
    raise errors.UserError(
      f"{root}: no folder of task '{task.name}' (looked for {', '.join(names)}) and no "
      f'{LISTS["train"]}. There: {", ".join(e.name for e in folders.entries(root)) or "(nothing)"}.'
    )
  return found[0]


def _from_tfds(
  task: Task, root: str | None, data_path: str, max_gigabytes: float | None
) -> sources.Splits:
  if data_path == 'tfds':
    file_format, other, open_source = 'array_record', 'tfds_tfrecord', tfds_records.TfdsSource
  else:
    file_format, other = 'tfrecord', 'tfds'
    limit = tfds_tfrecord.MAX_GIGABYTES if max_gigabytes is None else max_gigabytes
    open_source = functools.partial(tfds_tfrecord.read, max_gigabytes=limit)
  directory = _builder_directory(task, tfds_builders.data_folder(root), file_format)
  other = f'--config.dataset_configs.data_path={other}'
  prepare = f'{task.builder}:{task.version}'
  builder = tfds_builders.open_builder(directory, file_format, other, prepare)
  names, fields = _class_names(task, builder), task.source_fields()
  parts = {'train': task.train, 'val': task.valid, 'test': task.test}
  opened = {part: open_source(directory, split, fields) for part, split in parts.items()}
  for source in opened.values():
    tfds_records.check_first(source)
  about = [f'VTAB-1K {task.title}: {len(names)} classes, {builder.info.full_name} in {directory}']
  about += [f'{part}: {len(opened[part]):,} images, {split}' for part, split in parts.items()]
  about += _other_version(task, str(builder.info.version))
  return sources.Splits(opened['train'], opened['val'], opened['test'], names, tuple(about))


def _builder_directory(task: Task, folder: pathlib.Path, file_format: str) -> pathlib.Path:
  """The set of a task in a TFDS data folder, in the version nearest to that of the benchmark."""
  if (folder / tfds_builders.INFO_FILE).is_file():
    return tfds_builders.find(task.builder, str(folder))
  versions = tfds_builders.prepared(task.builder, folder)
  major = task.benchmark_versions[0].partition('.')[0]
  newest_first = [version for version in reversed(versions) if version.partition('.')[0] == major]
  for version in (*task.benchmark_versions, *newest_first, task.version):
    if version in versions:
      return versions[version]
  raise tfds_builders.not_prepared(f'{task.builder}:{task.version}', folder, file_format)


def _other_version(task: Task, version: str) -> list[str]:
  """What to say of a version that is not the benchmark's."""
  published = task.benchmark_versions
  if version in published:
    return []
  gone = '' if task.version in published else ', which TFDS no longer prepares'
  return [
    f'published results have {task.builder} {" or ".join(published)}{gone}: the 1,000 training '
    f'images of {version} may be others'
  ]


def _class_names(task: Task, builder: Any) -> tuple[str, ...]:
  """The names, once the set is known to have the classes of the benchmark."""
  if task.class_names:
    return task.class_names
  feature: Any = dict(builder.info.features.items()).get('label')
  if getattr(feature, 'num_classes', None) != task.num_classes:
    raise errors.UserError(
      f'{builder.info.full_name}: its label {feature} is not one of the {task.num_classes} classes '
      f'of {task.title}.'
    )
  return tuple(feature.names)
