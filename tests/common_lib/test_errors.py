"""Errors name what was given, the nearest name and what there is."""

import pytest

from losa_scenic.common_lib import errors


def test_unknown_names_the_nearest():
  text = str(errors.unknown('method', 'lsoa', ['losa', 'full']))
  assert text == "Unknown method 'lsoa'. Did you mean 'losa'? Known: full, losa."


def test_unknown_without_anything_near_or_known():
  assert str(errors.unknown('method', 'zzz', ['losa'])) == "Unknown method 'zzz'. Known: losa."
  assert str(errors.unknown('method', 'zzz', [])) == "Unknown method 'zzz'. Known: (none)."


def test_one_of():
  assert errors.one_of('method', 'losa', iter(['losa', 'full'])) == 'losa'
  with pytest.raises(errors.UserError, match='losa, lora'[:4]):
    errors.one_of('method', 'lora', iter(['losa', 'full']))
