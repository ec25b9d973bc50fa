"""`losa_scenic.main`, which also writes down what every training step was given.

  python tests/faults/observed_run.py FILE --config=... (the arguments of losa_scenic.main)

A line of FILE is {"step", "positions" (of the images), "checksum" (of all that the step saw)}. Each
is written at once, so a kill leaves what was seen.
"""

import json
import os
import sys
import zlib

import jax

from losa_scenic import app
from losa_scenic.main import main
from losa_scenic.train_lib import loop


def observe(path: str) -> None:
  """Writes down the batches of all runs of this process."""
  train = loop.Loop._train

  def observed(self, step, batch):
    checksum = 0
    for name in sorted(batch):
      checksum = zlib.crc32(batch[name].tobytes(), checksum)
    row = {'step': step, 'positions': batch['index'].tolist(), 'checksum': checksum}
    name = f'{path}.{jax.process_index()}' if jax.process_count() > 1 else path
    file = os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, (json.dumps(row) + '\n').encode())
    os.close(file)
    train(self, step, batch)

  loop.Loop._train = observed


if __name__ == '__main__':
  observe(sys.argv[1])
  app.run(main, [sys.argv[0], *sys.argv[2:]], ends_process=True)
