"""Kills a real training process at random instants, again and again, and compares what is left.

  python tests/faults/campaign.py --kills 100 [--seed 0] [--workdir DIR]

One run is left alone. The other is killed (SIGKILL or SIGTERM; at any moment of training and
evaluation, as soon as a save has begun, or while it starts) and started again, with another number
of loader processes now and then, until it has ended. Then both must have the same rows in
metrics.jsonl, the same final weights, optimizer state and best checkpoint, bit for bit, and every
step must have seen the same images in every life.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing import event_accumulator

from losa_scenic.dataset_lib import digits
from losa_scenic.train_lib import checkpoint_files, progress, writers

ROOT = pathlib.Path(__file__).parents[2]
# Saves, logs and evaluations fall on different steps; nothing falls on the last.
RUN = (
  f'--config={ROOT / "configs" / "quickstart.py"}',
  '--config.dataset_name=image_folder',
  '--config.backbone=test/8',
  '--config.random_backbone=True',
  '--config.batch_size=8',
  '--config.eval_batch_size=14',
  '--config.checkpoint_steps=4',
  '--config.log_summary_steps=7',
  '--config.log_eval_steps=30',
  '--config.lr_configs.warmup_steps=2',
  '--config.augment.min_crop_area=0.5',
  '--config.augment.flip=True',
  '--config.augment.mixup_alpha=0.3',
  '--config.optimizer_configs.weight_decay=0.01',
  '--config.augment.randaugment_ops=1',
  '--config.watchdog_seconds=60',
)
# How a life ends, and how often: at a random moment of training, in a save, while it starts.
KINDS = {('train', 9): 30, ('train', 15): 25, ('save', 9): 35, ('save', 15): 5, ('start', 9): 5}
_LONGEST_START = 4.0  # seconds
_MOST_STEPS = 24  # of a life that ends in training


def write_images(folder: pathlib.Path, count: int = 90) -> None:
  """An image folder of digits as PNG, ten classes, with a test part."""
  train, test = digits.splits().train, digits.splits().test
  for part, source, number in (('train', train, count), ('test', test, count // 3)):
    for i in range(number):
      record = source[i]
      place = folder / part / str(record.label)
      place.mkdir(parents=True, exist_ok=True)
      Image.fromarray(np.asarray(record.image)).save(place / f'{i}.png')


class Campaign:
  """One pair of runs.

  Attributes:
    root: where everything is.
    environment: variables of the runs.
    ends: (kind, signal) -> number of lives that ended so.
    in_saves: kills that left a half-written checkpoint.
    lost: steps that a SIGTERM lost, of all of them; 0 is wanted.
    slowest_stop: seconds from a SIGTERM to the end of the process, at most.
  """

  def __init__(
    self, workdir: pathlib.Path, steps: int, seed: int, environment: dict[str, str] | None = None
  ):
    """Writes the images into `workdir`; nothing is run yet."""
    self.root, self._steps = workdir, steps
    self._rng = random.Random(seed)
    self.environment = {
      **{k: v for k, v in os.environ.items() if not k.startswith(('JAX_', 'XLA_'))},
      'JAX_PLATFORMS': 'cpu',
      'PYTHONPATH': str(ROOT),
      'JAX_COMPILATION_CACHE_DIR': str(workdir / 'compiled'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
      **(environment or {}),
    }
    self.ends: collections.Counter = collections.Counter()
    self.in_saves = self.lost = 0
    self.slowest_stop = 0.0
    write_images(workdir / 'images')

  def arguments(self, name: str) -> list[str]:
    """The command line of the run `name`."""
    return [
      *RUN,
      f'--config.dataset_configs.root={self.root / "images"}',
      f'--config.num_training_steps={self._steps}',
      f'--workdir={self.root / name}',
    ]

  def start(self, name: str, *overrides: str) -> subprocess.Popen:
    """Starts, or continues, the run `name`."""
    observed = [str(ROOT / 'tests' / 'faults' / 'observed_run.py'), str(self.root / f'{name}.seen')]
    with (self.root / f'{name}.log').open('ab') as log:
      return subprocess.Popen(
        [sys.executable, *observed, *self.arguments(name), *overrides],
        env=self.environment,
        cwd=ROOT,
        stdout=log,
        stderr=log,
      )

  def finish(self, name: str, *overrides: str) -> None:
    """Runs `name` to its end."""
    status = self.start(name, *overrides).wait(600)
    if status:
      raise AssertionError(f'{name} ended with {status}: {self.printed(name)[-3000:]}')

  def printed(self, name: str) -> str:
    return (self.root / f'{name}.log').read_text(errors='replace')

  def life(self, kinds: Sequence[tuple[str, int]]) -> bool:
    """Starts the broken run and kills it; False if it had ended before."""
    where, number = self._rng.choice(kinds)
    workers = 2 if self._rng.random() < 0.15 else 0
    process = self.start('broken', f'--config.num_workers={workers}')
    saves = self.root / 'broken' / 'checkpoints' / 'last'
    begun = len(self.seen('broken'))

    def trained(steps: int) -> bool:
      return len(self.seen('broken')) >= begun + steps

    if where == 'start':
      self._wait(process, lambda: False, self._rng.uniform(0, _LONGEST_START))
    else:
      steps = 1 if where == 'save' else self._rng.randint(1, _MOST_STEPS)
      self._wait(process, lambda: trained(steps))
      if where == 'save':
        self._wait(process, lambda: any(saves.glob('.tmp-*')))
        self._wait(process, lambda: False, self._rng.uniform(0, 0.02))
      else:
        self._wait(process, lambda: False, self._rng.uniform(0, 0.05))
    listening = len(self.seen('broken')) > begun + 1
    asked = time.monotonic()
    if process.poll() is None:
      process.send_signal(number)
    status = process.wait(120)
    if status == 0:
      return False
    self._check_end(status, number, listening, time.monotonic() - asked)
    self.ends[where, number] += 1
    self.in_saves += any(saves.glob('.tmp-*'))
    return True

  def _check_end(self, status: int, number: int, listening: bool, seconds: float) -> None:
    # Before the first step SIGTERM ends a process as usual.
    if status not in ((-number,) if number == 9 else (143, -15)):
      raise AssertionError(f'ended with {status}: {self.printed("broken")[-3000:]}')
    if number == 15 and listening:
      if status != 143:
        raise AssertionError(f'a stop ended with {status}: {self.printed("broken")[-3000:]}')
      self.slowest_stop = max(self.slowest_stop, seconds)
      last = checkpoint_files.steps(self.root / 'broken' / 'checkpoints' / 'last')[-1]
      self.lost += self.seen('broken')[-1]['step'] - last

  @staticmethod
  def _wait(process: subprocess.Popen, condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end and not condition():
      time.sleep(0.001)

  def seen(self, name: str) -> list[dict]:
    """What the steps of a run were given, of all its lives."""
    path = self.root / f'{name}.seen'
    text = path.read_text() if path.exists() else ''
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith('\n')]

  def rows(self, name: str) -> list[dict]:
    """The rows of metrics.jsonl without what a clock has measured."""
    lines = (self.root / name / 'metrics.jsonl').read_text().splitlines()
    return [
      {k: v for k, v in json.loads(line).items() if k not in progress.MEASUREMENTS}
      for line in lines
    ]

  def curves(self, name: str) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run, without what a clock has measured."""
    events = event_accumulator.EventAccumulator(
      str(self.root / name), size_guidance={'scalars': 0, 'images': 0}
    )
    events.Reload()
    assert 'config/text_summary' in events.Tags()['tensors']
    assert 'test_predictions' in events.Tags()['images']
    timing = {writers.tag(measured) for measured in progress.MEASUREMENTS}
    return {
      # An evaluation that a kill let come again shows the same values twice.
      tag: sorted({(event.step, event.value) for event in events.Scalars(tag)})
      for tag in events.Tags()['scalars']
      if tag not in timing
    }

  def differences(self) -> list[str]:
    """What tells the two runs apart; nothing is wanted."""
    found = []
    one, other = self.rows('whole'), self.rows('broken')
    if one != other:
      at = next(
        (i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), -1
      )
      found.append(f'rows of metrics.jsonl from {at} on: {len(one)} and {len(other)}')
    wanted = {row['step']: row for row in self.seen('whole')}
    seen = self.seen('broken')
    if sorted(wanted) != list(range(1, self._steps + 1)) or len(wanted) != len(self.seen('whole')):
      found.append('the run that was left alone did not see every step once')
    wrong = [row['step'] for row in seen if wanted.get(row['step']) != row]
    missing = wanted.keys() - {row['step'] for row in seen}
    if wrong or missing:
      found.append(f'other images at steps {wrong[:5]}, none at {sorted(missing)[:5]}')
    for kind in ('last', 'best'):
      found += self.different_arrays(kind)
    if self.curves('whole') != self.curves('broken'):
      found.append('TensorBoard shows other curves')
    summaries = [json.loads((self.root / n / 'summary.json').read_text()) for n in self.names]
    for key in ('test_accuracy', 'test_loss', 'valid_accuracy', 'valid_loss', 'num_steps'):
      if summaries[0].get(key) != summaries[1].get(key):
        found.append(f'{key}: {[summary.get(key) for summary in summaries]}')
    left = [str(path) for path in (self.root / 'broken').rglob('.tmp-*')]
    return found + [f'left behind: {left}'] * bool(left)

  names = ('whole', 'broken')

  def different_arrays(self, kind: str) -> list[str]:
    """Arrays of the newest checkpoint of a kind that are not the same in both runs."""
    folders = [self.root / name / 'checkpoints' / kind for name in self.names]
    steps = [checkpoint_files.steps(folder) for folder in folders]
    if steps[0] != steps[1]:
      return [f'{kind} checkpoints: {steps}']
    arrays = []
    for folder in folders:
      newest = folder / str(steps[0][-1])
      if problem := checkpoint_files.problem(newest):
        return [f'{newest}: {problem}']
      leaves = json.loads((newest / 'meta.json').read_text())['leaves']
      arrays.append(checkpoint_files.read_arrays(newest, leaves))
    return [
      f'{kind}: {path}'
      for path in sorted(arrays[0].keys() | arrays[1].keys())
      if arrays[0][path].tobytes() != arrays[1][path].tobytes()
    ]


