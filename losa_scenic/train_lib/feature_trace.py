"""Which arrays a model with a frozen encoder needs of each input: found by tracing it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from losa_scenic.adapt_lib.method import partition, split_head
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Array
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.train_lib.feature_layout import DTYPES, FEATURES, Layout, Leaf, apply, read_by


def of_model(model: Adapted, dtype: str) -> Layout:
  """What a cache keeps for a model.

  Args:
    model: an adapted model.
    dtype: one of `DTYPES`.

  Raises:
    errors.UserError: for an unknown dtype, for a method whose training changes what the encoder
      computes or which reads more than its outputs, and for scanned layers.
  """
  _check(model, dtype)
  variables = model.variable_shapes()
  inputs = jax.ShapeDtypeStruct(model.input_shape(1), jnp.float32)
  rest, _ = split_head(partition(variables['params'], model.method)[0])
  if not rest and variables.keys() == {'params'} and _same_in_training(model, variables, inputs):
    features = jax.eval_shape(lambda v, x: apply(model, v, x, method='features'), variables, inputs)
    return Layout((_leaf(FEATURES, features),), dtype)
  return of_models(model, [model], dtype)


def of_models(trunk: Adapted, models: Sequence[Adapted], dtype: str) -> Layout:
  """What a cache keeps for models that share a pass: all outputs that one of them reads.

  Args:
    trunk: runs the encoder for all of them.
    models: at least one.
    dtype: one of `DTYPES`.

  Raises:
    errors.UserError: as `of_model`.
  """
  for model in models:
    _check(model, dtype)
  inputs = jax.ShapeDtypeStruct(trunk.input_shape(1), jnp.float32)
  jaxpr, encoded = jax.make_jaxpr(
    lambda v, x: apply(trunk, v, x, method='encode'), return_shape=True
  )(trunk.variable_shapes(), inputs)
  paths, _ = jax.tree_util.tree_flatten_with_path(encoded)
  each = [_read_of(model, model.variable_shapes(), inputs, encoded) for model in models]
  read = np.any(each, axis=0)
  equal = _comparison(jaxpr.jaxpr)
  leaves, places, sources = [], [], []
  for (path, value), wanted, source in zip(paths, read, jaxpr.jaxpr.outvars, strict=True):
    if not wanted:
      places.append(None)
      continue
    same = (k for k, other in enumerate(sources) if equal(source, other))
    place = next(same, len(leaves))
    if place == len(leaves):
      leaves.append(_leaf(jax.tree_util.keystr(path, simple=True, separator='/'), value))
      sources.append(source)
    places.append(place)
  return Layout(tuple(leaves), dtype, encoded, tuple(places))


def _check(model: Adapted, dtype: str) -> None:
  errors.one_of('feature_cache.dtype', dtype, DTYPES)
  if not model.method.spares_backbone:
    raise errors.UserError(
      'feature_cache is for methods that never change what the encoder computes (memory class A), '
      f'and this one does (class {model.method.memory_class}): leave feature_cache.dir out.'
    )
  if model.scan:
    raise errors.UserError("feature_cache needs layer_loop 'unroll' ('auto' with mesh.fsdp=1).")


def _leaf(name: str, value: jax.ShapeDtypeStruct) -> Leaf:
  return Leaf(name, value.shape[1:], jnp.dtype(value.dtype).name)


def _same_in_training(model: Adapted, variables: Any, inputs: Any) -> bool:
  """Whether the features in training are those in evaluation."""

  def traced(train: bool) -> str:
    def features(variables: Any, x: Array) -> Array:
      rngs = {'dropout': jax.random.key(0)}
      return apply(model, variables, x, method='features', train=train, rngs=rngs)

    return str(jax.make_jaxpr(features)(variables, inputs))

  return traced(True) == traced(False)


def _read_of(model: Adapted, variables: Any, inputs: Any, encoded: Any) -> np.ndarray:
  """Of each leaf of `encoded` whether the model reads it; raises if it reads the inputs too."""
  count = len(jax.tree.leaves(encoded))
  state = [name for name in variables if name != 'params']
  used = np.zeros(count + 1, bool)
  for train in (False, True):

    def logits(encoded: Any, x: Array, variables: Any, train: bool = train) -> Any:
      rngs, own = {'dropout': jax.random.key(0)}, read_by(encoded, model.method)
      return apply(model, variables, x, encoded=own, train=train, rngs=rngs, mutable=state)

    jaxpr = jax.make_jaxpr(logits)(encoded, inputs, variables).jaxpr
    alive = {v for v in jaxpr.outvars if not hasattr(v, 'val')}  # Literals have a value.
    for eqn in reversed(jaxpr.eqns):
      if alive.intersection(eqn.outvars):
        alive.update(v for v in eqn.invars if not hasattr(v, 'val'))
    used |= [v in alive for v in jaxpr.invars[: count + 1]]
  if used[-1]:
    raise errors.UserError(
      'feature_cache keeps what the encoder yields, and this method also reads the images: leave '
      'feature_cache.dir out.'
    )
  return used[:-1]


def _comparison(jaxpr: Any) -> Callable[[Any, Any], bool]:
  """Whether two variables of a jaxpr are made by the same operations from the same values."""
  made = {v: (eqn, i) for eqn in jaxpr.eqns for i, v in enumerate(eqn.outvars)}

  def equal(a: Any, b: Any) -> bool:
    if a is b:
      return True
    if hasattr(a, 'val') or hasattr(b, 'val'):
      return str(a) == str(b)
    if a not in made or b not in made:
      return False
    (one, i), (two, k) = made[a], made[b]
    if i != k or one.primitive != two.primitive or len(one.invars) != len(two.invars):
      return False
    if str(one.params) != str(two.params):
      return False
    return all(map(equal, one.invars, two.invars))

  return equal
