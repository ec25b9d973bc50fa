"""LoRA: low-rank increments of linear layers.

  y = W x + c + s B A dropout(x),  s = alpha / r

with A [d r] random and B [r e] = 0 at the start.

Hu et al.: LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, section 4,
https://arxiv.org/abs/2106.09685; A as in its release, uniform within 1 / sqrt(d).

Trainable parameters: r (d_in + d_out) for each target of each block; with `shared_down` r d +
T r d for T targets. Two public settings on ViT-B/16, r = 8, have the same 294,912: query and value,
and query, key and value with one A (NOAH, Zhang, Zhou, Liu 2022, https://arxiv.org/abs/2206.04673;
its release overwrites B = 0 with random numbers, which is not done here).

Mercea et al., CVPR 2024, Tables 7-9, https://arxiv.org/abs/2402.02887, adapt up to five targets in
all blocks and in the MAP head. Our reading of their parameter counts: 'mlp' is one linear path
d -> r -> d around the whole MLP, (L + 1) 2 d r per target. They say nothing of alpha: s = 1 here.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn

from losa_scenic.adapt_lib import inserts
from losa_scenic.adapt_lib.method import Method
from losa_scenic.common_lib import errors
from losa_scenic.model_lib import sites
from losa_scenic.model_lib.spec import BackboneSpec

TARGETS = (*inserts.LINEAR_SITES, 'mlp')


def build(
  spec: BackboneSpec,
  *,
  rank: int = 8,
  alpha: float | None = None,
  targets: str = 'query,value',
  shared_down: bool = False,
  map_head: bool = False,
  dropout: float = 0.0,
) -> Method:
  """LoRA for a backbone.

  Args:
    spec: the backbone.
    rank: r, at least 1 (8 on VTAB, 32 in the LoSA paper's large-scale tables).
    alpha: scale times rank, greater than 0; the rank itself when not given, so that s = 1.
    targets: comma list of query, key, value, out, fc1, fc2, gate (of gated MLPs), mlp; 'qkv' stands
      for the first three. 'query,value' is the original choice.
    shared_down: one A for all targets; they must be among query, key and value, which have the same
      input. In a MAP head the query's input is the probe: it keeps an A of its own.
    map_head: the same targets in the MAP head; no effect without one.
    dropout: rate in [0, 1) on the input of the increment (0.1 in NOAH), drawn for each target.

  Raises:
    errors.UserError: for a value out of range, or a target that cannot share A or that the MAP head
      does not have.
  """
  chosen = inserts.targets('LoRA', targets, TARGETS)
  inserts.check_options('LoRA', rank=rank, dropout=dropout)
  scale = inserts.low_rank_scale('LoRA', rank, alpha)
  others = [name for name in chosen if name not in inserts.QKV]
  if shared_down and others:
    raise errors.UserError(
      f"LoRA shared_down needs targets among query, key and value; given: '{targets}'."
    )
  make = functools.partial(inserts.LowRank, rank=rank, scale=scale, dropout=dropout)
  table = _entries(chosen, make, shared_down)
  if map_head and spec.pool == 'map':
    pooling = [f'pool_{name}' for name in chosen]
    missing = sorted(set(pooling) - set(sites.MAP_HEAD_SITES))
    if missing:
      raise errors.UserError(
        f'LoRA map_head has no targets fc1, fc2 and gate, only mlp; given: {targets}.'
      )
    table |= _entries([name for name in pooling if name == 'pool_query'], make, shared_down)
    table |= _entries([name for name in pooling if name != 'pool_query'], make, shared_down)
  return Method(inserts=table)


def _entries(
  names: Sequence[str], make: Callable[..., nn.Module], shared_down: bool
) -> dict[Any, sites.MakeInsert]:
  if shared_down and len(names) > 1:
    return {tuple(names): functools.partial(make, shared_down=True)}
  return dict.fromkeys(names, make)
