"""Writes docs/backbones.md: runs every public checkpoint of the tests and says what came out.

  python tests/weights_lib/make_table.py

`test_families.py` fails if the file says anything that a run of the tests does not find.
"""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[2]
PATH = ROOT / 'docs' / 'backbones.md'
COLUMNS = ('loads', 'blocks', 'pooled', 'resized', 'LoSA trains')

HEADER = """# Public checkpoints

Files and folders of these families are backbones as they are: `config.backbone` takes their path.
Each row is about small models with random weights, in the format and with the names of the family's
published checkpoints. The libraries named wrote them, or read them, and computed in float64 what
the tests compare with. Published weights themselves were not downloaded.

- **Loads**: the geometry that is found out is the model's, every tensor has its place, and nothing
  is left over. "given" names what had to be stated for these small models: nothing beside such a
  file says it (`config.backbone_configs.heads` and the like). Of published ones, heads follow from
  the other sizes where all models of those sizes have the same number.
- **Blocks**, **pooled**: the output of every block, and the pooled features before a classifier or
  projection, are the library's. The number is the largest difference of our float32 over the
  largest value; the bound is 1e-5.
- **Resized**: the weights are used at other input sizes, positions resampled as the family's code
  does it (relative ones, BEiT's, as timm does it). With a number: compared with that code, same
  measure, for the output of the last block. Without: it runs, and nothing but the positions of
  patches changes.
- **LoSA trains**: LoSA on top of the resized backbone moves, and its loss falls.

The same model in the formats of big_vision (plain, `img/` submodel, scanned layers, bfloat16) and
Scenic (msgpack) loads to the numbers of the npz row: `tests/weights_lib/test_jax_files.py`.

Of clips, ViViT in the files of transformers is read (VivitModel, VivitForVideoClassification), with
its config.json: `tests/weights_lib/test_clip_checkpoints.py`. VideoMAE is not.

Written by `tests/weights_lib/make_table.py`; `tests/weights_lib/test_families.py` holds every row.

| Family | Files | Models | Loads | Blocks | Pooled | Resized | LoSA trains |
|---|---|---|---|---|---|---|---|
"""


def cells(text: str) -> dict[tuple[str, str], list[str]]:
  """(family, source) -> the cells of the five columns, from the text of the file."""
  rows = [line.strip('| ').split(' | ') for line in text.splitlines() if line.startswith('| ')]
  return {(row[0], row[1]): row[3:] for row in rows[1:]}


def number(cell: str) -> float | None:
  """The number that a cell states."""
  match = re.search(r'\d\S*e-\d+', cell)
  return float(match[0]) if match else None


def render(found: dict[tuple[str, str], list[str]]) -> str:
  """Text of the file; `found` are the cells of the five columns."""
  from reference import public_checkpoints as public

  lines = []
  for (family, source), cases in public.rows().items():
    models = ', '.join(dict.fromkeys(public.INDEX[case]['class'].split('.')[0] for case in cases))
    lines.append(' | '.join([family, source, models, *found[family, source]]))
  return HEADER + ''.join(f'| {line} |\n' for line in lines)


def row_cells(cases, claims: dict[str, bool], errors: dict[str, float | None]) -> list[str]:
  """The cells of a row: what holds of all its cases, and the largest errors."""
  from reference import public_checkpoints as public

  needs = sorted({field for case in cases for field in public.INDEX[case]['needs']})
  found = []
  for column in COLUMNS:
    cell = 'yes' if claims[column] else 'no'
    if column == 'loads' and needs:
      cell += f', given {", ".join(needs)}'
    if errors.get(column) is not None:
      cell += f', {errors[column]:.0e}'
    found.append(cell)
  return found


def measured(results) -> tuple[dict[str, bool], dict[str, float | None]]:
  """Claims and errors of the cases of a row together."""
  claims = {c: all(result.claims()[c] for result in results) for c in COLUMNS}
  errors: dict[str, float | None] = {
    'blocks': max(result.blocks for result in results),
    'pooled': max(result.pooled for result in results),
    'resized': max((r.resized for r in results if r.resized is not None), default=None),
  }
  return claims, errors


def main() -> None:
  """Runs everything and writes the file."""
  sys.path.insert(0, str(ROOT / 'tests'))
  from reference import public_checkpoints as public

  found = {}
  for row, cases in public.rows().items():
    found[row] = row_cells(cases, *measured([public.check(case) for case in cases]))
    print(*row, *found[row], sep=' | ', flush=True)
  PATH.parent.mkdir(exist_ok=True)
  PATH.write_text(render(found))


if __name__ == '__main__':
  main()
