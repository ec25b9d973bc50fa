"""The words for how a run goes: '739 images/s (370 a device)  data 0% host 3% device 97%'."""

from collections.abc import Mapping, Sequence

# A piece of a line with the space before it, and its rank: the highest are left out first.
Piece = tuple[int, str]


def pieces(
  loss: float | None,
  values: Mapping[str, float],
  unit: str = 'images',
  memory_gb: float | None = None,
  of: str = '',
) -> list[Piece]:
  """The pieces of a line, of what is known.

  Args:
    loss: the latest.
    values: those of `Progress.measurements`.
    unit: what is counted.
    memory_gb: held by the fullest device, or by the process.
    of: whose loss it is, if there are several.
  """
  found: list[Piece] = []
  if loss is not None:
    found.append((0, f'  loss {loss:.4f}'))
    if of:
      found.append((5, f' of {of}'))
  if 'img/sec' in values:
    found.append((0, f'  {number(values["img/sec"])} {unit}/s'))
    if values['img/sec/device'] != values['img/sec']:
      found.append((4, f' ({number(values["img/sec/device"])} a device)'))
    data, device = (round(100 * values[name]) for name in ('input_wait', 'device_wait'))
    found.append((1, f'  data {data}% host {max(0, 100 - data - device)}% device {device}%'))
  if memory_gb is not None:
    found.append((3, f'  {number(memory_gb, 100)} GB'))
  if 'mfu' in values:
    found.append((2, f'  MFU {number(100 * values["mfu"])}%'))
  return found


def fit(found: Sequence[Piece], columns: int) -> str:
  """The pieces in a line of at most `columns`, as many as fit; those of rank 0 in any case."""
  found = list(found)
  while len(line := ''.join(text for _, text in found).strip()) > columns:
    rank, worst = max(((rank, i) for i, (rank, _) in enumerate(found)), default=(0, 0))
    if not rank:
      break
    del found[worst]
  return line


def number(value: float, whole_from: float = 10) -> str:
  """A number that is at least 0, in two digits or more: '0.25', '3.1', '739'."""
  if value >= whole_from:
    return f'{value:.0f}'
  return f'{value:.1f}' if value >= 10 else f'{value:.2g}'
