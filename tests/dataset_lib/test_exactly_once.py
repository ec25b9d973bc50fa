"""What is seen, and when, does not depend on processes, hosts or restarts: real ones, of each."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import psutil
import pytest
from PIL import Image

from losa_scenic.dataset_lib import dataset_utils, datasets

COUNT, BATCH, STEPS = 45, 6, 23  # Three epochs are 22.5 batches.
# Prints a line for every batch: the positions seen and a checksum of what is shown.
PROGRAM = """
import json, sys, zlib
from losa_scenic.dataset_lib import datasets, dataset_utils

root, start, stop, workers, host, hosts = sys.argv[1], *map(int, sys.argv[2:])
dataset = datasets.build_dataset(
  'image_folder', batch_size=6, eval_batch_size=4, image_size=8, shuffle_seed=3,
  dataset_configs={'root': root, 'val_fraction': 0.0},
  augment={'min_crop_area': 0.4, 'flip': True, 'color_jitter': 0.3},
  workers=workers, host=host, hosts=hosts,
)
for batch in dataset_utils.iterate(dataset.train_ds, start, stop):
  images = [zlib.crc32(image.tobytes()) for image in batch['inputs']]
  print(json.dumps([batch['index'].tolist(), batch['label'].tolist(), images]), flush=True)
if not workers:
  for batch in dataset_utils.iterate(dataset.test_ds):
    print(json.dumps([batch['index'].tolist(), batch['batch_mask'].tolist()]), flush=True)
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> pathlib.Path:
  root = tmp_path_factory.mktemp('images')
  rng = np.random.default_rng(0)
  for part, count in (('train', COUNT), ('test', 10)):
    for i in range(count):
      # Every other image is large enough to be decoded at a fraction of its size.
      side = 12 if i % 2 else 60
      file = root / part / 'abc'[i % 3] / f'{i}.jpg'
      file.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(rng.integers(0, 256, (side, side + 2, 3), np.uint8)).save(file)
  return root


def start(folder, first=0, last=STEPS, workers=0, host=0, hosts=1) -> subprocess.Popen:
  numbers = [str(n) for n in (first, last, workers, host, hosts)]
  return subprocess.Popen(
    [sys.executable, '-c', PROGRAM, str(folder), *numbers], stdout=subprocess.PIPE, text=True
  )


def finish(process: subprocess.Popen) -> list:
  output, _ = process.communicate(timeout=120)
  assert process.returncode == 0
  return [json.loads(line) for line in output.splitlines()]


@pytest.fixture(scope='module')
def alone(folder) -> list:
  """The batches of one process without loader processes."""
  return finish(start(folder))


def test_each_epoch_is_another_permutation(alone):
  seen = np.concatenate([ids for ids, _, _ in alone[:STEPS]])
  epochs = seen[: 3 * COUNT].reshape(3, COUNT)
  for epoch in epochs:
    assert sorted(epoch) == list(range(COUNT))
  assert len({tuple(epoch) for epoch in epochs}) == 3
  # An image is shown differently in each epoch.
  shown = np.concatenate([images for _, _, images in alone[:STEPS]])[: 3 * COUNT]
  assert len(set(shown)) > 2.5 * COUNT


@pytest.mark.parametrize('workers', [1, 4])
def test_any_number_of_loader_processes(folder, alone, workers):
  assert finish(start(folder, workers=workers)) == alone[:STEPS]


def test_two_hosts(folder, alone):
  hosts = [start(folder, host=host, hosts=2) for host in range(2)]
  parts = [finish(process) for process in hosts]
  together = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(*parts, strict=True)]
  assert together == alone
  tested = [i for ids, mask in alone[STEPS:] for i, m in zip(ids, mask, strict=True) if m]
  assert tested == list(range(10))


def of_hosts(folder, hosts: int, **options) -> list[dataset_utils.Dataset]:
  return [
    datasets.build_dataset(
      'image_folder',
      batch_size=12,
      image_size=8,
      shuffle_seed=3,
      dataset_configs={'root': str(folder), 'val_fraction': 0.0},
      host=host,
      hosts=hosts,
      **options,
    )
    for host in range(hosts)
  ]


@pytest.mark.parametrize('hosts', [2, 4])
@pytest.mark.parametrize('eval_batch_size', [4, 8, 16])
def test_global_batches_are_the_same_for_any_number_of_hosts(folder, hosts, eval_batch_size):
  (alone,) = of_hosts(folder, 1, eval_batch_size=eval_batch_size)
  parts = of_hosts(folder, hosts, eval_batch_size=eval_batch_size)
  # An epoch ends within the fourth batch. Of 10 test images the last batch is never full: some
  # hosts have none of it, but as many batches as the others.
  count = -(-10 // eval_batch_size)
  assert {len(part.test_ds) for part in parts} == {len(alone.test_ds)} == {count}
  for name, steps in (('train_ds', (0, 3, 40)), ('test_ds', range(count))):
    for step in steps:
      batches = [getattr(part, name)[step] for part in parts]
      whole = getattr(alone, name)[step]
      assert {len(batch['index']) for batch in batches} == {len(whole['index']) // hosts}
      for key, value in whole.items():
        np.testing.assert_array_equal(np.concatenate([batch[key] for batch in batches]), value)
  tested = [
    int(i)
    for number in range(count)
    for part in parts
    for i, m in zip(*(part.test_ds[number][k] for k in ('index', 'batch_mask')), strict=True)
    if m
  ]
  assert tested == list(range(10))
  masked = np.concatenate([part.test_ds[count - 1]['index'] for part in parts])
  assert (masked == -1).sum() == count * eval_batch_size - 10


def test_killed_within_an_epoch_and_started_again(folder, alone):
  process = start(folder, workers=1)
  seen = [json.loads(process.stdout.readline()) for _ in range(11)]
  loaders = [
    child
    for child in psutil.Process(process.pid).children()
    if 'spawn_main' in str(child.cmdline())
  ]
  assert len(loaders) == 1
  process.kill()
  process.wait()
  _, alive = psutil.wait_procs(loaders, timeout=10)
  assert not alive  # Nobody is left behind to wait for a run that is gone.
  assert seen == alone[:11]
  assert seen + finish(start(folder, first=11)) == alone
