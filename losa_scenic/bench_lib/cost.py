"""What a step costs, read off the compiled program: nothing is run and no array is allocated.

Operations are counted by XLA, in programs with unrolled layers: it counts the body of a scan once,
however often that runs. Residuals are the arrays that a forward pass keeps for the backward pass.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from losa_scenic.adapt_lib.method import combine, partition
from losa_scenic.common_lib.types import Array, Params
from losa_scenic.model_lib import attention
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.classification_model import classification_metrics
from losa_scenic.model_lib.encoder import Encoded, read_layers
from losa_scenic.model_lib.vit import ViT
from losa_scenic.train_lib import steps
from losa_scenic.train_lib.state import TrainState

# What `residuals` lists: (shape, dtype name).
Residual = tuple[tuple[int, ...], str]


def flops(fn: Callable[..., Any], *shapes: Any) -> float:
  """Floating-point operations of one call, as XLA counts them in the compiled program.

  Args:
    fn: a function of arrays, without loops in it.
    *shapes: its arguments as `jax.ShapeDtypeStruct`s.
  """
  with attention.using('plain'):  # The others loop or hide their products.
    # A new function, since jit would reuse what `fn` was traced with.
    lowered = jax.jit(lambda *args: fn(*args)).lower(*shapes)
  analysis: Any = lowered.compile().cost_analysis()
  return float(analysis['flops'])


def forward_flops(model: Adapted, batch_size: int) -> float:
  """Operations of the plain frozen backbone, images -> features."""
  plain = ViT(model.spec, {}, dtype=model.dtype)
  inputs = _inputs(model, batch_size)
  variables = jax.eval_shape(plain.init, jax.random.key(0), inputs)
  return flops(plain.apply, variables, inputs)


def adapted_forward_flops(model: Adapted, batch_size: int) -> float:
  """Operations of the adapted model, images -> logits."""
  model = model.clone(scan=False)
  variables = {'params': model.param_shapes(), **model.init_model_state()}
  return flops(model.apply, variables, _inputs(model, batch_size))


def side_forward_flops(model: Adapted, batch_size: int) -> float:
  """Operations that inserts, side network and classifier add to the plain forward pass."""
  return adapted_forward_flops(model, batch_size) - forward_flops(model, batch_size)


def pool_flops(model: Adapted, batch_size: int) -> float:
  """Operations of the backbone's final norm and pooling, which a side network stands before."""
  plain = ViT(model.spec, {}, dtype=model.dtype)
  variables = jax.eval_shape(plain.init, jax.random.key(0), _inputs(model, 1))
  shape = (batch_size, model.spec.tokens, model.spec.width)
  tokens = jax.ShapeDtypeStruct(shape, model.dtype)
  return flops(functools.partial(plain.apply, method=ViT.features), variables, tokens)


def step_flops(model: Adapted, batch_size: int) -> float:
  """Operations of the real train step with AdamW: forward, backward, update, metrics."""
  model, tx = model.clone(scan=False), optax.adamw(1e-3)
  trainable, frozen = partition(model.param_shapes(), model.method)
  key, model_state = jax.random.key(0), model.init_model_state()
  state = jax.eval_shape(lambda t: TrainState.create(t, tx, key, model_state), trainable)
  step = functools.partial(
    steps.train_step,
    flax_model=model,
    loss_fn=_loss,
    metrics_fn=classification_metrics,
    tx=tx,
  )
  return flops(step, state, frozen, _batch(model, batch_size))


def residuals(model: Adapted, batch_size: int) -> list[Residual]:
  """What the loss keeps for its backward pass, sorted; frozen weights that it needs included."""
  return _residuals(model, batch_size, encoded=None)


def residuals_after_encoder(model: Adapted, batch_size: int) -> list[Residual]:
  """The same when the encoder's outputs come from outside: side network, pooling and head only."""
  inputs, params = _inputs(model, batch_size), model.param_shapes()

  def encode(params: Params, inputs: Array) -> Any:
    return model.apply({'params': params}, inputs, method=lambda m, x: m.backbone.encode(x))

  return _residuals(model, batch_size, encoded=jax.eval_shape(encode, params, inputs))


