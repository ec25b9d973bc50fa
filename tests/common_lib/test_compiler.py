"""What XLA is told."""

import jax
import pytest

from losa_scenic.common_lib import compiler


@pytest.mark.parametrize('quantisation', [None, 'int8', 'w8a8', 'float8', 'int4'])
def test_int8_and_narrow_products_are_left_to_xlas_own_choice(quantisation):
  if jax.default_backend() != 'cpu':
    pytest.skip('it differs on CPUs alone')
  if compiler.options() is None:
    pytest.skip('this version of XLA does not know the option')
  assert (compiler.options(quantisation) is None) == (quantisation == 'w8a8')
  assert compiler.options(quantisation, encodes=False) is None
