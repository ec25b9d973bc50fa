"""FacT: increments of all weight matrices, factorised together.

The weights of a block are cut into slices [d d]: one each of query, key, value and output
projection, m / d of fc1 (along its outputs) and m / d of fc2 (along its inputs). Slice j gets

  s U C_j V,  U [d r] and V [r d] the same for all slices of all blocks, V = 0 at the start

  FacT-TT (tensor train):  C_j [r r] free
  FacT-TK (Tucker):        C_j = sum_k p_jk G_k,  G [r r r] the same for all, p_j [r] free

Jie, Deng: FacT: Factor-Tuning for Lightweight Adaptation on Vision Transformer, AAAI 2023, section
3, https://arxiv.org/abs/2212.03145; initial values and the place of dropout, on x U C_j, as in
https://github.com/JieShibo/PETL-ViT.

Trainable parameters, with N = L (4 + 2 m / d): TT 2 d r + N r^2, TK 2 d r + N r + r^3.

Our reading, where d does not divide m (ViT-g: 6144 and 1408): the first floor(m / d) d hidden units
have increments, the others none. A MAP head has none.
"""

import functools

from losa_scenic.adapt_lib import inserts
from losa_scenic.adapt_lib.fact_increments import Factors, TensorTrain, Tucker
from losa_scenic.adapt_lib.method import Method
from losa_scenic.common_lib import errors
from losa_scenic.model_lib.spec import BackboneSpec

SITES = (*inserts.QKV, 'out', 'fc1', 'fc2')
TK_LAYOUTS = ('clean', 'released')


def tt(spec: BackboneSpec, *, rank: int = 16, scale: float = 1.0, dropout: float = 0.0) -> Method:
  """FacT-TT for a backbone.

  Args:
    spec: the backbone.
    rank: r, at least 1 (4, 8 or 16 by task on VTAB).
    scale: s, greater than 0 (0.01 to 100 by task on VTAB).
    dropout: rate in [0, 1) before V (0.1 in the authors' code).

  Raises:
    errors.UserError: for a value out of range, or an MLP that is narrower than the model.
  """
  _check('FacT-TT', spec, rank, scale, dropout)
  make = functools.partial(TensorTrain, scale=scale, dropout=dropout)
  shared = functools.partial(Factors, width=spec.width, rank=rank)
  return Method(inserts=dict.fromkeys(SITES, make), shared=shared)


def tk(
  spec: BackboneSpec,
  *,
  rank: int = 32,
  scale: float = 1.0,
  dropout: float = 0.0,
  tk_layout: str = 'clean',
) -> Method:
  """FacT-TK for a backbone.

  Args:
    spec: the backbone.
    rank: r, at least 1 (16 or 32 by task on VTAB).
    scale: s, greater than 0 (0.01 to 100 by task on VTAB).
    dropout: rate in [0, 1) before V (0.1 in the authors' code).
    tk_layout: which columns make up the cores of an MLP: 'clean', C_j as in the equation, or
      'released', as in the authors' code (see `Tucker`).

  Raises:
    errors.UserError: for a value out of range, or an MLP that is narrower than the model.
  """
  _check('FacT-TK', spec, rank, scale, dropout)
  errors.one_of('FacT-TK tk_layout', tk_layout, TK_LAYOUTS)
  slices = spec.depth * (4 + 2 * (spec.mlp // spec.width))
  released = tk_layout == 'released'
  make = functools.partial(Tucker, scale=scale, dropout=dropout, slices=slices, released=released)
  shared = functools.partial(Factors, width=spec.width, rank=rank, tucker=True)
  return Method(inserts=dict.fromkeys(SITES, make), shared=shared)


def _check(name: str, spec: BackboneSpec, rank: int, scale: float, dropout: float) -> None:
  inserts.check_options(name, rank=rank, scale=scale, dropout=dropout)
  if spec.mlp < spec.width:
    raise errors.UserError(
      f'{name} cuts the MLP into slices of {spec.width} units, the width; it has only {spec.mlp}.'
    )
