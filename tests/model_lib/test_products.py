"""Products with the weights of linear layers, whose gradients CPUs are to be quick at."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from losa_scenic.model_lib import attention, layers, products

SIZES = st.integers(1, 6)


def draw(*shape, seed=0, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def values_and_gradients(multiply, x, w):
  return jax.value_and_grad(lambda x, w: jnp.sin(multiply(x, w)).sum(), (0, 1))(x, w)


@settings(max_examples=25, deadline=None)
@given(st.lists(SIZES, max_size=3), SIZES, SIZES)
def test_it_is_the_matrix_product(rows, d, e):
  x, w = draw(*rows, d), draw(d, e, seed=1)
  have, want = (values_and_gradients(f, x, w) for f in (products.product, jnp.matmul))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), have, want)


def test_its_gradient_has_the_dtype_of_its_factors():
  x, w = draw(5, 8, dtype=jnp.bfloat16), draw(8, 3, seed=1, dtype=jnp.bfloat16)
  y, gradients = values_and_gradients(products.product, x, w)
  assert {a.dtype for a in (y, *gradients)} == {jnp.dtype(jnp.bfloat16)}


def test_members_of_a_population_have_their_own():
  x, w = draw(3, 5, 8), draw(3, 8, 2, seed=1)
  have, want = (
    jax.vmap(jax.grad(lambda w, x, f=f: jnp.sin(f(x, w)).sum()))(w, x)
    for f in (products.product, jnp.matmul)
  )
  np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('which', [0, 1])
def test_only_what_a_gradient_needs_is_kept(which):
  if not attention.on_cpu():
    pytest.skip('on other devices XLA decides')
  x, w = draw(7, 5), draw(5, 3, seed=1)
  given = [x, w]

  def multiply(a):
    return products.product(*[a if i == which else b for i, b in enumerate(given)])

  _, pull = jax.vjp(multiply, given[which])
  assert [a.shape for a in jax.tree.leaves(pull)] == [given[1 - which].shape]


@pytest.mark.parametrize('d, e', [(64, 4), (4, 64)])
def test_on_cpus_the_narrow_factor_stands_first_in_the_gradient(d, e):
  if not attention.on_cpu():
    pytest.skip('it differs on CPUs alone')

  layer = layers.dense(e, jnp.float32, use_bias=False)

  def gradient(x, w, dy):
    def apply(w):
      return layer.apply({'params': {'kernel': w}}, jnp.tanh(x))

    return jax.vjp(apply, w)[1](jnp.tanh(dy))[0]

  text = jax.jit(gradient).lower(draw(2, 9, d), draw(d, e), draw(2, 9, e)).compile().as_text()
  assert re.search(r'f32\[4,64\]\S* (dot|fusion|custom-call)\(', text), text
  assert not re.search(r'f32\[64,4\]\S* dot\(', text), text


def test_factors_of_two_dtypes_have_gradients_of_their_own():
  x, w = draw(5, 8, dtype=jnp.bfloat16), draw(8, 3, seed=1)
  have, want = (values_and_gradients(f, x, w) for f in (products.product, jnp.matmul))
  assert [a.dtype for a in have[1]] == [x.dtype, w.dtype]
  jax.tree.map(np.testing.assert_array_equal, have, want)


def test_other_products_stay_as_they_are():
  x = draw(2, 5, 8)
  dimensions = (((0,), (0,)), ((), ()))
  np.testing.assert_allclose(
    products.dot_general(x[0], x[1], dimensions), x[0].T @ x[1], rtol=1e-5, atol=1e-5
  )
  x, w = (a.astype(jnp.bfloat16) for a in (x, draw(8, 3)))
  exact = products.dot_general(x, w, (((2,), (0,)), ((), ())), preferred_element_type=jnp.float32)
  assert exact.dtype == jnp.float32
