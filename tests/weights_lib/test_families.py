"""Every public family: loaded, computed, resized and adapted (reference/public_checkpoints.py)."""

import pytest
from reference import public_checkpoints as public
from weights_lib import make_table

from losa_scenic.weights_lib import resize

STATED = make_table.cells(make_table.PATH.read_text())
ROW_OF = {case: row for row, cases in public.rows().items() for case in cases}


def test_every_case_is_of_a_family():
  cases = [case for family in public.FAMILIES.values() for case in family]
  assert sorted(cases) == sorted(public.INDEX)


@pytest.mark.parametrize('case', public.INDEX)
def test_a_public_checkpoint_does_all_that_is_claimed_of_it(case):
  result = public.check(case)
  assert all(result.claims().values()), result
  # What docs/backbones.md states of its row. Another compiler orders sums differently: 4 times.
  stated = dict(zip(make_table.COLUMNS, STATED[ROW_OF[case]], strict=True))
  for column in ('blocks', 'pooled', 'resized'):
    have, limit = getattr(result, column), make_table.number(stated[column])
    assert have is None or have <= 4 * limit, (column, have, limit)


def test_the_table_claims_what_holds_and_no_more():
  """Every claim is asserted of every case above; numbers are as stated, where there are any."""
  claims = dict.fromkeys(make_table.COLUMNS, True)
  found = {}
  for row, cases in public.rows().items():
    errors = {}
    for column, cell in zip(make_table.COLUMNS, STATED[row], strict=True):
      if column in ('blocks', 'pooled') or any(f'{case}/image' in public.RESIZED for case in cases):
        errors[column] = make_table.number(cell)
    found[row] = make_table.row_cells(cases, claims, errors)
  assert make_table.PATH.read_text() == make_table.render(found)


def test_every_way_of_resizing_was_compared_with_the_library_that_does_it():
  compared = {name.split('/')[0] for name in public.RESIZED}
  assert {public.open_case(case).spec.position_resize for case in compared} == set(resize.METHODS)
  assert any(public.INDEX[case]['relative_positions'] for case in compared)
