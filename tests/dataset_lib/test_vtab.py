"""VTAB-1K from exported images with lists, and its config."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from losa_scenic import app
from losa_scenic.bench_lib import hyper
from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import decode, sources, vtab, vtab_tasks
from losa_scenic.train_lib import run_config

TASKS = tuple(vtab_tasks.TASKS)


def export(folder, task, image=None):
  """Lists of a task with labels in turn; the first image of each is there."""
  for name, count in (('train800', 800), ('val200', 200), ('test', task.num_test)):
    lines = [f'images/{name}/{i:06d}.jpg {i % task.num_classes}' for i in range(count)]
    (folder / f'{name}.txt').parent.mkdir(parents=True, exist_ok=True)
    (folder / f'{name}.txt').write_text('\n'.join(lines) + '\n')
    first = folder / 'images' / name / '000000.jpg'
    first.parent.mkdir(parents=True)
    if image is None:
      first.touch()
    else:
      Image.fromarray(image).save(first)


@pytest.mark.parametrize('name', TASKS)
def test_every_task_from_lists(tmp_path, name):
  task = vtab_tasks.TASKS[name]
  folder = tmp_path / (task.aliases[-1] if task.aliases else task.name)
  export(folder, task)
  found = vtab.splits(task=name, root=str(tmp_path))
  assert [len(part) for part in (found.train, found.valid, found.test)] == [
    800,
    200,
    task.num_test,
  ]
  assert len(found.class_names) == task.num_classes
  assert found.test.labels.max() == task.num_classes - 1
  assert found.about[1] == 'train: 800 images in train800.txt'


@pytest.fixture
def kitti(tmp_path):
  export(tmp_path / 'kitti', vtab_tasks.TASKS['kitti'], np.full((6, 20, 3), 7, np.uint8))
  return tmp_path


def test_listed_images_are_read(kitti):
  for root in (kitti, kitti / 'kitti'):
    found = vtab.splits(task='kitti', root=str(root))
    record = found.test[0]
    assert decode.decode(record.image, record.id).shape == (6, 20, 3) and record.label == 0
    assert found.train.labels[:5].tolist() == [0, 1, 2, 3, 0]
    with pytest.raises(sources.BadImage, match=r'images/val200/000001\.jpg: cannot be read'):
      found.valid[1]


def test_the_folder_must_be_that_of_the_task(kitti):
  with pytest.raises(errors.UserError, match="is the folder of task 'kitti', not 'dmlab'"):
    vtab.splits(task='dmlab', root=str(kitti / 'kitti'))
  with pytest.raises(errors.UserError, match=r"no folder of task 'cifar100' .*There: kitti\."):
    vtab.splits(task='cifar100', root=str(kitti))
  with pytest.raises(errors.UserError, match=r'dataset_configs\.root=PATH'):
    vtab.splits(task='cifar100')


def test_other_numbers_of_images_are_an_error(kitti):
  lists = {name: kitti / 'kitti' / name for name in vtab.LISTS.values()}
  texts = {name: file.read_text() for name, file in lists.items()}
  for name, part, numbers in (
    ('train800.txt', 'train', '799 images, but the benchmark has 800'),
    ('val200.txt', 'val', '199 images, but the benchmark has 200'),
    ('test.txt', 'test', '710 images, but the benchmark has 711'),
  ):
    lists[name].write_text(
      texts[name].partition('\n')[0] + texts[name][texts[name].index('\n', 30) :]
    )
    with pytest.raises(errors.UserError, match=f'KITTI-Dist: the {part} split has {numbers}'):
      vtab.splits(task='kitti', root=str(kitti))
    lists[name].write_text(texts[name])
  lists['val200.txt'].unlink()
  with pytest.raises(errors.UserError, match=r'val200\.txt: there is no such file'):
    vtab.splits(task='kitti', root=str(kitti))


def test_a_label_out_of_range_is_an_error(kitti):
  file = kitti / 'kitti' / 'val200.txt'
  file.write_text(file.read_text().replace('000007.jpg 3', '000007.jpg 4'))
  with pytest.raises(errors.UserError, match=r'val200\.txt:8: label 4 is outside 0\.\.3'):
    vtab.splits(task='kitti', root=str(kitti))


def test_lists_of_another_folder_are_an_error(kitti):
  for file in (kitti / 'kitti').glob('images/test/*'):
    file.unlink()
  with pytest.raises(errors.UserError, match=r'test\.txt:1: .*must be relative to'):
    vtab.splits(task='kitti', root=str(kitti))


def test_names_of_the_classes_may_lie_beside_the_lists(tmp_path):
  export(tmp_path / 'dtd', vtab_tasks.TASKS['dtd'])
  assert vtab.splits(task='dtd', root=str(tmp_path)).class_names[3] == 'class 3'
  names = [f'texture {i}' for i in range(47)]
  (tmp_path / 'dtd' / 'classes.txt').write_text('\n'.join(names))
  assert vtab.splits(task='dtd', root=str(tmp_path)).class_names == tuple(names)
  (tmp_path / 'dtd' / 'classes.txt').write_text('\n'.join(names[1:]))
  with pytest.raises(errors.UserError, match='46 names, but DTD has 47 classes'):
    vtab.splits(task='dtd', root=str(tmp_path))


def test_options():
  with pytest.raises(errors.UserError, match=r'dataset_configs\.task=NAME, one of cifar100, '):
    vtab.splits(root='.')
  with pytest.raises(errors.UserError, match="Did you mean 'tfds'"):
    vtab.splits(task='svhn', root='.', data_path='tdfs')
  with pytest.raises(errors.UserError, match="max_gigabytes has no effect with data_path 'lists'"):
    vtab.splits(task='svhn', root='.', max_gigabytes=1.0)


def test_the_config_is_a_valid_run_and_its_sweep_has_every_task():
  path = pathlib.Path(__file__).parents[2] / 'configs' / 'vtab.py'
  run, _ = app.parse(['main', f'--config={path}:clevr-count'])
  run = run_config.resolve(run)
  assert run.dataset_configs.task == 'clevr_count' and run.method_configs.losa.rank == 16
  steps, epoch = run_config.number_of_steps(run, 1000)
  assert (steps, epoch, run.lr_configs.warmup_steps) == (1563, 15, 150)
  runs, repeated = hyper.expand(str(path))
  assert [one['config.dataset_configs.task'] for one in runs] == list(TASKS) and not repeated
  runs, _ = hyper.expand(f'{path}:pets')
  assert runs == [{'config.dataset_configs.task': 'oxford_iiit_pet'}]
