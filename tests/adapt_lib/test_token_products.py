"""Products of tokens in both forms: as CPUs multiply them and as GPUs do."""

import contextlib

import jax
import numpy as np
import pytest

from losa_scenic.adapt_lib import tap_products, token_products
from losa_scenic.adapt_lib.group_weights import CHANNELS, TOKENS
from losa_scenic.model_lib import attention

N, B, D, R = 17, 3, 24, 5
FORMS = {'cpu': contextlib.nullcontext, 'gpu': lambda: attention.using('plain')}


@pytest.fixture
def arrays():
  rng = np.random.default_rng(0)
  return {
    'x': rng.standard_normal((N, B, D)).astype(np.float32),
    'c': rng.standard_normal((N, B, R)).astype(np.float32),
    't': rng.standard_normal((R, B, D)).astype(np.float32),
    'of_c': rng.standard_normal((D, R)).astype(np.float32),
    'of_t': rng.standard_normal((R, N)).astype(np.float32),
  }


PRODUCTS = {
  'nbd,dr->nbr': lambda a: token_products.along_channels(a['x'], a['of_c']),
  'rn,nbd->rbd': lambda a: token_products.along_tokens(a['of_t'], a['x']),
  'rbd,nbd->rn': lambda a: token_products.along_tokens_gradient(a['t'], a['x']),
  'nbd,nbr->dr': lambda a: token_products.along_channels_gradient(a['x'], a['c']),
}
NAMES = {'nbd': 'x', 'nbr': 'c', 'rbd': 't', 'dr': 'of_c', 'rn': 'of_t'}


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('sum_of', PRODUCTS)
def test_products(sum_of, form, arrays):
  operands = [arrays[NAMES[axes]].astype(np.float64) for axes in sum_of.split('->')[0].split(',')]
  with FORMS[form]():
    have = jax.jit(PRODUCTS[sum_of])(arrays)
  np.testing.assert_allclose(have, np.einsum(sum_of, *operands), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize(('axis', 'side', 'z'), [(CHANNELS, D, 'c'), (TOKENS, N, 't')])
def test_the_gradient_through_rounded_outputs_is_that_of_what_they_stand_for(
  axis, side, z, form, arrays
):
  b = np.swapaxes(arrays['x'], 0, 1)
  down = np.zeros((side, R), np.float32)

  def loss(down, b):
    tap = tap_products.read(b, down, axis, rounded=True)
    return (tap_products.product(tap, down, axis) * arrays[z]).sum()

  with FORMS[form]():
    have = jax.jit(jax.grad(loss))(down, b)
  whole, scale = tap_products.round_tokens(arrays['x'])
  stands_for = np.asarray(whole, np.float64) * np.asarray(scale)
  sum_of = 'nbd,nbr->dr' if axis == CHANNELS else 'nbd,rbd->nr'
  np.testing.assert_allclose(have, np.einsum(sum_of, stands_for, arrays[z]), rtol=1e-5, atol=2e-5)
