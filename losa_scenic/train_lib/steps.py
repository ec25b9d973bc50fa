"""The train step and the eval step: pure functions, differentiated over the trainable tree only."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from losa_scenic.adapt_lib.method import combine
from losa_scenic.common_lib.types import Array, Batch, Metrics, Params, PyTree
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.encoder import Encoded
from losa_scenic.train_lib.state import TrainState
from losa_scenic.train_lib.stopping import ASKED

LossFn = Callable[[Array, Batch], Array]
MetricsFn = Callable[[Array, Batch], Metrics]
# Parameters of fewer values are small.
_SMALL = 8192


def train_step(
  state: TrainState,
  frozen: Params,
  batch: Batch,
  *,
  flax_model: Adapted,
  loss_fn: LossFn,
  metrics_fn: MetricsFn,
  tx: optax.GradientTransformation,
  accumulate: int = 1,
  max_bad_steps: int = 1,
  encoded: Encoded | None = None,
) -> tuple[TrainState, dict[str, Any]]:
  """One step of training.

  A step whose loss, gradient or new parameters are not finite is dropped: it moves `global_step`
  and `bad_steps` alone. After `max_bad_steps` of them in a row nothing moves any more.

  Args:
    state: before the step.
    frozen: the parameters that never change; no gradient is ever taken with respect to them.
    batch: 'inputs' [b h w 3] or [b t h w 3], 'label', 'batch_mask'; where images are mixed also
      'partner_label' and 'label_share'.
    flax_model: the adapted model.
    loss_fn: `loss_fn(logits, batch)` -> scalar that is minimised, with the method's penalty if it
      has one: a mean over the examples whose 'batch_mask' is 1.
    metrics_fn: `metrics_fn(logits, batch)` -> {name: (sum, normalizer)}.
    tx: the optimizer over the trainable tree.
    accumulate: parts of the batch whose gradients are computed one after the other and added; a
      divisor of b. Memory is that of one part; the sum is that of the whole batch.
    max_bad_steps: at least 1.
    encoded: what the encoder made of 'inputs', which is then not computed here (`accumulate` 1).

  Returns:
    The state after the step, and metrics: those of `metrics_fn`, 'loss' replaced by the minimised
    one, plus the norms 'l2_grads' (before clipping), 'l2_updates' and 'l2_params', and 'bad_steps',
    those in a row up to now.
  """
  asked = {name: value.max() for name, value in batch.items() if name == ASKED}
  batch = {name: value for name, value in batch.items() if name != ASKED}
  batch = with_mixed_labels(batch, flax_model.num_classes)
  gradient = _gradient_fn(state, frozen, flax_model, loss_fn, metrics_fn, encoded)
  if accumulate == 1:
    loss, metrics, model_state, grads = gradient(batch, state.model_state, state.global_step)
  else:
    loss, metrics, model_state, grads = _accumulated(gradient, state, batch, accumulate)
  updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
  trainable = optax.apply_updates(state.trainable, updates)
  norms = {
    'l2_grads': _norm(grads),
    'l2_updates': _norm(updates),
    'l2_params': _norm(trainable),
  }
  finite = jnp.isfinite(loss) & jnp.isfinite(norms['l2_grads']) & jnp.isfinite(norms['l2_params'])
  goes_on = state.bad_steps < max_bad_steps
  bad_steps = jnp.where(goes_on, jnp.where(finite, 0, state.bad_steps + 1), state.bad_steps)
  new = state.replace(trainable=trainable, opt_state=opt_state, model_state=model_state)
  new = jax.tree.map(lambda a, b: jnp.where(finite & goes_on, a, b), new, state)
  new = new.replace(global_step=state.global_step + goes_on.astype(jnp.int32), bad_steps=bad_steps)
  alone = {'loss': loss, **norms, 'bad_steps': bad_steps.astype(jnp.float32), **asked}
  one = jnp.ones((), jnp.float32)
  return new, {**metrics, **{name: (value, one) for name, value in alone.items()}}


def _norm(tree: PyTree) -> Array:
  """The Euclidean norm of all leaves together."""
  # Small ones in a row: a sum of each takes compilers long where there are hundreds, and GPUs a
  # launch.
  leaves = jax.tree.leaves(tree)
  small = [x.ravel() for x in leaves if x.size < _SMALL]
  large = [x for x in leaves if x.size >= _SMALL]
  return optax.tree.norm([*large, jnp.concatenate(small)] if small else large)


def _gradient_fn(
  state: TrainState,
  frozen: Params,
  flax_model: Adapted,
  loss_fn: LossFn,
  metrics_fn: MetricsFn,
  encoded: Encoded | None,
) -> Callable[..., tuple[Array, Metrics, Any, Params]]:
  """`fn(batch, model_state, stream)` -> loss, metrics, new model state and gradient.

  `stream` numbers the random stream that dropout draws from.
  """
  penalty = flax_model.method.penalty
  already: dict[str, Any] = {} if encoded is None else {'encoded': encoded}

  def gradient(batch: Batch, model_state: Any, stream: Array) -> tuple[Array, Metrics, Any, Params]:
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), stream)

    def loss_and_logits(trainable: Params) -> tuple[Array, tuple[Array, Any]]:
      logits, new_state = flax_model.apply(
        {'params': combine(trainable, frozen), **model_state},
        batch['inputs'] if encoded is None else None,
        train=True,
        **already,
        rngs={'dropout': rng},
        mutable=list(model_state),
      )
      loss = loss_fn(logits, batch)
      if penalty is not None:
        loss += penalty(trainable)
      return loss, (logits, new_state)

    (loss, (logits, new_state)), grads = jax.value_and_grad(loss_and_logits, has_aux=True)(
      state.trainable
    )
    return loss, dict(metrics_fn(logits, batch)), new_state, grads

  return gradient


def _accumulated(
  gradient: Callable[..., Any], state: TrainState, batch: Batch, parts: int
) -> tuple[Array, Metrics, Any, Params]:
  """What `gradient` gives for the whole batch, computed part by part."""

  def split(x: Array) -> Array:
    # Every `parts`-th example: so each device splits its own share, and none moves to another.
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)

  pieces = {name: split(value) for name, value in batch.items()}
  counts = pieces['batch_mask'].sum(1)
  total = counts.sum()
  weights = jnp.where(total > 0, counts / jnp.maximum(total, 1.0), 1.0 / parts)

  def part(carry: tuple[Any, Any], i: Array) -> tuple[tuple[Any, Any], Any]:
    grads, model_state = carry
    piece = jax.tree.map(lambda x: x[i], pieces)
    # With dropout the parts draw from streams of their own, which no step has.
    stream = jnp.where(i == 0, state.global_step, -(state.global_step * parts + i))
    loss, metrics, model_state, more = gradient(piece, model_state, stream)
    grads = jax.tree.map(lambda a, b: a + weights[i] * b, grads, more)
    return (grads, model_state), (weights[i] * loss, metrics)

  nothing = jax.tree.map(jnp.zeros_like, state.trainable)
  (grads, model_state), (losses, metrics) = jax.lax.scan(
    part, (nothing, state.model_state), jnp.arange(parts)
  )
  return losses.sum(), jax.tree.map(lambda x: x.sum(0), metrics), model_state, grads


def with_mixed_labels(batch: Batch, num_classes: int) -> Batch:
  """A batch whose images may be mixed in pairs, with labels to match.

  Args:
    batch: 'label' int [b]; mixed images have 'partner_label' int [b] and 'label_share' float32 [b].
    num_classes: number of classes.

  Returns:
    The batch; of mixed images 'label' holds probabilities float32 [b classes].
  """
  if 'partner_label' not in batch:
    return batch
  share = batch['label_share'][:, None]
  own, partner = (jax.nn.one_hot(batch[k], num_classes) for k in ('label', 'partner_label'))
  return {**batch, 'label': share * own + (1 - share) * partner}


def eval_step(
  state: TrainState,
  frozen: Params,
  batch: Batch,
  *,
  flax_model: Adapted,
  metrics_fn: MetricsFn,
) -> tuple[dict[str, Any], Array]:
  """Metrics of one batch (padded examples carry batch_mask 0), and the predicted classes [b].

  Where 'inputs' has several views of each clip, [b v t h w 3], the logits of a clip are the mean of
  those of its views (Arnab et al. 2021, section 4.1). One view of the batch is run at a time.
  """
  variables = {'params': combine(state.trainable, frozen), **state.model_state}

  def apply(inputs: Array) -> Array:
    logits: Any = flax_model.apply(variables, inputs, train=False)
    return logits

  logits = over_views(apply, batch['inputs'], len(flax_model.spec.input_shape))
  metrics = dict(metrics_fn(logits, batch))
  if ASKED in batch:
    metrics[ASKED] = (batch[ASKED].max(), jnp.ones((), jnp.float32))
  return metrics, logits.argmax(-1)


def over_views(apply: Callable[[Array], Any], inputs: Array, dimensions: int) -> Any:
  """`apply(inputs)`, or its mean over the views of each input, run one after the other.

  Args:
    apply: [b *thw c] -> arrays [b ...].
    inputs: [b *thw c], or with views [b v *thw c], or rows of a feature cache [b items].
    dimensions: of one input of the model.
  """
  if inputs.ndim < dimensions + 2:
    return apply(inputs)

  def view(i: Array) -> Any:
    return apply(jax.lax.dynamic_index_in_dim(inputs, i, axis=1, keepdims=False))

  return jax.tree.map(lambda x: x.mean(0), jax.lax.map(view, jnp.arange(inputs.shape[1])))
