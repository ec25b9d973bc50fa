"""Multiply-accumulates, by hand, of programs forward and backward."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from losa_scenic.adapt_lib import convolutions
from losa_scenic.model_lib import attention, macs


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_a_matrix_product_and_a_batched_one():
  assert macs.count(lambda a, b: a @ b, shape(3, 5), shape(5, 7)) == 3 * 5 * 7
  assert macs.count(lambda a, b: a @ b, shape(2, 3, 5), shape(2, 5, 7)) == 2 * 3 * 5 * 7


@pytest.mark.parametrize(('groups', 'inputs'), [(1, 6), (3, 2), (6, 1)])
def test_a_convolution_with_groups(groups, inputs):
  conv = nn.Conv(12, (3, 3), padding='SAME', feature_group_count=groups)
  variables = jax.eval_shape(conv.init, jax.random.key(0), shape(2, 8, 8, 6))
  have = macs.count(conv.apply, variables, shape(2, 8, 8, 6))
  assert have == 2 * 8 * 8 * 12 * 9 * inputs


def test_a_depthwise_convolution_and_its_gradients():
  def fn(x, kernel):
    return convolutions.depthwise(x, kernel).sum()

  shapes, once = (shape(2, 4, 5, 6, 8), shape(3, 3, 3, 8)), 2 * 4 * 5 * 6 * 8 * 27
  assert macs.count(fn, *shapes) == once
  assert macs.count(jax.grad(fn, (0, 1)), *shapes) == 3 * once


def repeated(x, w, layer):
  return jax.lax.scan(lambda x, w: (layer(x, w), None), x, w)[0]


def test_the_body_of_a_scan_counts_as_often_as_it_runs():
  fn = jax.jit(lambda x, w: repeated(x, w, jnp.matmul))
  assert macs.count(fn, shape(2, 4), shape(9, 4, 4)) == 9 * 2 * 4 * 4


def two_products(x, w):
  return jnp.tanh(x @ w) @ w.T


@pytest.mark.parametrize('layer', [two_products, jax.checkpoint(two_products)])
@pytest.mark.parametrize('scan', [False, True])
def test_a_backward_pass_counts_without_what_it_repeats(layer, scan):
  def loss(x, w):
    if scan:
      return (repeated(x, w, layer) ** 2).sum()
    for i in range(9):
      x = layer(x, w[i])
    return (x**2).sum()

  once = 9 * 2 * (2 * 4 * 5)
  assert macs.count(loss, shape(2, 4), shape(9, 4, 5)) == once
  # With respect to weights and inputs: each product has two more.
  assert macs.count(jax.grad(loss, (0, 1)), shape(2, 4), shape(9, 4, 5)) == 3 * once
  program = jax.jit(jax.value_and_grad(loss, (0, 1)))
  assert macs.count(program, shape(2, 4), shape(9, 4, 5)) == 3 * once


def test_the_turns_of_a_while_loop_are_not_known():
  def loop(body):
    return lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, body, x)

  with pytest.raises(ValueError, match='while'):
    macs.count(loop(lambda x: x @ x), shape(2, 2))
  assert macs.count(lambda x: loop(lambda x: x + 1)(x) @ x, shape(2, 2)) == 8


def test_products_that_cannot_be_seen_are_no_zero():
  mesh = jax.make_mesh((1,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  spec = jax.sharding.PartitionSpec('data')
  fn = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=spec, out_specs=spec)
  with pytest.raises(ValueError, match='shard_map'):
    macs.count(fn, shape(2, 2))


def test_counting_leaves_no_trace_behind_in_a_jitted_function():
  seen = []

  @jax.jit
  def fn(q):
    seen.append(attention._way.get())
    return attention.attention(q, q, q, heads=2)

  q = jnp.ones((1, 16, 8))
  assert macs.count(fn, q) == 2 * 16 * 16 * 8
  with attention.using('chunked'):
    fn(q)
  assert seen == ['plain', 'chunked']
