"""Learning-rate schedules from `config.lr_configs`, as in Scenic: a product of named factors.

'constant*linear_warmup*cosine_decay' with base_learning_rate, warmup_steps and total_steps.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from losa_scenic.common_lib import config as config_lib
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Config

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]

DEFAULT_FACTORS = 'constant*linear_warmup*cosine_decay'
# Options that only some factors read.
_USED_BY = {
  'warmup_steps': ('linear_warmup', 'cosine_decay', 'linear_decay'),
  'warmup_alpha': ('linear_warmup',),
  'steps_per_cycle': ('cosine_decay',),
  'alpha': ('cosine_decay',),
  'end_learning_rate': ('linear_decay',),
  'decay_events': ('piecewise_constant',),
  'decay_factors': ('piecewise_constant',),
}
FACTORS = ('constant', 'linear_warmup', 'cosine_decay', 'linear_decay', 'piecewise_constant')


def compound(
  *,
  base_learning_rate: float,
  total_steps: int,
  factors: str = DEFAULT_FACTORS,
  warmup_steps: int = 0,
  warmup_alpha: float = 0.0,
  steps_per_cycle: int | None = None,
  alpha: float = 0.0,
  end_learning_rate: float = 0.0,
  decay_events: Sequence[int] = (),
  decay_factors: Sequence[float] = (),
) -> Schedule:
  """A product of factors, each a function of the step.

  Args:
    base_learning_rate: the value of 'constant'.
    total_steps: the length of training in steps.
    factors: names joined by '*': 'constant'; 'linear_warmup' from `warmup_alpha` to 1 over
      `warmup_steps`; 'cosine_decay' from 1 to `alpha` between warm-up and `steps_per_cycle`
      (restarting there, as Scenic's does); 'linear_decay' from 1 to end_learning_rate /
      base_learning_rate between warm-up and `total_steps`; 'piecewise_constant', multiplied by
      `decay_factors[i]` from step `decay_events[i]` on.
    warmup_steps: steps of warm-up.
    warmup_alpha: factor at step 0 of the warm-up.
    steps_per_cycle: `total_steps` when not given.
    alpha: lowest factor of the cosine.
    end_learning_rate: learning rate at the end of 'linear_decay'.
    decay_events: increasing steps.
    decay_factors: one factor an event.

  Returns:
    step -> learning rate, a float32 scalar.

  Raises:
    errors.UserError: for an unknown factor or an impossible length.
  """
  if total_steps < 1 or warmup_steps < 0 or base_learning_rate < 0:
    raise errors.UserError(
      f'lr_configs: total_steps {total_steps}, warmup_steps {warmup_steps} and '
      f'base_learning_rate {base_learning_rate} must be positive.'
    )
  cycle = steps_per_cycle or total_steps
  if warmup_steps >= cycle:
    raise errors.UserError(f'lr_configs.warmup_steps {warmup_steps} must be below {cycle} steps.')
  if len(decay_events) != len(decay_factors):
    raise errors.UserError('lr_configs.decay_events and decay_factors differ in length.')

  def cosine(step: jax.Array) -> jax.Array:
    progress = jnp.maximum(0.0, (step - warmup_steps) / (cycle - warmup_steps)) % 1.0
    return alpha + (1 - alpha) * 0.5 * (1 + jnp.cos(jnp.pi * progress))

  def linear(step: jax.Array) -> jax.Array:
    progress = jnp.clip((step - warmup_steps) / (total_steps - warmup_steps), 0.0, 1.0)
    return 1 + progress * (end_learning_rate / max(base_learning_rate, 1e-30) - 1)

  def piecewise(step: jax.Array) -> jax.Array:
    value = jnp.float32(1.0)
    for event, factor in zip(decay_events, decay_factors, strict=True):
      value = jnp.where(step >= event, value * factor, value)
    return value

  table: dict[str, Callable[[jax.Array], jax.Array]] = {
    'constant': lambda step: jnp.float32(base_learning_rate),
    'linear_warmup': lambda step: (
      warmup_alpha + jnp.minimum(1.0, step / max(warmup_steps, 1)) * (1 - warmup_alpha)
      if warmup_steps
      else jnp.float32(1.0)
    ),
    'cosine_decay': cosine,
    'linear_decay': linear,
    'piecewise_constant': piecewise,
  }
  names = _factor_names(factors)

  def schedule(step: jax.typing.ArrayLike) -> jax.Array:
    step, value = jnp.asarray(step, jnp.float32), jnp.float32(1.0)
    for name in names:
      value = value * table[name](step)
    return jnp.asarray(value, jnp.float32)

  return schedule


SCHEDULES = {'compound': compound}


def _factor_names(factors: str) -> list[str]:
  return [
    errors.one_of('learning rate factor', name.strip(), FACTORS) for name in factors.split('*')
  ]


def check(block: Mapping[str, Any]) -> None:
  """Raises `UserError` for an unknown schedule, option or factor of a `lr_configs` block."""
  block = dict(block)
  schedule = SCHEDULES[
    errors.one_of(
      'learning_rate_schedule', block.pop('learning_rate_schedule', 'compound'), SCHEDULES
    )
  ]
  for key in block:
    errors.one_of('option of the schedule', key, config_lib.options(schedule))
  factors = _factor_names(block.get('factors', DEFAULT_FACTORS))
  for key, users in _USED_BY.items():
    if key in block and not set(users) & set(factors):
      raise errors.UserError(
        f'lr_configs.{key} would have no effect: it belongs to {" and ".join(users)}, and the '
        f"factors are '{'*'.join(factors)}'."
      )


def get_learning_rate_fn(config: Config, total_steps: int) -> Schedule:
  """The schedule that `config.lr_configs` describes.

  Args:
    config: the run's config; `lr_configs.base_learning_rate` is required.
    total_steps: used where `lr_configs.total_steps` is not given.

  Raises:
    errors.UserError: for an unknown schedule, option or factor.
  """
  block = config_lib.to_dict(config.lr_configs)
  name = errors.one_of(
    'learning_rate_schedule', block.pop('learning_rate_schedule', 'compound'), SCHEDULES
  )
  if 'base_learning_rate' not in block:
    raise errors.UserError('lr_configs.base_learning_rate is required.')
  block.setdefault('total_steps', total_steps)
  return config_lib.build(SCHEDULES[name], block=block, what=f"schedule '{name}'")
