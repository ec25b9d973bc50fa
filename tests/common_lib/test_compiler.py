"""What XLA is told."""

import jax
import jax.numpy as jnp
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
  assert compiler.options(quantisation, encodes=False, scanned=True) is None


def test_scanned_layers_are_compiled_quickly_and_to_the_same_values():
  if jax.default_backend() != 'cpu':
    pytest.skip('it differs on CPUs alone')
  options = compiler.options(scanned=True)
  if options is None or options == compiler.options():
    pytest.skip('this version of XLA does not know the options')
  x = jax.random.normal(jax.random.key(0), (5, 33, 17))

  def body(y, x):
    y = jax.nn.gelu(y + x) - jax.nn.softmax(x, -1).mean()
    return y, y.sum(0)

  def run(x):
    return jax.lax.scan(body, x[0], x)

  assert compiler.options(scanned=True, dtype=jnp.bfloat16) == compiler.options()
  one, other = (jax.jit(run, compiler_options=o)(x) for o in (options, compiler.options()))
  assert jax.tree.all(jax.tree.map(lambda a, b: jnp.allclose(a, b, atol=1e-5), one, other))


def test_an_option_that_xla_does_not_know_is_left_out(monkeypatch):
  if jax.default_backend() != 'cpu':
    pytest.skip('it differs on CPUs alone')
  monkeypatch.setattr(compiler, '_OLDER_KERNELS', {'xla_cpu_of_tomorrow': True})
  assert compiler.options(scanned=True) == compiler.options()
