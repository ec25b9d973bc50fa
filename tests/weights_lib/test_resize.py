"""Resampled position embeddings against public code (golden/make_resize.py) and by their laws."""

import pathlib

import ml_dtypes
import numpy as np
import pytest

from losa_scenic.common_lib import errors
from losa_scenic.weights_lib import resize

GOLDEN = np.load(pathlib.Path(__file__).parent.parent / 'golden' / 'resize.npz')
SIDES = [(1, 1), (1, 5), (5, 1), (4, 7), (7, 4), (8, 26), (14, 16), (16, 30), (37, 16)]


def grid(name):
  return tuple(int(side) for side in name.split('x'))


def random(*shape, dtype=np.float32):
  return np.random.default_rng(0).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize('method', resize.METHODS)
def test_position_embeddings_equal_the_published_code(method):
  cases = [name.split('/')[1:] for name in GOLDEN if name.startswith(f'{method}/')]
  assert len(cases) == 9
  for old, new in cases:
    table = GOLDEN[f'table/{old}']
    have = resize.position_embedding(table, grid(old), grid(new), 1, method)
    want = GOLDEN[f'{method}/{old}/{new}']
    np.testing.assert_allclose(have, want, atol=1e-5, err_msg=f'{method} {old} {new}')


def test_every_method_has_its_own_values():
  same = resize.position_embedding(random(49, 2), (7, 7), (7, 4), 0, 'bicubic')
  for method in set(resize.METHODS) - {'bicubic'}:
    other = resize.position_embedding(random(49, 2), (7, 7), (7, 4), 0, method)
    assert np.abs(other - same).max() > 1e-2, method


def test_relative_biases_equal_timm():
  cases = [
    name.split('/')[1:] for name in GOLDEN if name.startswith('bias/') and name.count('/') > 1
  ]
  assert len(cases) == 7
  for old, new in cases:
    have = resize.relative_bias(GOLDEN[f'bias/{old}'], grid(old), grid(new))
    np.testing.assert_allclose(have, GOLDEN[f'bias/{old}/{new}'], atol=1e-5, err_msg=f'{old} {new}')


@pytest.mark.parametrize('method', resize.METHODS)
@pytest.mark.parametrize(('old', 'new'), SIDES)
def test_rows_of_a_resize_matrix_sum_to_one(method, old, new):
  matrix = resize.METHODS[method](old, new)
  assert matrix.shape == (new, old)
  np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-12)
  if method != 'bicubic_offset':  # Which is for a slightly larger grid, off to one side.
    if (method, new) != ('zoom_linear', 1):  # One row left is the first one, as in scipy.
      np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-12)
    np.testing.assert_allclose(resize.METHODS[method](old, old), np.eye(old), atol=1e-12)


@pytest.mark.parametrize('method', resize.METHODS)
@pytest.mark.parametrize('new', [(3, 3), (4, 7), (9, 2), (11, 12)])
def test_constant_tables_stay_constant_and_the_prefix_stays_itself(method, new):
  table = np.concatenate([random(1, 3, 4), np.full((1, 20, 4), 0.7, np.float32)], axis=1)
  have = resize.position_embedding(table, (4, 5), new, 3, method)
  assert have.shape == (1, 3 + new[0] * new[1], 4)
  np.testing.assert_array_equal(have[:, :3], table[:, :3])
  np.testing.assert_allclose(have[:, 3:], 0.7, rtol=1e-6)


@pytest.mark.parametrize('new', [(1, 1), (3, 3), (4, 7), (9, 9)])
def test_constant_biases_stay_constant_and_the_class_tokens_rows_stay_themselves(new):
  table = np.concatenate([np.full((7 * 9, 2), 0.7, np.float32), random(3, 2)])
  have = resize.relative_bias(table, (4, 5), new)
  np.testing.assert_array_equal(have[-3:], table[-3:])
  np.testing.assert_allclose(have[:-3], 0.7, rtol=1e-6)
  assert len(have) == (2 * new[0] - 1) * (2 * new[1] - 1) + 3
  without = resize.relative_bias(table[:-3], (4, 5), new)
  np.testing.assert_array_equal(without, have[:-3])


