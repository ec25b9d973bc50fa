"""The train step and the eval step: pure functions, differentiated over the trainable tree only."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from losa_scenic.adapt_lib.method import combine
from losa_scenic.common_lib.types import Array, Batch, Metrics, Params
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.train_lib.state import TrainState

LossFn = Callable[[Array, Batch], Array]
MetricsFn = Callable[[Array, Batch], Metrics]


def train_step(
  state: TrainState,
  frozen: Params,
  batch: Batch,
  *,
  flax_model: Adapted,
  loss_fn: LossFn,
  metrics_fn: MetricsFn,
  tx: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, Any]]:
  """One step of training.

  Args:
    state: before the step.
    frozen: the parameters that never change; no gradient is ever taken with respect to them.
    batch: 'inputs' [b h w 3] or [b t h w 3], 'label', 'batch_mask'; where images are mixed also
      'partner_label' and 'label_share'.
    flax_model: the adapted model.
    loss_fn: `loss_fn(logits, batch)` -> scalar that is minimised, with the method's penalty if it
      has one.
    metrics_fn: `metrics_fn(logits, batch)` -> {name: (sum, normalizer)}.
    tx: the optimizer over the trainable tree.

  Returns:
    The state after the step, and metrics: those of `metrics_fn`, 'loss' replaced by the minimised
    one, plus the norms 'l2_grads' (before clipping), 'l2_updates' and 'l2_params'.
  """
  dropout_rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.global_step)
  batch = with_mixed_labels(batch, flax_model.num_classes)
  penalty = flax_model.method.penalty

  def loss_and_logits(trainable: Params) -> tuple[Array, tuple[Array, Any]]:
    logits, model_state = flax_model.apply(
      {'params': combine(trainable, frozen), **state.model_state},
      batch['inputs'],
      train=True,
      rngs={'dropout': dropout_rng},
      mutable=list(state.model_state),
    )
    loss = loss_fn(logits, batch)
    if penalty is not None:
      loss += penalty(trainable)
    return loss, (logits, model_state)

  (loss, (logits, model_state)), grads = jax.value_and_grad(loss_and_logits, has_aux=True)(
    state.trainable
  )
  updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
  trainable = optax.apply_updates(state.trainable, updates)
  one = jnp.ones((), jnp.float32)
  metrics = dict(metrics_fn(logits, batch))
  metrics['loss'] = (loss, one)
  metrics['l2_grads'] = (optax.tree.norm(grads), one)
  metrics['l2_updates'] = (optax.tree.norm(updates), one)
  metrics['l2_params'] = (optax.tree.norm(trainable), one)
  return state.replace(
    global_step=state.global_step + 1,
    trainable=trainable,
    opt_state=opt_state,
    model_state=model_state,
  ), metrics


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

  inputs = batch['inputs']
  if inputs.ndim == len(flax_model.spec.input_shape) + 2:

    def view(i: Array) -> Array:
      return apply(jax.lax.dynamic_index_in_dim(inputs, i, axis=1, keepdims=False))

    logits = jax.lax.map(view, jnp.arange(inputs.shape[1])).mean(0)
  else:
    logits = apply(inputs)
  return dict(metrics_fn(logits, batch)), logits.argmax(-1)