def check_spares_backbone(model: Adapted, batch_size: int, slack: float = 0.02) -> dict[str, float]:
  """Makes sure that training only runs the encoder forward, by memory and by operations.

  Raises `AssertionError` as `check_residuals` and `check_operations`; returns the latter's figures.
  """
  check_residuals(model, batch_size)
  return check_operations(model, batch_size, slack)


def check_residuals(model: Adapted, batch_size: int) -> None:
  """Makes sure that no activation of the encoder is kept besides those the side network reads.

  The loss must keep no more than it keeps when the encoder's outputs are given from outside.

  Raises:
    AssertionError: with the shapes of what is kept besides.
  """
  surplus = collections.Counter(residuals(model, batch_size))
  surplus -= collections.Counter(residuals_after_encoder(model, batch_size))
  if surplus:
    raise AssertionError(f'The step keeps activations of the encoder: {dict(surplus)}.')


def check_operations(model: Adapted, batch_size: int, slack: float = 0.02) -> dict[str, float]:
  """Makes sure that a train step does not backpropagate through the encoder.

  What trains costs three times its forward pass (forward, gradients with respect to input and
  weights), and at most so do the final norm and the pooling, through which the gradient passes; the
  encoder costs its forward pass. Backpropagation through it would cost at least one more.

  Args:
    model: an adapted model.
    batch_size: images of a step.
    slack: share of the forward pass that the step may cost more (optimizer, metrics).

  Returns:
    {'forward', 'side', 'pool', 'step', 'allowed'}: operations.

  Raises:
    AssertionError: with the figures, if the step costs more than is allowed.
  """
  forward = forward_flops(model, batch_size)
  costs = {
    'forward': forward,
    'side': adapted_forward_flops(model, batch_size) - forward,
    'pool': pool_flops(model, batch_size),
    'step': step_flops(model, batch_size),
  }
  costs['allowed'] = (1 + slack) * forward + 3 * costs['side'] + 2 * costs['pool']
  if costs['step'] > costs['allowed']:
    figures = ', '.join(f'{name} {value / 1e9:.4f}' for name, value in costs.items())
    raise AssertionError(f'The step backpropagates through the encoder; GFLOP: {figures}.')
  return costs


def _inputs(model: Adapted, batch_size: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(model.input_shape(batch_size), jnp.float32)


def _batch(model: Adapted, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
  return {
    'inputs': _inputs(model, batch_size),
    'label': jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    'batch_mask': jax.ShapeDtypeStruct((batch_size,), jnp.float32),
  }


def _loss(logits: Array, batch: Any) -> Array:
  return optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']).mean()


def _residuals(model: Adapted, batch_size: int, encoded: Encoded | None) -> list[Residual]:
  trainable, frozen = partition(model.param_shapes(), model.method)
  model_state = model.init_model_state()

  def backward(trainable: Params, frozen: Params, batch: Any, encoded: Encoded | None) -> Any:
    def given(call: Callable, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
      is_encoder = isinstance(context.module, ViT) and context.method_name == 'encode'
      if not is_encoder or encoded is None:
        return call(*args, **kwargs)
      read, values = kwargs.get('read'), encoded.layers
      values = values if read is None else read_layers(values, model.spec.depth, read)
      return dataclasses.replace(encoded, layers=values)

    def loss(trainable: Params) -> Array:
      variables = {'params': combine(trainable, frozen), **model_state}
      with nn.intercept_methods(given):
        rngs = {'dropout': jax.random.key(0)}
        logits, _ = model.apply(
          variables, batch['inputs'], train=True, rngs=rngs, mutable=list(model_state)
        )
        return _loss(logits, batch)

    return jax.vjp(loss, trainable)[1]

  kept = jax.eval_shape(backward, trainable, frozen, _batch(model, batch_size), encoded)
  return sorted((leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(kept))
