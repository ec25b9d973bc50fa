"""Looks at a data set before anything is trained on it.

python -m losa_scenic.data check photos/
python -m losa_scenic.data show photos/ --augment min_crop_area=0.3 --output=sheet.png
"""

import argparse
import datetime
import io
import json
import os
import pathlib
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import tqdm
from PIL import Image

from losa_scenic import app
from losa_scenic.common_lib import config as config_lib
from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import check, check_text, datasets, detect, request, show
from losa_scenic.dataset_lib.augment import Augment
from losa_scenic.dataset_lib.check_report import EXPECTED
from losa_scenic.dataset_lib.request import Request
from losa_scenic.train_lib import run_config
from losa_scenic.weights_lib import backbones

_DATASET_HELP = """\
DATASET is a folder or file (what is there is found out), the name of a data set, or a config file:
  python -m losa_scenic.data check photos/
  python -m losa_scenic.data check vtab --set task=dtd --set root=DIR
  python -m losa_scenic.data check configs/quickstart.py --config.dataset_name=sprites
What exists as a path is taken as one, unless --set root=... says otherwise. With a config file the
run's own set, options, augmentation, image size and number of frames are taken.

names: {names}
"""
_CHECK = """\
Reads every image of every split once and says what is there: classes, sizes, formats, broken
images, repeated ones within and between splits, and how long an epoch takes to read. Of clips every
frame is decoded, and durations and frame rates are told too.

exit code: 0 fine; 1 trouble (broken images, the same image in two splits or with two labels,
classes without training images, an empty split; of clips the same); 2 wrong usage, or a set that
cannot be opened
"""
_SHOW = """\
Draws what the model is shown, augmentation and mixing included, as one PNG: the first training
images of an epoch in their order, or validation or test images from all over the split. With
--epochs=N a row is one image in N epochs, so that what is random can be seen. Of clips some frames
are drawn, in the order of time.
"""
_SECONDS_BETWEEN_LINES = 5.0
# Flag -> the field that a config has for it.
_NOT_WITH_CONFIG = {
  'set': 'dataset_configs.KEY',
  'image_size': 'backbone_configs.image_size',
  'frames': 'backbone_configs.frames',
  'augment': 'augment.KEY',
  'seed': 'shuffle_seed',
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command; returns the exit code, see --help."""
  if isinstance(sys.stdout, io.TextIOWrapper):
    # What a strict encoding has no characters for, such as names of files that are no text.
    sys.stdout.reconfigure(errors='backslashreplace')
  parser = _parser()
  args, rest = parser.parse_known_args(argv)
  for argument in rest:
    if not argument.startswith('--config.') or '=' not in argument:
      parser.error(f'unknown argument {argument!r}; options of a config are --config.KEY=VALUE')
  try:
    wanted = (_of_config if _is_config(args.dataset) else _of_arguments)(args, rest)
    return {'check': _check, 'show': _show}[args.command](args, wanted)
  except errors.UserError as e:
    print(f'error: {e if _is_config(args.dataset) else _in_our_words(str(e))}', file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    return 130


def _check(args: argparse.Namespace, wanted: Request) -> int:
  if args.csv:
    _check_folder(args.csv)  # Before anything is read: that takes a while.
  splits = wanted.splits()
  parts = (splits.train, splits.valid, splits.test)
  total = sum(len(part) for part in parts if part is not None)
  with _Progress(total, 'clips' if splits.clips else 'images') as progress:
    report = check.check(
      splits,
      wanted.title,
      wanted.view,
      sampling=wanted.sampling,
      augment=wanted.augment,
      cache_bytes=wanted.cache_bytes,
      expected=EXPECTED.get(wanted.name),
      jobs=args.jobs,
      progress=progress.add,
    )
  if args.csv:
    rows = _writing(lambda: check_text.write_csv(report, args.csv), args.csv)
    print(f'{args.csv}: {rows:,} rows', file=sys.stderr)
  if args.json:
    print(json.dumps(report.to_json(), indent=1))
  else:
    print(check_text.text(report, bar=_printable('\u2588', '#')))
  return int(bool(report.troubles))


def _show(args: argparse.Namespace, wanted: Request) -> int:
  output = pathlib.Path(args.output)
  if output.suffix.lower() != '.png':
    raise errors.UserError(f'--output must be a .png file, not {args.output}.')
  _check_folder(args.output)
  if args.augment and args.split != 'train':
    raise errors.UserError(f'--augment is of training; {args.split} images are shown as they are.')
  picture = show.sheet(
    wanted, split=args.split, count=args.count, epoch=args.epoch, epochs=args.epochs
  )
  _writing(lambda: Image.fromarray(picture).save(output), args.output)
  print(f'{output}: {picture.shape[1]} x {picture.shape[0]} pixels')
  return 0


def _check_folder(path: str) -> None:
  if not os.path.isdir(os.path.dirname(path) or '.'):
    raise errors.UserError(f'{path}: there is no such folder to write to.')


def _writing(write: Callable, path: str):
  try:
    return write()
  except OSError as error:
    raise errors.UserError(f'{path}: cannot be written ({error.strerror}).') from error


def _is_config(dataset: str) -> bool:
  return dataset.partition(':')[0].endswith('.py')


def _of_config(args: argparse.Namespace, overrides: Sequence[str]) -> Request:
  """What the run of a config file would read."""
  if not os.path.isfile(args.dataset.partition(':')[0]):
    raise request.unknown(args.dataset)
  for flag, key in _NOT_WITH_CONFIG.items():
    if getattr(args, flag, None) not in (None, []):
      raise errors.UserError(
        f'--{flag.replace("_", "-")} does not go with a config file: use --config.{key}=VALUE.'
      )
  config, _ = app.parse(['', f'--config={args.dataset}', *overrides])
  config = run_config.resolve(config)
  spec = backbones.find(config.backbone, config_lib.to_dict(config.backbone_configs)).spec
  options = config_lib.to_dict(config.dataset_configs)
  name = config.dataset_name
  return Request(
    name=detect.detect(options.get('root')) if name == datasets.AUTO else name,
    options=options,
    augment=Augment(**config.augment),
    image_size=spec.image_size,
    interpolation=spec.interpolation,
    frames=spec.frames,
    seed=config.shuffle_seed,
    batch_size=config.batch_size,
    workers=config.num_workers,
  )


def _of_arguments(args: argparse.Namespace, overrides: Sequence[str]) -> Request:
  """What DATASET, --set and the like say."""
  if overrides:
    raise errors.UserError(f'{overrides[0]} goes with a config file alone; use --set KEY=VALUE.')
  return request.read(
    args.dataset,
    config_lib.pairs('--set', args.set),
    config_lib.pairs('--augment', getattr(args, 'augment', [])),
    image_size=224 if args.image_size is None else args.image_size,
    frames=args.frames,
    seed=getattr(args, 'seed', None) or 0,
  )


def _in_our_words(message: str) -> str:
  """Options as they are written here, where a run would have them in its config."""
  message = re.sub(r'--config\.dataset_name=(\w+)', r'\1 --set root=PATH', message)
  message = message.replace('--config.backbone_configs.frames', '--frames')
  return message.replace('--config.dataset_configs.', '--set ')


def _printable(wanted: str, plain: str) -> str:
  """`wanted` if the terminal's encoding has it."""
  try:
    wanted.encode(sys.stdout.encoding or 'ascii')
  except UnicodeEncodeError:
    return plain
  return wanted


class _Progress:
  """A bar on a terminal; elsewhere a line now and then."""

  def __init__(self, total: int, noun: str) -> None:
    self._total, self._done, self._began, self._noun = total, 0, time.monotonic(), noun
    self._last, self._lock = self._began, threading.Lock()
    self._bar = None
    if sys.stderr.isatty():
      self._bar = tqdm.tqdm(total=total, unit=f' {noun}', dynamic_ncols=True, leave=False)

  def __enter__(self) -> '_Progress':
    return self

  def __exit__(self, *error: object) -> None:
    if self._bar is not None:
      self._bar.close()

  def add(self, images: int) -> None:
    """Some more images or clips were read; called from several threads."""
    with self._lock:
      self._done += images
      now = time.monotonic()
      if self._bar is not None:
        self._bar.update(images)
      elif now - self._last >= _SECONDS_BETWEEN_LINES:
        self._last = now
        speed = self._done / (now - self._began)
        left = datetime.timedelta(seconds=round((self._total - self._done) / speed))
        rate = f'{speed:,.{int(speed < 10)}f} {self._noun}/s'
        print(
          f'{self._done:,} of {self._total:,} {self._noun}  {rate}  {left} left',
          file=sys.stderr,
          flush=True,
        )


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m losa_scenic.data',
    description='Looks at a data set before anything is trained on it.',
    allow_abbrev=False,
  )
  commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
  command = _add_command(commands, 'check', 'read every image and say what is wrong', _CHECK)
  add = command.add_argument
  add('--csv', metavar='FILE', help='list broken and repeated images there')
  add('--json', action='store_true', help='print the report as JSON')
  add('--jobs', type=int, metavar='N', help='threads to read with (default: one per core)')
  command = _add_command(commands, 'show', 'draw what the model is shown', _SHOW)
  add = command.add_argument
  add('--output', required=True, metavar='FILE.png', help='the picture; replaced if it exists')
  add('--augment', action='append', default=[], metavar='KEY=VALUE', help=(
    f'augmentation: {", ".join(sorted(config_lib.options(Augment)))}'
  ))  # fmt: skip
  add('--split', default='train', choices=show.SPLITS, help='(default: %(default)s)')
  add('--count', type=int, metavar='N', help=('images (default: 48, of clips 12; 6 with --epochs)'))
  add('--epoch', type=int, default=0, metavar='N', help='of training (default: %(default)s)')
  add('--epochs', type=int, metavar='N', help=(
    'a row per image, a column per epoch; images are then mixed with a neighbouring row'
  ))  # fmt: skip
  add('--seed', type=int, metavar='N', help='of order and augmentation (default: 0)')
  return parser


def _add_command(commands: Any, name: str, help: str, description: str) -> argparse.ArgumentParser:
  command = commands.add_parser(
    name,
    help=help,
    description=description,
    epilog=_DATASET_HELP.format(names=', '.join(sorted(datasets.DATASETS))),
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = command.add_argument
  add('dataset', metavar='DATASET', help='path, name or config file, see below')
  add('--set', action='append', default=[], metavar='KEY=VALUE', help=(
    'an option of the data set, as --config.dataset_configs.KEY of a run'
  ))  # fmt: skip
  add('--image-size', type=int, metavar='PIXELS', help=(
    'side of what the model is shown (default: 224, or what the config says)'
  ))  # fmt: skip
  add('--frames', type=int, metavar='N', help=(
    f'frames of a clip (default: {request.FRAMES}, or what the config says)'
  ))  # fmt: skip
  return command


if __name__ == '__main__':
  sys.exit(main())
