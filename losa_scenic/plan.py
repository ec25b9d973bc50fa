"""Plans a run before there is a GPU or data: memory, the largest batch, time at best, options.

  python -m losa_scenic.plan --config=configs/inat18_vitg.py --device=h100-80gb [--devices=8]

The train step of the config is compiled for the device, which need not be there, and never run.
Neither data nor weights are read.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence

# XLA's remarks on how it compiles; before JAX is imported.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

from losa_scenic import app
from losa_scenic.bench_lib import plan_table, planner
from losa_scenic.common_lib import errors
from losa_scenic.train_lib import run_config

_EPILOG = """\
overrides:
  --config.KEY=VALUE   changes a field of the config, as for losa_scenic.main

Memory for a GPU is exact with JAX's CUDA plugin (pip install 'losa_scenic[plan]', no GPU needed);
without it, a model estimates it, and the output says so.
"""


def main(arguments: Sequence[str] | None = None) -> int:
  """The command line.

  Args:
    arguments: arguments without the program; by default those of the process.

  Returns:
    The exit code: 0, or 1 with one message on stderr.
  """
  given = list(sys.argv[1:] if arguments is None else arguments)
  overrides = [argument for argument in given if re.match(r'--(no)?config\.', argument)]
  args = _parser().parse_args([argument for argument in given if argument not in overrides])
  try:
    errors.check_at_least('num_classes', args.num_classes, 1)
    errors.one_of('device', args.device, planner.NAMES)
    config, _ = app.parse(['losa_scenic.plan', f'--config={args.config}', *overrides])
    device = planner.Device(args.device, args.devices, None if args.quick else _say)
    found = planner.plan(run_config.resolve(config), device, args.num_classes, args.quick)
  except errors.UserError as e:
    print(f'error: {e}', file=sys.stderr)
    return 1
  print(json.dumps({'config': args.config, **found}) if args.json else plan_table.text(found))
  return 0


def _say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m losa_scenic.plan',
    description='Plans memory and time of the train step that a config describes.',
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument('--config', required=True, metavar='FILE[:ARG]', help='of the run')
  parser.add_argument('--device', required=True, help=', '.join(planner.NAMES))
  parser.add_argument('--devices', type=int, default=1, metavar='N', help='how many (1)')
  parser.add_argument(
    '--num_classes', type=int, default=1000, metavar='N', help='classes of the data (1000)'
  )
  parser.add_argument(
    '--quick', action='store_true', help='plan one step: no largest batch, no options'
  )
  parser.add_argument('--json', action='store_true', help='print one JSON object')
  return parser


if __name__ == '__main__':
  sys.exit(main())
