"""Loader processes that are killed, and reads that never return: real ones."""

import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable

import numpy as np
import psutil
import pytest
from PIL import Image

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import batches, dataset_utils, datasets, sources
from losa_scenic.dataset_lib.augment import Augment
from losa_scenic.dataset_lib.resize import View


def build(source: sources.Source, workers: int) -> dataset_utils.Dataset:
  pipeline = dataset_utils.Pipeline(
    batch_size=6,
    eval_batch_size=6,
    shuffle_seed=3,
    dtype_str='uint8',
    view=View(8),
    augment=Augment(min_crop_area=0.4, flip=True),
    workers=workers,
  )
  return dataset_utils.make_dataset(sources.Splits(source, None, source, ('only',)), pipeline)


def noise() -> sources.ArraySource:
  images = np.random.default_rng(0).integers(0, 256, (45, 8, 8, 3), np.uint8)
  return sources.ArraySource(images, np.zeros(45, int), 'noise', num_classes=1)


def loaders() -> list[psutil.Process]:
  children = psutil.Process().children()
  return [child for child in children if 'spawn_main' in ' '.join(child.cmdline())]


def until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
  end = time.monotonic() + seconds
  while not holds():
    assert time.monotonic() < end
    time.sleep(0.02)


def test_a_killed_loader_process_costs_seconds_and_no_batch(capfd):
  expected = build(noise(), workers=0).train_ds
  dataset = build(noise(), workers=2)
  iterator = dataset_utils.iterate(dataset.train_ds, 4, 40)
  seen = [next(iterator) for _ in range(3)]
  processes = loaders()
  assert len(processes) == 2
  numbers = ', '.join(str(process.pid) for process in sorted(processes, key=lambda p: p.pid))
  assert dataset.train_ds.reading() == [f'2 of 2 loader processes are alive (process {numbers})']
  # What is sent to the whole group of a run is for the run alone: it finishes its step.
  for process in processes:
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
  seen += [next(iterator) for _ in range(8)]
  assert capfd.readouterr().err == ''
  processes[0].kill()
  killed = time.monotonic()
  seen += list(iterator)
  assert time.monotonic() - killed < 20
  assert re.fullmatch(
    r'a loader process was killed \(signal 9; out of memory\?\): started again at batch \d+\n',
    capfd.readouterr().err,
  )
  assert len(seen) == 36
  for number, batch in enumerate(seen, start=4):
    for key, value in expected[number].items():
      np.testing.assert_array_equal(batch[key], value)
  assert not psutil.wait_procs(processes, timeout=10)[1] and not loaders()


def test_processes_killed_over_and_over_end_the_run(monkeypatch, capfd):
  assert batches._RESTARTS == 3
  monkeypatch.setattr(batches, '_RESTARTS', 1)
  iterator = dataset_utils.iterate(build(noise(), workers=1).train_ds, 40)
  done = threading.Event()

  def kill() -> None:
    while not done.wait(0.02):
      for child in multiprocessing.active_children():
        child.kill()

  killer = threading.Thread(target=kill)
  killer.start()
  try:
    with pytest.raises(errors.UserError, match=r'signal 9.* 2 times in a row .*batch 41 .*=N'):
      next(iterator)
  finally:
    done.set()
    killer.join()
  assert capfd.readouterr().err.count('started again at batch 41\n') == 1
  assert not loaders()


def test_an_error_in_a_loader_process_is_not_tried_again(capfd):
  source = noise()
  dataset = build(source, workers=1)
  source.images = ['no image'] * 45  # pyright: ignore
  with pytest.raises(TypeError, match=r'noise\[\d+\]: an image is wanted, not str'):
    next(dataset_utils.iterate(dataset.train_ds))
  assert 'started again' not in capfd.readouterr().err
  assert not loaders()


def test_a_hung_read_is_named(tmp_path):
  root, pipe = tmp_path / 'images', tmp_path / 'images' / 'train' / 'cat' / '2.png'
  for part in ('train', 'test'):
    for i in range(8):
      file = root / part / ('cat', 'dog')[i % 2] / f'{i}.png'
      file.parent.mkdir(parents=True, exist_ok=True)
      Image.new('RGB', (8, 8), (i, i, i)).save(file)
  dataset = datasets.build_dataset(
    'image_folder',
    batch_size=8,
    eval_batch_size=4,
    image_size=8,
    shuffle_seed=0,
    dataset_configs={'root': str(root), 'val_fraction': 0.0, 'max_bad_fraction': 0.2},
  )
  # A disk that does not answer: nobody ever writes to this pipe.
  pipe.unlink()
  os.mkfifo(pipe)
  train = dataset.train_ds
  assert train.reading() == []
  made = []
  reader = threading.Thread(target=lambda: made.append(train[0]))
  reader.start()
  try:
    # The others of the batch are read meanwhile, where there are threads for them.
    until(lambda: len(train.reading()) == 1 and str(pipe) in train.reading()[0])
    until(lambda: ', for 1 s' in str(train.reading()))
    (line,) = train.reading()
    index = train.names(range(8)).index(str(pipe))
    assert line == f'training image {index} ({pipe}), for 1 s'
  finally:
    with pipe.open('wb'):
      pass  # What reads it comes to the end of the file.
    reader.join(20)
  assert train.reading() == [] and len(made) == 1
  assert list(train.bad_files.problems) == [('train', str(pipe))]
