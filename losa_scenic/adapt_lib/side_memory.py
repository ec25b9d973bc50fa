"""How much of the backbone's outputs training of a side network keeps: the option `memory` of LoSA.

fast      the outputs that are read, in the dtype of compute. Exact.
balanced  the same in 8 bits, for the gradients of down projections alone. Of images the forward
          pass and all other gradients are exact. Of clips mixers read the rounded outputs, since
          the hidden units of a mixer in time are larger than its input and are made again from it
          in the backward pass.
smallest  images: nothing; the backward pass runs the encoder once more, so that a step takes twice
          the time. Exact. Clips: as balanced, and y is kept at every few mixers only.
auto      fast, unless the outputs would take more than a tenth of the device's memory: balanced.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Float

from losa_scenic.common_lib.types import Array
from losa_scenic.model_lib import attention

_SHARE = 10

_planned: contextvars.ContextVar[tuple[int, int] | None] = contextvars.ContextVar(
  'planned_devices', default=None
)


@contextlib.contextmanager
def planned_for(size: int, devices: int) -> Iterator[None]:
  """What is traced inside the context is for devices that need not be there.

  Args:
    size: bytes of memory that a program has on each.
    devices: how many share a batch.
  """
  token = _planned.set((size, devices))
  try:
    yield
  finally:
    _planned.reset(token)


def choose(memory: str, tokens: Float[Array, 'b n d'], taps: int) -> str:
  """`memory`, or what 'auto' means for so many outputs of that shape.

  Args:
    memory: of the option.
    tokens: an output of a layer, of the images of all devices.
    taps: how many there are.
  """
  if memory != 'auto':
    return memory
  planned = _planned.get()
  if planned is None and attention.on_cpu():
    return 'fast'
  if planned is None:
    planned = (jax.devices()[0].memory_stats() or {}).get('bytes_limit', 0), jax.device_count()
  limit, devices = planned
  size = taps * tokens.size * jnp.dtype(tokens.dtype).itemsize
  return 'balanced' if limit and _SHARE * size > limit * devices else 'fast'
