"""Public checkpoint -> backbone of ours, and back.

  python -m losa_scenic.convert --from=FILE_OR_DIR --to=DIR
  python -m losa_scenic.convert --from=FILE_OR_DIR                    # only looks
  python -m losa_scenic.convert --from=OURS --to=DIR --format=timm    # for PyTorch

Prints what the checkpoint is and where each fact is from. DIR then is a name for --config.backbone.
"""

import argparse
import collections
import dataclasses
import math
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tqdm

from losa_scenic.common_lib import errors
from losa_scenic.model_lib import spec as spec_lib
from losa_scenic.model_lib.spec import BackboneSpec
from losa_scenic.weights_lib import backbones, checkpoint, export, families, spelling, stored

OURS = 'losa_scenic'


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command; exits with 1 and one message for a mistake that the user can mend."""
  args = _parser().parse_args(argv)
  try:
    run(args)
  except errors.UserError as e:
    print(f'error: {e}', file=sys.stderr)
    sys.exit(1)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m losa_scenic.convert',
    description='Reads a checkpoint of a vision transformer, says what it is, and writes it in '
    'another format.',
    epilog='Families: ' + ', '.join(family.name for family in families.FAMILIES) + '.',
  )
  add = parser.add_argument
  add('--from', dest='source', required=True, metavar='FILE_OR_DIR', help=(
    'safetensors, npz (FILE.npz:img for a part), PyTorch zip files, Flax msgpack, an index of '
    'several, a folder as a hub has it, or a backbone of ours'
  ))  # fmt: skip
  add('--to', metavar='DIR', help=(
    'where to write, a folder without other weights; without it nothing is written'
  ))  # fmt: skip
  add('--format', default=OURS, choices=(OURS, *export.names()), help='what to write (%(default)s)')
  add('--family', default='auto', choices=('auto', *families.names()), help=(
    'which names the file has, if several would do (%(default)s: found out)'
  ))  # fmt: skip
  add('--prefix', help='which encoder, if the file has several: what its names begin with')
  add('--dtype', default='float32', choices=stored.DTYPES, help='dtype of storage (%(default)s)')
  add('--set', action='append', default=[], metavar='FIELD=VALUE', help=(
    'a fact that the checkpoint does not say, e.g. --set heads=16 (fields of '
    'losa_scenic.model_lib.spec.BackboneSpec)'
  ))  # fmt: skip
  return parser


def run(args: argparse.Namespace) -> None:
  """Looks at the source, prints what it is, and writes it if `args.to` is given.

  Raises:
    errors.UserError: for a source that cannot be read, or a target that cannot be written.
  """
  given = _fields(args.set)
  if args.to:  # Before anything is read: that takes a while.
    export.check_free(args.to, backbones.IN_FOLDER if args.format == OURS else None)
  own = backbones.own_description(args.source)
  if own is not None:
    if given or args.prefix or args.family != 'auto':
      raise errors.UserError(f'{args.source} says what it is: --set, --family, --prefix are moot.')
    weights: backbones.Weights = stored.open_stored(own)
    weights.verify()
    print(_table(weights.spec, {}, [('source', str(own))]))
    card = dict(weights.description['card'])
  else:
    weights = public = checkpoint.open_checkpoint(args.source, given, args.prefix, args.family)
    print(_table(public.spec, public.described.origins, _source_rows(public)))
    card = _card(public) if args.to else {}  # It takes a pass over the whole file.
  if args.to:
    _write(pathlib.Path(args.to), weights, args.format, args.dtype, card)


def _fields(settings: Sequence[str]) -> dict[str, Any]:
  fields = {}
  for text in settings:
    name, equals, value = text.partition('=')
    if not equals:
      raise errors.UserError(f'--set {text}: write FIELD=VALUE.')
    kind = spec_lib.field_types()[errors.one_of('backbone field', name, spec_lib.field_types())]
    try:
      fields[name] = _READERS.get(kind, kind)(value)
    except (ValueError, KeyError):
      raise errors.UserError(f'--set {text}: {name} is of type {kind.__name__}.') from None
  return fields


_READERS: dict[type, Callable[[str], Any]] = {
  bool: lambda text: {'true': True, 'false': False}[text.lower()],
  tuple: lambda text: tuple(float(part) for part in text.strip('()[]').split(',')),
}


def _source_rows(weights: checkpoint.Checkpoint) -> list[tuple[str, str]]:
  layout, source = weights.layout, weights.source
  rows = [('source', str(source.path)), ('family', layout.family.name)]
  if layout.prefix:
    rows.append(('prefix', layout.prefix))
  taken = source.metadata.get('taken')
  if taken:
    rows.append(('part of the file', str(taken)))
  if layout.left_out:
    rows.append(('left out', _groups([n.removeprefix(layout.prefix) for n in layout.left_out])))
  return rows


def _groups(names: Sequence[str]) -> str:
  """Names of tensors in a few words."""
  if len(names) < 4:
    return ', '.join(names)
  groups = collections.Counter(name.partition('.')[0].partition('/')[0] for name in names)
  return ', '.join(f'{group} ({count})' for group, count in sorted(groups.items()))


# What everybody wants to see; other fields are shown where they differ from the plain ViT.
_ALWAYS = ('depth', 'width', 'heads', 'mlp', 'patch', 'image_size', 'pool', 'activation')
_ALWAYS += ('norm_eps', 'mean', 'std', 'interpolation')


def _table(spec: BackboneSpec, origins: Mapping[str, str], rows: list[tuple[str, str]]) -> str:
  """What a backbone is, a fact a line, with where it is from."""
  params = sum(math.prod(shape) for shape in checkpoint.param_shapes(spec).values())
  lines = [('parameters', f'{params:,}', ''), ('tokens', f'{spec.tokens:,}', '')]
  for field in dataclasses.fields(BackboneSpec):
    value = getattr(spec, field.name)
    if field.name in _ALWAYS or (field.name != 'name' and value != field.default):
      lines.append((field.name, _text(value), origins.get(field.name, '')))
  name = max(len(line[0]) for line in [*rows, *lines])
  value = max(len(line[1]) for line in lines)
  shown = [f'  {a:{name}}  {b}' for a, b in rows]
  return '\n'.join([*shown, *(f'  {a:{name}}  {b:{value}}  {c}'.rstrip() for a, b, c in lines)])


def _text(value: Any) -> str:
  return ', '.join(f'{v:g}' for v in value) if isinstance(value, tuple) else str(value)


def _card(weights: checkpoint.Checkpoint) -> dict[str, Any]:
  """What a converted backbone remembers of its source."""
  return {
    'source': weights.source.path.name,
    'source_sha256': weights.sha256,
    'family': weights.layout.family.name,
    'prefix': weights.layout.prefix,
    'facts': dict(weights.described.origins),
    'left_out': list(weights.layout.left_out),
    'spelling': spelling.Original.of(weights).to_json(),
  }


def _write(
  to: pathlib.Path, weights: backbones.Weights, format_: str, dtype: str, card: dict[str, Any]
) -> None:
  """Writes in our format, or under a public family's names."""
  remarks = []
  with tqdm.tqdm(total=len(weights.shapes), unit=' parameters', disable=None) as progress:
    params = _Read(weights, progress)
    if format_ == OURS:
      spec = dataclasses.replace(weights.spec, name=to.name)
      stored.write(to / backbones.IN_FOLDER, spec, params.__getitem__, dtype, card)
      remarks = [f'use it: --config.backbone={to}']
    else:
      known = card.get('spelling')
      like = spelling.Original.from_json(known) if known else None
      remarks = export.write(to, weights.spec, params, format_, dtype, like=like)
  for path in sorted(to.iterdir()):
    print(f'  {path}  {path.stat().st_size / 2**20:,.2f} MiB')
  print('\n'.join(remarks))


@dataclasses.dataclass(frozen=True)
class _Read(Mapping[str, Any]):
  """Parameters by path, read when they are asked for."""

  weights: backbones.Weights
  progress: tqdm.tqdm

  def __getitem__(self, path: str) -> Any:
    self.progress.update()
    return self.weights.read(path)

  def __iter__(self) -> Iterator[str]:
    return iter(self.weights.shapes)

  def __len__(self) -> int:
    return len(self.weights.shapes)


if __name__ == '__main__':
  main()
