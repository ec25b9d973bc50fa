"""What `python -m losa_scenic.bench run` can be asked for, and the speeds that are wanted."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import jax

from losa_scenic.bench_lib import peers
from losa_scenic.bench_lib.speed_rows import DEVICES, DTYPES, Setting
from losa_scenic.common_lib import errors

# Options of the command that are meant to be used together.
PRESETS: dict[str, dict[str, Any]] = {
  'cpu': {'backbone': 'B/16', 'batch_size': 8, 'dtype': 'float32'},
  'gpu': {
    'backbone': 'g/14',
    'batch_size': 64,
    'dtype': 'bfloat16',
    # The last ones are those that are left out if the time is not enough.
    'rows': 'forward,losa64,timm_forward,peft_lora32,timm_full,losa64_fused,linear,losa64_host,'
    'losa64_balanced,losa64_smallest,losa64_int8',
    'torch_compile': 'blocks',
    'memory': True,
    'row_limit': 150,
    'time_limit': 570,
  },
}
# (preset, row, row that it is compared to, how many times as fast it is wanted to be).
WANTED = (
  ('cpu', 'losa16', 'forward', 0.97),
  ('cpu', 'losa64', 'forward', 0.93),
  ('cpu', 'losa16', 'peft_lora32', 2.7),
  ('cpu', 'losa16', 'timm_full', 3.1),
  ('cpu', 'forward', 'timm_forward', 1.0),
  ('cpu', 'forward_int8', 'forward', 1.2),
  ('cpu', 'losa16_int8', 'forward', 1.2),
  ('cpu', 'losa16_cached', 'forward', 20.0),
  ('cpu', 'losa16_cached', 'peft_lora32', 50.0),
  ('cpu', 'losa16_x8', 'forward', 1 / 1.35),
  ('gpu', 'forward', 'timm_forward', 1.0),
  ('gpu', 'losa64', 'forward', 0.86),
  ('gpu', 'losa64_fused', 'forward', 0.95),
  ('gpu', 'losa64', 'peft_lora32', 3.5),
  ('gpu', 'losa64', 'timm_full', 3.7),
  ('gpu', 'losa64_host', 'losa64', 0.9),
)
# (preset, row, images a second).
WANTED_SPEEDS = (('gpu', 'forward', 970.0),)


@dataclasses.dataclass(frozen=True)
class Request:
  """What the command is asked for; the fields are its options."""

  backbone: str = 'B/16'
  batch_size: int = 8
  dtype: str = 'float32'
  num_classes: int = 100
  rounds: int = 9
  rows: str = 'default'
  device: str = 'auto'
  torch_compile: str = 'auto'
  memory: bool = False
  row_limit: float = math.inf
  time_limit: float = math.inf

  @classmethod
  def of(cls, preset: str | None, given: Mapping[str, Any]) -> 'Request':
    """Options that are given (not None), those of a preset, and the defaults for the rest.

    Raises:
      errors.UserError: for an unknown preset or a value out of range.
    """
    chosen = PRESETS[errors.one_of('preset', preset, PRESETS)] if preset else {}
    own = {name: value for name, value in given.items() if value is not None}
    request = cls(**{**chosen, **own})
    for name in ('batch_size', 'num_classes', 'rounds'):
      errors.check_at_least(f'--{name}', getattr(request, name), 1)
    errors.one_of('dtype', request.dtype, DTYPES)
    errors.one_of('device', request.device, ('auto', *DEVICES))
    errors.one_of('torch_compile', request.torch_compile, ('auto', *peers.COMPILE))
    for name in ('row_limit', 'time_limit'):
      if not getattr(request, name) > 0:
        raise errors.UserError(f'--{name} must be above 0 s, not {getattr(request, name)}.')
    if request.row_limit < math.inf and not request.memory:
      raise errors.UserError('--row_limit is of rows in processes of their own: give --memory.')
    return request

  def is_preset(self, preset: str) -> bool:
    """Whether it measures what is wanted of a preset: same backbone, batch and dtype."""
    names = ('backbone', 'batch_size', 'dtype')
    return all(PRESETS[preset][name] == getattr(self, name) for name in names)

  def setting(self) -> Setting:
    """What all rows have in common.

    Raises:
      errors.UserError: where the device is not there, or there are several.
    """
    if self.device == 'cpu' and not jax.config.jax_platforms:
      jax.config.update('jax_platforms', 'cpu')
    # Other processes and PyTorch need memory, too.
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
    found = jax.default_backend()
    if found not in DEVICES or self.device not in ('auto', found):
      raise errors.UserError(f"JAX finds a '{found}' here, not a {self.device}.")
    if jax.device_count() > 1:
      raise errors.UserError(
        f'JAX finds {jax.device_count()} devices: say which with CUDA_VISIBLE_DEVICES=0.'
      )
    compile = {'cpu': 'off', 'gpu': 'model'}[found]
    return Setting(
      self.backbone,
      self.batch_size,
      self.num_classes,
      self.dtype,
      found,
      threads=cores(),
      torch_compile=compile if self.torch_compile == 'auto' else self.torch_compile,
    )


def cores() -> int:
  """Cores that this process may use: threads of XLA's products."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
