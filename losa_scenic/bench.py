"""Measures models, methods and input.

python -m losa_scenic.bench params --backbone=g/14 --method=losa --set rank=64
python -m losa_scenic.bench params --all=tests/golden/param_counts.json
python -m losa_scenic.bench macs --backbone=g/14 --method=losa --set rank=64
python -m losa_scenic.bench memory --backbone=vivit-e/14x2 --method=losa --set rank=64
python -m losa_scenic.bench checkpoint --backbone=g/14 --method=losa --set rank=64
python -m losa_scenic.bench input
python -m losa_scenic.bench clips
python -m losa_scenic.bench quantisation --backbone=vit_mi8_tin120 --kind=w8a8
python -m losa_scenic.bench run
python -m losa_scenic.bench run --preset=gpu
python -m losa_scenic.bench compile --backbone=g/14 --method=losa --set rank=64
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from losa_scenic.adapt_lib import methods
from losa_scenic.bench_lib import (
  checkpoint_cost,
  clip_speed,
  compile_speed,
  gpu_memory,
  gpu_targets,
  input_speed,
  macs,
  params,
  quantisation,
  speed_report,
)
from losa_scenic.bench_lib.peers import COMPILE
from losa_scenic.bench_lib.speed_request import PRESETS, Request
from losa_scenic.bench_lib.speed_rows import DEVICES, DTYPES
from losa_scenic.bench_lib.train_speed import ROWS
from losa_scenic.common_lib import allocator, errors
from losa_scenic.common_lib import config as config_lib
from losa_scenic.model_lib import presets, quantised, streaming
from losa_scenic.model_lib.attention import WAYS
from losa_scenic.model_lib.classification_model import LAYER_LOOPS
from losa_scenic.train_lib import optimizers

# Options of commands beside those that all of a method share.
_MORE = {
  'memory': (
    *('batch_size', 'dtype', 'optimizer', 'layer_loop', 'remat', 'way'),
    *('backbone_quantisation', 'frozen_memory', 'stream_microbatches'),
    *('target', 'devices', 'fsdp'),
  ),
  'checkpoint': ('optimizer', 'saves', 'folder'),
  'compile': ('batch_size', 'rounds'),
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command; returns the exit code: 0, or 1 with one message on stderr."""
  args = _parser().parse_args(argv)
  try:
    if args.command in ('input', 'clips', 'quantisation', 'run'):
      for part in _tables(args):
        print(part, end='\n\n', flush=True)
      return 0
    if args.command == 'params' and args.all:
      return _check_all(args)
    if not (args.backbone and args.method):
      raise errors.UserError('Give --backbone and --method.')
    options = methods.from_text(args.method, config_lib.pairs('--set', args.set))
    backbone_options = {'pool': args.pool} if args.pool else {}
    measure: dict[str, Callable[..., dict[str, Any]]] = {
      'params': params.count,
      'macs': macs.of_method,
      'memory': gpu_memory.of_method,
      'checkpoint': checkpoint_cost.of_method,
      'compile': compile_speed.of_method,
    }
    more = {name: getattr(args, name) for name in _MORE.get(args.command, ())}
    result = measure[args.command](
      args.backbone, args.method, options, backbone_options, args.num_classes, **more
    )
  except errors.UserError as e:
    print(f'error: {e}', file=sys.stderr)
    return 1
  print(json.dumps(result))
  return 0


def _tables(args: argparse.Namespace) -> Iterator[str]:
  """What a command prints that measures speed, or quality."""
  if args.command == 'input':
    return input_speed.report(args.root, args.rounds, args.batch_size, args.image_size, args.cores)
  if args.command == 'clips':
    return clip_speed.report(args.root, args.frames, args.stride, args.rounds)
  if args.command == 'quantisation':
    kinds = (args.kind,) if args.kind else quantised.KINDS
    return quantisation.report(args.backbone, kinds, args.images, args.count)
  given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Request)}
  return speed_report.report(args.preset, given, args.json)


