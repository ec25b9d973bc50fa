"""VeRA: low-rank increments whose matrices are random, frozen and common to all layers.

  y = f(x) + lambda_b * (((x A) * lambda_d) B)

with lambda_d [r] = d_initial and lambda_b [e] = 0 at the start, trained for each target of each
block. A [d r] and B [r e] are the first rows, or columns, of one pair that is as large as the
largest target; its entries are uniform within sqrt(6 / fan_in).

Kopiczko, Blankevoort, Asano: VeRA: Vector-based Random Matrix Adaptation, ICLR 2024, section 3,
https://arxiv.org/abs/2310.11454; details as in Hugging Face's peft, tuners/vera.

Trainable parameters: r + d_out for each target of each block.

A and B are no parameters: they are made from `seed` wherever they are used and are in no
checkpoint. The numbers are JAX's, so that lambdas trained with another framework do not fit them.
"""

import functools

import flax.linen as nn
import jax
from jaxtyping import Float

from losa_scenic.adapt_lib import inserts
from losa_scenic.adapt_lib.method import Method
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Array
from losa_scenic.model_lib import sites
from losa_scenic.model_lib.spec import BackboneSpec

TARGETS = inserts.LINEAR_SITES


def build(
  spec: BackboneSpec,
  *,
  rank: int = 256,
  targets: str = 'query,value',
  d_initial: float = 0.1,
  seed: int = 0,
) -> Method:
  """VeRA for a backbone.

  Args:
    spec: the backbone.
    rank: r, at least 1 (256: the paper's image classification and peft's default).
    targets: comma list of query, key, value, out, fc1, fc2, gate; 'qkv' stands for the first
      three. Which of the MLP's layers are among them changes the size of A and B, hence the numbers
      of all.
    d_initial: lambda_d before training, not 0: lambda_b is, and nothing would ever train.
    seed: of A and B, at least 0.

  Raises:
    errors.UserError: for a value out of range.
  """
  chosen = inserts.targets('VeRA', targets, TARGETS)
  inserts.check_options('VeRA', rank=rank)
  if d_initial == 0:
    raise errors.UserError('VeRA d_initial must not be 0: with lambda_b = 0 nothing would train.')
  if not 0 <= seed < 2**31:
    raise errors.UserError(f'VeRA seed must be in [0, 2^31), got {seed}.')
  shared = functools.partial(
    Projections,
    inputs=max(spec.width, spec.mlp if 'fc2' in chosen else 0),
    outputs=max(spec.width, spec.mlp if {'fc1', 'gate'} & set(chosen) else 0),
    rank=rank,
    seed=seed,
  )
  make = functools.partial(VeRA, d_initial=d_initial)
  return Method(inserts=dict.fromkeys(chosen, make), shared=shared)


class Projections(nn.Module):
  """A and B, without parameters.

  Attributes:
    inputs: the largest d of a target.
    outputs: the largest e of a target.
    rank: r.
    seed: of the random numbers.
  """

  inputs: int
  outputs: int
  rank: int
  seed: int = 0

  def __call__(self) -> dict[str, Float[Array, '_ _']]:
    # All that the numbers depend on is said here: checkpoints rely on them.
    with jax.threefry_partitionable(True):
      a, b = jax.random.split(jax.random.key(self.seed, impl='threefry2x32'))
      init = nn.initializers.he_uniform()
      return {'a': init(a, (self.inputs, self.rank)), 'b': init(b, (self.rank, self.outputs))}


class VeRA(nn.Module):
  """Stands around a linear layer; A and B come as `ctx.shared`.

  Attributes:
    d_initial: lambda_d before training.
  """

  d_initial: float = 0.1

  @nn.compact
  def __call__(
    self, f: sites.Op, x: Float[Array, '... d'], ctx: sites.Ctx
  ) -> Float[Array, '... e']:
    assert ctx.shared is not None
    y, dtype = f(x), x.dtype
    a = ctx.shared['a'][: x.shape[-1]].astype(dtype)
    b = ctx.shared['b'][:, : y.shape[-1]].astype(dtype)
    start = nn.initializers.constant(self.d_initial)
    lambda_d = self.param('lambda_d', start, (a.shape[1],)).astype(dtype)
    lambda_b = self.param('lambda_b', nn.initializers.zeros, (b.shape[1],)).astype(dtype)
    return y + lambda_b * (((x @ a) * lambda_d) @ b)