def test_the_bias_of_no_offset_stays_in_the_middle():
  table = random(7 * 7, 2)
  have = resize.relative_bias(table, (4, 4), (6, 9))
  np.testing.assert_allclose(have[len(have) // 2], table[24], rtol=1e-6)


@pytest.mark.parametrize('method', resize.METHODS)
def test_resizing_is_linear_in_the_table(method):
  a, b = np.split(random(2, 21, 4, dtype=np.float64), 2)
  f = lambda table: resize.position_embedding(table, (4, 5), (7, 3), 1, method)  # noqa: E731
  np.testing.assert_allclose(f(2 * a - 3 * b), 2 * f(a) - 3 * f(b), atol=1e-12)


@pytest.mark.parametrize('method', resize.METHODS)
def test_rows_and_columns_are_not_mixed_up(method):
  # A table that only knows its row must, resized, know only its row; and the same by columns.
  row = np.repeat(random(6, 2), 4, axis=0)
  have = resize.position_embedding(row, (6, 4), (3, 8), 0, method).reshape(3, 8, 2)
  np.testing.assert_allclose(have, np.repeat(have[:, :1], 8, axis=1), atol=1e-6)
  column = np.tile(random(4, 2), (6, 1))
  have = resize.position_embedding(column, (6, 4), (3, 8), 0, method).reshape(3, 8, 2)
  np.testing.assert_allclose(have, np.repeat(have[:1], 3, axis=0), atol=1e-6)


@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_dtype_and_rank_stay_and_sums_are_in_float64(dtype):
  table = random(1, 26, 3).astype(dtype)
  have = resize.position_embedding(table, (5, 5), (3, 8), 1, 'bicubic_antialias')
  assert have.shape == (1, 25, 3) and have.dtype == dtype
  exact = resize.position_embedding(
    table.astype(np.float64), (5, 5), (3, 8), 1, 'bicubic_antialias'
  )
  np.testing.assert_array_equal(have, exact.astype(dtype))
  flat = resize.position_embedding(table[0], (5, 5), (3, 8), 1, 'bicubic_antialias')
  np.testing.assert_array_equal(flat, have[0])
  assert resize.relative_bias(random(81, 3).astype(dtype), (5, 5), (3, 8)).dtype == dtype


@pytest.mark.parametrize('method', resize.METHODS)
def test_the_same_grid_returns_the_table_itself(method):
  table = random(1, 21, 4)
  assert resize.position_embedding(table, (4, 5), [4, 5], 1, method) is table


def test_the_same_grid_returns_the_biases_themselves():
  table = random(7 * 9 + 3, 4)
  assert resize.relative_bias(table, [4, 5], (4, 5)) is table


def test_bad_input_is_a_user_error():
  position, table = resize.position_embedding, random(1, 21, 4)
  with pytest.raises(errors.UserError, match=r"'bicubicc'\. Did you mean 'bicubic'"):
    position(table, (4, 5), (4, 4), 1, 'bicubicc')
  with pytest.raises(errors.UserError, match=r'2 \+ 4 x 5 tokens .*1, 22, d\], got \[1, 21, 4\]'):
    position(table, (4, 5), (4, 4), 2, 'bicubic')
  with pytest.raises(errors.UserError, match=r'got \[1, 21, 4\]'):  # Also when nothing is resized.
    position(table, (4, 6), (4, 6), 1, 'bicubic')
  with pytest.raises(errors.UserError, match=r'got \[2, 21, 4\]'):
    position(random(2, 21, 4), (4, 5), (4, 4), 1, 'bicubic')
  with pytest.raises(errors.UserError, match=r'at least 1, got \(0, 4\)'):
    position(table, (4, 5), (0, 4), 1, 'bicubic')
  with pytest.raises(errors.UserError, match=r'\[63, heads\], or \[66, heads\].* got \[64, 2\]'):
    resize.relative_bias(random(64, 2), (4, 5), (4, 4))
