"""Measures models and methods.

python -m losa_scenic.bench params --backbone=g/14 --method=losa --set rank=64
"""

import argparse
import ast
import json
import sys
from collections.abc import Sequence
from typing import Any

from losa_scenic.adapt_lib import methods
from losa_scenic.bench_lib import params
from losa_scenic.common_lib import errors
from losa_scenic.model_lib import presets


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command; returns the exit code: 0, or 1 with one message on stderr."""
  args = _parser().parse_args(argv)
  try:
    options = parse_options(args.set)
    backbone_options = {'pool': args.pool} if args.pool else {}
    result = params.count(args.backbone, args.method, options, backbone_options, args.num_classes)
  except errors.UserError as e:
    print(f'error: {e}', file=sys.stderr)
    return 1
  print(json.dumps(result))
  return 0


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
  """['rank=64', 'adaptor=low_rank_mlp'] -> {'rank': 64, 'adaptor': 'low_rank_mlp'}.

  Values are Python literals where they can be read as such, else strings.

  Raises:
    errors.UserError: for a pair without '=', or an option given twice.
  """
  options: dict[str, Any] = {}
  for pair in pairs:
    name, equals, value = pair.partition('=')
    if not equals or not name:
      raise errors.UserError(f"--set takes NAME=VALUE, not '{pair}'.")
    if name in options:
      raise errors.UserError(f'--set {name} is given twice.')
    try:
      options[name] = ast.literal_eval(value)
    except (ValueError, SyntaxError):
      options[name] = value
  return options


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m losa_scenic.bench',
    description='Measures models and methods; prints one JSON object.',
  )
  commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
  command = commands.add_parser(
    'params',
    help='count parameters, without allocating the model',
    description='Counts trainable, head and frozen parameters by shape evaluation.',
  )
  command.add_argument(
    '--backbone',
    required=True,
    help=f'preset ({", ".join(presets.names())}), packaged backbone or backbone file',
  )
  command.add_argument('--method', required=True, help=', '.join(sorted(methods.METHODS)))
  command.add_argument(
    '--set', action='append', default=[], metavar='NAME=VALUE', help='an option of the method'
  )
  command.add_argument('--pool', help='change the pooling: cls, gap or map')
  command.add_argument(
    '--num_classes', type=int, default=1000, help='width of the classifier (default: 1000)'
  )
  return parser


if __name__ == '__main__':
  sys.exit(main())