def _check_all(args: argparse.Namespace) -> int:
  """Checks a file of counts: one line a row, and the exit code 1 if one differs."""
  if args.backbone or args.method or args.set or args.pool:
    raise errors.UserError('--all takes its backbones, methods and options from the file.')
  rows = params.read_rows(pathlib.Path(args.all))
  wrong = 0
  for row in rows:
    changes = row.get('backbone_options', {})
    have = params.count(row['backbone'], row['method'], row['set'], changes)['trainable_params']
    same = have == row['trainable_params']
    wrong += not same
    options = (f'{k}={v}' for k, v in (changes | row['set']).items())
    what = ' '.join([row['backbone'], row['method'], *options])
    print(f'{"ok   " if same else "WRONG"} {have:>13,} {what}', end='')
    print('' if same else f', should be {row["trainable_params"]:,}', flush=True)
  print(f'{len(rows) - wrong} of {len(rows)} rows of {args.all} agree.')
  return int(wrong > 0)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m losa_scenic.bench',
    description='Measures models, methods and input; prints one JSON object, or a table.',
  )
  commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
  command = _add_command(
    commands,
    'params',
    help='count parameters, without allocating the model',
    description='Counts trainable, head and frozen parameters by shape evaluation.',
  )
  command.add_argument(
    '--all', metavar='FILE', help='check a JSON file of counts instead (see tests/golden)'
  )
  _add_command(
    commands,
    'macs',
    help='count multiply-accumulates of one image or clip',
    description='Counts multiply-accumulates of matrix products and convolutions in the traced '
    'forward pass, classifier included.',
  )
  _add_memory(commands)
  _add_checkpoint(commands)
  _add_input(commands)
  _add_clips(commands)
  _add_quantisation(commands)
  _add_run(commands)
  _add_compile(commands)
  return parser


def _add_memory(commands: Any) -> None:
  command = _add_command(
    commands,
    'memory',
    help='plan the device memory of a train step on GPUs; needs none',
    description="Compiles a train step for GPUs that need not be there (with JAX's CUDA plugin: "
    "pip install 'losa_scenic[plan]') and prints the memory that it takes of each, in MiB.",
  )
  for name, text in (
    ('batch_size', 'images or clips of each GPU'),
    ('devices', 'number of GPUs'),
    ('fsdp', 'GPUs that share the frozen weights of the layers'),
    ('stream_microbatches', "parts of a batch in each visit of a layer from the host's memory"),
  ):
    command.add_argument(f'--{name}', type=int, default=1, help=f'{text} (default: 1)')
  for name, default, known, text in (
    ('dtype', 'bfloat16', gpu_memory.DTYPES, 'of compute and of frozen weights'),
    ('optimizer', 'momentum', optimizers.OPTIMIZERS, 'of what trains, which is float32'),
    ('layer_loop', 'auto', LAYER_LOOPS, "loop over layers, as in a run's config"),
    ('frozen_memory', 'device', streaming.MEMORIES, 'where frozen layers are'),
    ('target', 'h100-80gb', gpu_targets.TARGETS, 'the GPU'),
  ):
    help = f'{text}: {", ".join(known)} (default: {default})'
    command.add_argument(f'--{name}', default=default, help=help)
  command.add_argument(
    '--attention', dest='way', default='auto', help=f'auto, {", ".join(WAYS)} (default: auto)'
  )
  command.add_argument('--remat', action='store_true', help='recompute layers in the backward pass')
  kinds = ', '.join(quantised.KINDS)
  command.add_argument(
    '--backbone_quantisation', metavar='KIND', help=f'{kinds} (default: none, frozen weights whole)'
  )


def _add_checkpoint(commands: Any) -> None:
  command = _add_command(
    commands,
    'checkpoint',
    help='measure size and time of the checkpoints of a run',
    description='Saves and restores the state of a run (what trains, and the optimizer) and prints '
    'its size and, as medians, how long training stands still and what happens beside it takes.',
  )
  known = ', '.join(optimizers.OPTIMIZERS)
  command.add_argument('--optimizer', default='momentum', help=f'{known} (default: momentum)')
  command.add_argument('--saves', type=int, default=9, help='how many saves (default: 9)')
  command.add_argument(
    '--folder', metavar='DIR', help='on the disk to measure (default: that of temporary files)'
  )


def _add_input(commands: Any) -> None:
  command = commands.add_parser(
    'input',
    help='time this and other loaders from JPEG files to training batches',
    description='Prints markdown: images per second and quality of every loader whose library is '
    'installed, of the same boxes of the same files.',
  )
  command.add_argument('--root', metavar='FOLDER', help='JPEG files (default: sample photos)')
  _add_numbers(
    command,
    ('rounds', 9, 'passes of each loader'),
    ('batch-size', 64, 'images of a batch'),
    ('image-size', 224, 'side of the result in pixels'),
    ('cores', 1, 'cores to use'),
  )


