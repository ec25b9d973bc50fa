"""Optimizers from `config.optimizer` and `config.optimizer_configs`."""

import re
from collections.abc import Callable

import jax
import optax

from losa_scenic.common_lib import config as config_lib
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Config, PyTree

# Leaves that are no matrices of weights. By name, not by rank: stacked layers add an axis.
_NOT_DECAYED = re.compile(r'(.*_)?bias|scale|shift|alpha|gate|lambda_.*|cls|probe|pos_embedding')


def decay_mask(params: PyTree) -> PyTree:
  """True for leaves that weight decay applies to: no biases, scales, class token or positions."""
  return jax.tree.map_with_path(
    lambda path, _: not _NOT_DECAYED.fullmatch(str(path[-1].key)), params
  )


def momentum(
  learning_rate: optax.Schedule,
  *,
  momentum: float = 0.9,
  nesterov: bool = False,
  weight_decay: float = 0.0,
) -> optax.GradientTransformation:
  """SGD with momentum; `weight_decay` is added to the gradient of decayed leaves."""
  return optax.chain(
    optax.add_decayed_weights(weight_decay, decay_mask) if weight_decay else optax.identity(),
    optax.sgd(learning_rate, momentum=momentum or None, nesterov=nesterov),
  )


def sgd(
  learning_rate: optax.Schedule, *, weight_decay: float = 0.0
) -> optax.GradientTransformation:
  """Plain SGD; `weight_decay` as in `momentum`."""
  return momentum(learning_rate, momentum=0.0, weight_decay=weight_decay)


def adamw(
  learning_rate: optax.Schedule,
  *,
  beta1: float = 0.9,
  beta2: float = 0.999,
  epsilon: float = 1e-8,
  weight_decay: float = 0.0,
) -> optax.GradientTransformation:
  """Adam with decoupled weight decay (multiplied by the learning rate) on decayed leaves."""
  return optax.adamw(
    learning_rate, b1=beta1, b2=beta2, eps=epsilon, weight_decay=weight_decay, mask=decay_mask
  )


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
  'momentum': momentum,
  'sgd': sgd,
  'adamw': adamw,
}


def get_optimizer(config: Config, learning_rate: optax.Schedule) -> optax.GradientTransformation:
  """The optimizer of a config (fields: optimizer, optimizer_configs, max_grad_norm).

  Raises:
    errors.UserError: for an unknown optimizer or option.
  """
  name = errors.one_of('optimizer', config.optimizer, OPTIMIZERS)
  tx = config_lib.build(
    OPTIMIZERS[name],
    learning_rate,
    block=config.get('optimizer_configs'),
    what=f"optimizer '{name}'",
  )
  if config.get('max_grad_norm'):
    tx = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), tx)
  return tx
