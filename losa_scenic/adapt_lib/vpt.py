"""Prompt tuning: P learned tokens p beside the image's own, in one of three ways.

With B_l the frozen blocks and x_l [n d] the image's tokens,

  vpt_shallow         [x_L, z_L] = B_L(.. B_1([x_0, p])), z_L dropped
  vpt_deep            [x_l, _] = B_l([x_{l-1}, p_l]): prompts are replaced before every block
  prompt_accumulate   x_l = B_l([x_{l-1}, p_l]) for l <= K: nothing is removed, n + K P in the end

Shallow and deep: Jia et al. 2022, Visual Prompt Tuning, ECCV, section 3.2,
https://arxiv.org/abs/2203.12119.
Accumulating: our reading of the prompt tuning in Table 10 of Mercea et al. 2024
(https://arxiv.org/abs/2402.02887): the FLOPs printed there are those of a sequence that grows by P
tokens in each of the first K blocks, with a MAP head that pools over all of them.

Trainable parameters: P d shallow, L P d deep, K P d accumulating.

Prompts stand at the end of the sequence, not behind the class token; this changes nothing, as they
have no position embedding. A MAP head does not see the prompts of the first two; VPT has no such
head.
"""

import functools

from losa_scenic.adapt_lib import inserts, tokens
from losa_scenic.adapt_lib.method import Method
from losa_scenic.common_lib import errors
from losa_scenic.model_lib import sites
from losa_scenic.model_lib.spec import BackboneSpec


def shallow(spec: BackboneSpec, *, prompts: int = 10, dropout: float = 0.0) -> Method:
  """VPT-Shallow: prompts once, before the first block.

  Args:
    spec: the backbone.
    prompts: P, at least 1 (1 to 200 by task in the paper).
    dropout: rate on the prompts, in [0, 1).

  Raises:
    errors.UserError: for a value out of range.
  """
  return Method(
    inserts={'encoder': _prompts('vpt_shallow', spec, prompts, dropout)},
    adds_tokens=True,
    exact_at_init=False,
  )


def deep(spec: BackboneSpec, *, prompts: int = 10, dropout: float = 0.0) -> Method:
  """VPT-Deep: fresh prompts in every block.

  Args:
    spec: the backbone.
    prompts: P of every block, at least 1 (1 to 200 by task in the paper).
    dropout: rate on the prompts, in [0, 1) (0.1 in the authors' VTAB runs).

  Raises:
    errors.UserError: for a value out of range.
  """
  return Method(
    inserts={'block': _prompts('vpt_deep', spec, prompts, dropout)},
    adds_tokens=True,
    exact_at_init=False,
  )


def accumulate(
  spec: BackboneSpec,
  *,
  prompts: int = 16,
  layers: int | None = None,
  dropout: float = 0.0,
  map_sees_prompts: bool = True,
) -> Method:
  """Prompt tuning that removes nothing.

  Args:
    spec: the backbone.
    prompts: P, new tokens in each of the first blocks, at least 1 (16 in Table 7 of Mercea et al.).
    layers: K, how many blocks add prompts, 1..L (24 of 40 in that table); all when not given.
    dropout: rate on the prompts, in [0, 1).
    map_sees_prompts: whether a MAP head pools over the prompts too. Pooling by class token or mean
      never does.

  Raises:
    errors.UserError: for a value out of range.
  """
  last = spec.depth if layers is None else layers
  if not 1 <= last <= spec.depth:
    raise errors.UserError(f'prompt_accumulate layers must be in 1..{spec.depth}, got {layers}.')
  make = _prompts('prompt_accumulate', spec, prompts, dropout, stay=True)
  table: dict[str, sites.MakeInsert | sites.PerLayer] = {
    'block': sites.PerLayer(lambda i: make if i < last else None)
  }
  if not map_sees_prompts:
    table['encoder'] = tokens.Strip
  return Method(inserts=table, unrolled=True, adds_tokens=True, exact_at_init=False)


def _prompts(
  method: str, spec: BackboneSpec, count: int, dropout: float, stay: bool = False
) -> sites.MakeInsert:
  inserts.check_options(method, prompts=count, dropout=dropout)
  return functools.partial(
    tokens.Prompts, count=count, init=tokens.vpt_init(spec), dropout=dropout, stay=stay
  )