def _add_clips(commands: Any) -> None:
  command = commands.add_parser(
    'clips',
    help='time this and other readers of windows of frames from video files',
    description='Prints markdown: clips per second of one core, and the share of the frames that '
    'is decoded for them.',
  )
  command.add_argument('--root', metavar='FOLDER', help='video files (default: sample videos)')
  _add_numbers(
    command,
    ('frames', 32, 'frames of a clip'),
    ('stride', 2, 'distance between two of them, in frames of the file'),
    ('rounds', 9, 'passes of each reader'),
  )


def _add_run(commands: Any) -> None:
  command = commands.add_parser(
    'run',
    help='time train steps next to the forward pass, and to timm and peft',
    description='Prints markdown: time, CPU time and speed of steps, measured in turn in one '
    'process. Rows whose library is missing are named. Options that are given go before a preset.',
  )
  command.add_argument('--preset', help=f'options that go together: {", ".join(PRESETS)}')
  command.add_argument('--rows', help=f"of {', '.join(ROWS)}; or 'default', 'all'")
  for name, kind, text in (
    ('backbone', str, f'of images, a preset ({", ".join(presets.names())}) or a stored one'),
    ('batch_size', int, 'images of a step'),
    ('num_classes', int, 'width of the classifier'),
    ('dtype', str, f'of compute and frozen weights: {", ".join(DTYPES)}'),
    ('rounds', int, 'how often each row is timed'),
    ('device', str, f'auto, {", ".join(DEVICES)}'),
    ('torch_compile', str, f'auto ("off" on a CPU, else "model"), {", ".join(COMPILE)}'),
    ('row_limit', float, 'seconds that a row may take with --memory, before it is left out'),
    ('time_limit', float, 'seconds after which nothing new begins'),
  ):
    default = getattr(Request, name)
    help = text if kind is float else f'{text} (default: {default})'
    command.add_argument(f'--{name}', type=kind, help=help)
  command.add_argument(
    '--memory',
    action='store_true',
    default=None,
    help='first run each row in a process of its own: peak memory, and what fails',
  )
  command.add_argument('--json', action='store_true', help='print one JSON object, of all rounds')


def _add_compile(commands: Any) -> None:
  command = _add_command(
    commands,
    'compile',
    help='time the compilation of a train step, scanned and unrolled',
    description='Compiles a float32 train step for the device that is there, from shapes alone, '
    'and prints medians in seconds.',
  )
  command.add_argument('--batch_size', type=int, default=1, help='images or clips (default: 1)')
  command.add_argument('--rounds', type=int, default=3, help='how many times (default: 3)')


def _add_quantisation(commands: Any) -> None:
  command = commands.add_parser(
    'quantisation',
    help='measure how far the features of a quantised backbone are from those in float32',
    description='Prints markdown: cosine and relative error after every block, on test images.',
  )
  command.add_argument('--backbone', required=True, help="as in a run's config")
  command.add_argument('--kind', help=f'{", ".join(quantised.KINDS)} (default: all)')
  command.add_argument(
    '--images',
    default=quantisation.DRAWN[0],
    help=f'{", ".join(quantisation.DRAWN)}, or files of any set (default: %(default)s)',
  )
  _add_numbers(command, ('count', 64, 'images'))


def _add_numbers(command: Any, *options: tuple[str, int, str]) -> None:
  """Adds whole numbers to a command: name, default and meaning of each."""
  for name, default, text in options:
    command.add_argument(f'--{name}', type=int, default=default, help=f'{text} ({default})')


def _add_command(commands: Any, name: str, **texts: str) -> argparse.ArgumentParser:
  command = commands.add_parser(name, **texts)
  command.add_argument(
    '--backbone', help=f'preset ({", ".join(presets.names())}), packaged backbone or backbone file'
  )
  command.add_argument(
    '--method', help=f"{', '.join(sorted(methods.METHODS))}; or several: 'lora+ssf'"
  )
  command.add_argument(
    '--set',
    action='append',
    default=[],
    metavar='KEY=VALUE',
    help="an option of the method; of several methods 'lora.rank=4'",
  )
  command.add_argument('--pool', help='change the pooling: cls, gap or map')
  command.add_argument(
    '--num_classes', type=int, default=1000, help='width of the classifier (default: 1000)'
  )
  return command


if __name__ == '__main__':
  allocator.keep_memory()  # As in runs.
  sys.exit(main())
