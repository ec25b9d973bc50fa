"""TOAST: attention steered from the top, by a second pass with the first pass's output fed back.

With X the tokens after the final norm of a first, frozen pass, and z_{L+1} = (w * X) P for
w_n = clip(cos(X_n, xi), 0, 1), from the top to the bottom

  z_l = z_{l+1} A_l,  t_l = z_l B_l,      l = L .. 1

and the second pass adds to the values of every block l: V(x) + V(t_l), V being the block's own
frozen value projection. Its features go to the classifier.

Shi, Gai, Darrell, Wang: TOAST: Transfer Learning via Attention Steering, arXiv 2023, section 3,
https://arxiv.org/abs/2305.15542, and their code, https://github.com/bfshi/TOAST.

toast: A_l, B_l [d d] and xi [d] train, P is the identity: 2 L d^2 + d parameters.
toast_lite: LoRA of rank r on every A_l and B_l; xi and P [d d] train: 4 L d r + d^2 + d.

Deviations. The authors first tune A, B, xi and P on ImageNet-1K; there is no such checkpoint for
other backbones, so this starts without one: A_l = I and B_l = 0 (our reading), hence t_l = 0.
They add V's bias a second time with t_l; by default V(t) - V(0) is added here, so that the start is
exactly the frozen model. In toast_lite the frozen A_l = I and B_l = 0 carry the LoRA; the up factor
of B_l's starts at 0, all others do not, since with B_l = 0 they change nothing either. A random xi
from which all tokens point away selects none of them, and then nothing but the classifier trains:
with a bad seed this can happen, where a tuned xi would not.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Num

from losa_scenic.adapt_lib.method import Method, Run
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Array, PyTree
from losa_scenic.model_lib import sites
from losa_scenic.model_lib.products import product
from losa_scenic.model_lib.spec import BackboneSpec

INITS = ('zero', 'released')
_SMALL = nn.initializers.normal(0.02)


def toast(spec: BackboneSpec, *, init: str = 'zero', value_bias: bool = False) -> Method:
  """TOAST for a backbone.

  Args:
    spec: the backbone.
    init: 'zero' (A the identity, B zero) or 'released' (both normal with deviation 0.02, as before
      the authors' tuning on ImageNet).
    value_bias: whether the fed-back value has the bias of the value projection, as released.

  Raises:
    errors.UserError: for an unknown initialisation.
  """
  errors.one_of('TOAST init', init, INITS)
  return _method(spec, value_bias, exact=init == 'zero', init=init)


def toast_lite(spec: BackboneSpec, *, rank: int = 4, value_bias: bool = False) -> Method:
  """TOAST-Lite for a backbone.

  Args:
    spec: the backbone.
    rank: r of the LoRA on every A_l and B_l, at least 1.
    value_bias: whether the fed-back value has the bias of the value projection, as released.

  Raises:
    errors.UserError: for a rank below 1.
  """
  if rank < 1:
    raise errors.UserError(f'TOAST-Lite rank must be at least 1, got {rank}.')
  return _method(spec, value_bias, exact=True, rank=rank)


def _method(spec: BackboneSpec, value_bias: bool, exact: bool, **fields: PyTree) -> Method:
  if spec.factorised:
    raise errors.UserError('TOAST feeds back one sequence of tokens: no factorised backbone.')
  return Method(
    inserts={'value': functools.partial(Feedback, value_bias)},
    side=functools.partial(Steering, spec.depth, **fields),
    exact_at_init=exact and not value_bias,
  )


class Feedback(nn.Module):
  """V(x) + V(t), or V(x) + V(t) - V(0), with t what is fed back to this layer; V(x) without it.

  Attributes:
    value_bias: whether V(t) keeps its bias.
  """

  value_bias: bool = False

  def __call__(self, f: sites.Op, x: Array, ctx: sites.Ctx) -> Array:
    y = f(x)
    if ctx.layer is None:
      return y
    fed_back = f(ctx.layer)
    return y + (fed_back if self.value_bias else fed_back - f(jnp.zeros_like(x[:1, :1])))


class Steering(nn.Module):
  """The two passes, and the decoder between them.

  Attributes:
    depth: L.
    init: of A and B; see `toast`. Without a rank only.
    rank: of toast_lite, or 0 for toast.
  """

  depth: int
  init: str = 'zero'
  rank: int = 0

  @nn.compact
  def __call__(
    self, run: Run, inputs: Num[Array, 'b *thw c'] | None, *, train: bool
  ) -> Float[Array, 'b ...']:
    tokens = run.normed(run.encode(inputs, train=train).tokens, train=train)
    fed_back = self._decode(self._select(jax.lax.stop_gradient(tokens)))
    encoded = run.encode(inputs, per_layer=fed_back, train=train)
    return run.features(encoded.tokens, train=train)

  def _select(self, x: Float[Array, 'b n d']) -> Float[Array, 'b n d']:
    """(w * X) P."""
    d = x.shape[-1]
    xi = self.param('xi', nn.initializers.normal(1.0), (d,))
    unit, exact = xi / jnp.linalg.norm(xi), x.astype(jnp.float32)
    cosine = (exact @ unit) / jnp.maximum(jnp.linalg.norm(exact, axis=-1), 1e-12)
    z = jnp.clip(cosine, 0, 1).astype(x.dtype)[..., None] * x
    return z @ self.param('p_kernel', _identity, (d, d)).astype(x.dtype) if self.rank else z

  def _decode(self, z: Float[Array, 'b n d']) -> Float[Array, 'l b n d']:
    """What each block is fed, the first block's first."""
    a, b = self._multiply('a', z.shape[-1]), self._multiply('b', z.shape[-1])
    fed_back = []
    for i in reversed(range(self.depth)):
      z = a(z, i)
      fed_back.append(b(z, i))
    return jnp.stack(fed_back[::-1])

  def _multiply(self, name: str, d: int):
    """`fn(z, i)`: z A_i or z B_i."""
    zero, shape = nn.initializers.zeros, (self.depth, d)
    if not self.rank:
      init = _SMALL if self.init == 'released' else {'a': _identity, 'b': zero}[name]
      kernel = self.param(f'{name}_kernel', init, (*shape, d))
      return lambda z, i: product(z, kernel[i].astype(z.dtype))
    down_init = nn.initializers.he_uniform(batch_axis=0)
    down = self.param(f'{name}_down_kernel', down_init, (*shape, self.rank))
    up_init = {'a': _SMALL, 'b': zero}[name]
    up = self.param(f'{name}_up_kernel', up_init, (self.depth, self.rank, d))

    def multiply(z: Array, i: int) -> Array:
      y = product(product(z, down[i].astype(z.dtype)), up[i].astype(z.dtype))
      return z + y if name == 'a' else y

    return multiply


def _identity(key: Array, shape: tuple[int, ...]) -> Array:
  del key
  return jnp.broadcast_to(jnp.eye(shape[-1]), shape)
