"""Fixtures for tests of single inserts and of side networks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from losa_scenic.adapt_lib.method import Method, combine, partition
from losa_scenic.common_lib import trees
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.sites import Ctx, Op


@pytest.fixture
def call_insert(random_like) -> Callable[..., tuple[np.ndarray, dict[str, np.ndarray]]]:
  """`fn(method, where, f, x, ctx)` -> (output of the method's insert there, its parameters).

  The parameters are random, float64, by path; `change(flat)` may return others; `rngs` are handed
  to the module.
  """

  def call(
    method: Method,
    where: Any,
    f: Op,
    x: np.ndarray,
    ctx: Ctx,
    change: Callable[[dict], dict] = dict,
    rngs: Any = None,
  ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    module = method.inserts[where]()
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), f, x, ctx))['params']
    flat = change(trees.flatten(random_like(shapes, scale=0.5)))
    y = module.apply({'params': trees.unflatten(flat)}, f, x, ctx, rngs=rngs)
    return np.asarray(y), {path: np.asarray(leaf, np.float64) for path, leaf in flat.items()}

  return call


@pytest.fixture
def start_of() -> Callable[..., dict[str, np.ndarray]]:
  """`fn(method, where, f, x, ctx, seed=0)`: the parameters of an insert at the start, by path."""

  def start(
    method: Method, where: Any, f: Op, x: np.ndarray, ctx: Ctx, seed: int = 0
  ) -> dict[str, np.ndarray]:
    params = method.inserts[where]().init(jax.random.key(seed), f, x, ctx)['params']
    return {path: np.asarray(leaf) for path, leaf in trees.flatten(params).items()}

  return start


@pytest.fixture
def loss_and_gradient() -> Callable[[Adapted], tuple[Any, dict[str, Any]]]:
  """`fn(model)` -> a loss of three random inputs, and the gradient of what trains, by path."""

  def compute(model: Adapted) -> tuple[Any, dict[str, Any]]:
    inputs = jax.random.normal(jax.random.key(1), model.input_shape(3))
    params = jax.jit(model.init)(jax.random.key(0), inputs)['params']
    trained, frozen = partition(params, model.method)
    # What starts at zero gives other weights no gradient.
    trained = jax.tree.map(
      lambda x: x + 0.1 * jnp.cos(1.7 * jnp.arange(x.size)).reshape(x.shape), trained
    )

    def loss(trained: Any) -> Any:
      logits = model.apply({'params': combine(trained, frozen)}, inputs, train=True)
      return jnp.sin(logits).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(trained)
    return value, trees.flatten(gradient)

  return compute