def run(
  workdir: pathlib.Path, kills: int, seed: int, environment: dict[str, str] | None = None
) -> Campaign:
  """A campaign of so many kills.

  Raises:
    AssertionError: if anything was lost, doubled or changed.
  """
  kinds = [kind for kind, share in KINDS.items() for _ in range(share)]
  campaign = Campaign(workdir, steps=40 + 20 * kills, seed=seed, environment=environment)
  campaign.finish('whole')
  done = 0
  while done < kills and campaign.life(kinds):
    done += 1
    print(f'\r{done}/{kills} kills', end='', file=sys.stderr, flush=True)
  print(file=sys.stderr)
  if done < kills:
    raise AssertionError(f'the run had ended after {done} kills: it is too short')
  campaign.finish('broken')
  found = campaign.differences()
  if campaign.lost:
    found.append(f'SIGTERM lost {campaign.lost} steps')
  if found:
    raise AssertionError('\n  '.join(['the killed run is another one:', *found]))
  return campaign


def main() -> None:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--kills', type=int, default=100)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--workdir', type=pathlib.Path, help='kept afterwards; default: a new one')
  given = parser.parse_args()
  workdir = given.workdir or pathlib.Path(tempfile.mkdtemp(prefix='campaign_'))
  begun = time.monotonic()
  campaign = run(workdir, given.kills, given.seed)
  ends = ', '.join(f'{n} x {signal.Signals(s).name} in {w}' for (w, s), n in campaign.ends.items())
  print(
    f'{given.kills} kills ({ends}; {campaign.in_saves} left a half-written checkpoint): nothing '
    f'lost, nothing doubled, all bits the same. Slowest stop after SIGTERM '
    f'{campaign.slowest_stop:.1f} s. {time.monotonic() - begun:.0f} s in all.'
  )


if __name__ == '__main__':
  main()
