"""The state of a run: everything that changes from step to step, and nothing frozen."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from losa_scenic.common_lib.types import Array


@flax.struct.dataclass
class TrainState:
  """What a checkpoint holds.

  Attributes:
    global_step: steps done, int32 scalar; also the position in the data.
    trainable: the trainable parameters, float32.
    opt_state: the optimizer's state over exactly those.
    model_state: variables that are no parameters (running means), or {}.
    rng: key data of the run's random stream, uint32 [2]; step i uses `fold_in(rng, i)`.
    bad_steps: how many of the last steps in a row had a loss or gradient that was not finite, int32
      scalar. Such a step moves `global_step` and nothing else.
  """

  global_step: Array
  trainable: Any
  opt_state: Any
  model_state: Any
  rng: Array
  bad_steps: Array

  @classmethod
  def create(
    cls,
    trainable: Any,
    tx: optax.GradientTransformation,
    rng: Array,
    model_state: Any = None,
  ) -> 'TrainState':
    """The state before the first step."""
    step, data = jnp.zeros((), jnp.int32), jax.random.key_data(rng)
    return cls(step, trainable, tx.init(trainable), model_state or {}, data, jnp.zeros_like(step))
