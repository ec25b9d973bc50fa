"""Runs many steps and shows that memory, open files and step time stay flat.

  python tests/faults/soak.py [--steps 10000] [--workdir DIR]

The run saves every 50 steps, logs every 10 and evaluates every 1,000. Step times are medians, so
that another program on the machine does not count.
"""

import argparse
import os
import pathlib
import statistics
import sys
import tempfile
import threading
import time

from losa_scenic import app
from losa_scenic.main import main as run_main
from losa_scenic.train_lib import loop

ROOT = pathlib.Path(__file__).parents[2]
WARM = 0.1  # share of the steps before the first window
SHARE = 0.15  # of a window


class Samples:
  """What each step of a run found: resident bytes, open files, threads, seconds of CPU and wall."""

  def __init__(self):
    self.rows: list[tuple[int, int, int, float, float]] = []
    self._last = (0.0, 0.0)

  def take(self) -> None:
    """Adds a row: seconds are those since the last one."""
    resident = int(pathlib.Path('/proc/self/statm').read_text().split()[1]) * os.sysconf(
      'SC_PAGESIZE'
    )
    files, threads = len(os.listdir('/proc/self/fd')), threading.active_count()
    wall, cpu = time.perf_counter(), time.process_time()
    self.rows.append((resident, files, threads, cpu - self._last[1], wall - self._last[0]))
    self._last = (wall, cpu)

  def report(self) -> str:
    """The first window beside the last."""
    count = len(self.rows)
    size = int(SHARE * count)
    first = self.rows[int(WARM * count) :][:size]
    last = self.rows[-size:]
    lines = [f'{count} steps; windows of {size}, the first after {int(WARM * count)}']
    columns = ('resident MB', 'open files', 'threads', 'CPU ms a step', 'wall ms a step')
    for i, (name, scale) in enumerate(zip(columns, (1e-6, 1, 1, 1e3, 1e3), strict=True)):
      a, b = (scale * statistics.median(row[i] for row in rows) for rows in (first, last))
      most = scale * max(row[i] for row in last)
      lines.append(
        f'{name:>16}  {a:10.2f} -> {b:10.2f}  {100 * (b / a - 1):+.2f} %  (most {most:.2f})'
      )
    return '\n'.join(lines)


def main() -> None:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--steps', type=int, default=10000)
  parser.add_argument('--workdir', type=pathlib.Path)
  given = parser.parse_args()
  samples, train = Samples(), loop.Loop._train

  def sampled(self, step, batch):
    train(self, step, batch)
    samples.take()

  loop.Loop._train = sampled
  app.run(
    run_main,
    [
      sys.argv[0],
      f'--config={ROOT / "configs" / "quickstart.py"}',
      '--config.backbone=test/8',
      '--config.random_backbone=True',
      '--config.batch_size=8',
      f'--config.num_training_steps={given.steps}',
      '--config.checkpoint_steps=50',
      '--config.log_summary_steps=10',
      '--config.log_eval_steps=1000',
      f'--workdir={given.workdir or tempfile.mkdtemp(prefix="soak_")}',
    ],
  )
  samples.rows.pop(0)  # Compiles.
  print(samples.report())


if __name__ == '__main__':
  main()
