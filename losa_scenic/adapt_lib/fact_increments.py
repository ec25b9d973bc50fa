"""The modules of FacT: shared factors, and increments of a linear layer. See `fact`."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from losa_scenic.adapt_lib import inserts
from losa_scenic.common_lib.types import Array, PyTree
from losa_scenic.model_lib import sites
from losa_scenic.model_lib.products import product


class Factors(nn.Module):
  """What all slices share: U, V and, for FacT-TK, G.

  Attributes:
    width: d.
    rank: r.
    tucker: whether there is a G.
  """

  width: int
  rank: int
  tucker: bool = False

  @nn.compact
  def __call__(self) -> dict[str, Float[Array, '...']]:
    d, r = self.width, self.rank
    factors = {
      'u': self.param('u', inserts.LINEAR_INIT, (d, r)),
      'v': self.param('v', nn.initializers.zeros, (r, d)),
    }
    if self.tucker:
      # Xavier with PyTorch's fans of a tensor, which are r^2 both.
      factors['core'] = self.param('core', inserts.uniform(3**0.5 / r), (r, r, r))
    return factors


class TensorTrain(nn.Module):
  """FacT-TT around a linear layer; U and V come as `ctx.shared`.

  Attributes:
    scale: s.
    dropout: rate.
  """

  scale: float = 1.0
  dropout: float = 0.0

  @nn.compact
  def __call__(
    self, f: sites.Op, x: Float[Array, '... d'], ctx: sites.Ctx
  ) -> Float[Array, '... e']:
    assert ctx.shared is not None
    y, dtype = f(x), x.dtype
    u, v = (ctx.shared[name].astype(dtype) for name in 'uv')
    d, r = u.shape
    # How many slices lie side by side along the layer's inputs, and along its outputs.
    rows, columns = x.shape[-1] // d, y.shape[-1] // d
    cores = self.cores(ctx.shared, rows, columns).reshape(rows, columns, r, r).astype(dtype)
    x = x[..., : rows * d].reshape(*x.shape[:-1], rows, d)
    hidden = jnp.einsum('...ia,ijab->...jb', product(x, u), cores)
    hidden = inserts.dropout(self, self.dropout, hidden, ctx.train)
    increment = self.scale * product(hidden, v).reshape(*y.shape[:-1], columns * d)
    rest = [(0, 0)] * (y.ndim - 1) + [(0, y.shape[-1] - columns * d)]
    return y + jnp.pad(increment, rest)

  def cores(self, shared: PyTree, rows: int, columns: int) -> Float[Array, 's r r']:
    """C_j of this layer's slices."""
    r = shared['u'].shape[1]
    return self.param('cores', inserts.uniform((rows * r) ** -0.5), (rows * columns, r, r))


class Tucker(TensorTrain):
  """FacT-TK around a linear layer; U, V and G come as `ctx.shared`.

  In the released layout the S cores of fc1 or fc2, one tensor T [r r S] with T_abj = (C_j)_ab, are
  flattened to [r, r S] in row-major order and cut into S pieces [r r], whose columns belong to
  different j; those of fc2 are transposed. The parameters are the same.

  Attributes:
    slices: N, of the whole model.
    released: the layout of the authors' code.
  """

  slices: int = 1
  released: bool = False

  def cores(self, shared: PyTree, rows: int, columns: int) -> Float[Array, 's r r']:
    """C_j of this layer's slices."""
    core, s = shared['core'], rows * columns
    r = core.shape[0]
    p = self.param('p', inserts.uniform((6 / (r + self.slices)) ** 0.5), (s, r))
    tensor = jnp.einsum('abk,jk->abj', core, p)
    if not self.released:
      return jnp.moveaxis(tensor, 2, 0)
    return tensor.reshape(r, s, r).transpose((1, 2, 0) if rows > 1 else (1, 0, 2))
