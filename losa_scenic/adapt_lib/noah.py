"""NOAH: prompts, LoRA and adapters, with a width for each block that a search has found.

With P_l prompts, rank r_l and adapter width h_l in block l, each of which may be 0,

  query, key, value   f(u) + u A B_f,   A [d r_l] common to the three
  mlp                 z + act(z W_d + c_d) W_u + c_u,   z the MLP's output,
                      act(t) = t sigmoid(1.702 t)
  block               P_l new prompts take the place of those of the block before; a block without
                      prompts of its own keeps the old ones in the sequence

Zhang, Zhou, Liu 2022, Neural Prompt Search, https://arxiv.org/abs/2206.04673, section 3. The search
itself: `python -m losa_scenic.noah_search`.

Trainable parameters: sum over l of P_l d + 4 d r_l + (2 d h_l + h_l + d if h_l > 0).

Deviations from https://github.com/ZhangYuanhan-AI/NOAH: LoRA and adapters start at exactly 0 (there
a later initialisation undoes it), and the prompts at the input, which the first block replaces
before anything has seen them, are left out.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from losa_scenic.adapt_lib import inserts, noah_supernet, tokens
from losa_scenic.adapt_lib.method import Method
from losa_scenic.adapt_lib.noah_architectures import ARCHITECTURES, DEPTH
from losa_scenic.common_lib import errors
from losa_scenic.model_lib import sites
from losa_scenic.model_lib.spec import BackboneSpec

_DEFAULT = '5'


def build(
  spec: BackboneSpec,
  *,
  prompts: str | None = None,
  rank: str | None = None,
  bottleneck: str | None = None,
  architecture: str | None = None,
  dropout: float = 0.0,
  supernet: bool = False,
) -> Method:
  """NOAH with given widths.

  Args:
    spec: the backbone.
    prompts: P_l, one integer for each block joined by commas, or one for all; 0 for no prompts.
      Like the next two 5, the middle of the search space, when not given.
    rank: r_l, likewise.
    bottleneck: h_l, likewise.
    architecture: a task of VTAB-1K, e.g. 'cifar': the widths that the authors found for it on
      ViT-B/16, in place of the three options above. For backbones of 12 blocks.
    dropout: rate on the prompts, on LoRA's input and inside the adapters, in [0, 1) (0.1 in the
      paper).
    supernet: all widths of the search space at once, another choice in every step of training: what
      the search trains before it compares choices.

  Raises:
    errors.UserError: for a value out of range, or options that exclude each other.
  """
  inserts.check_options('noah', dropout=dropout)
  given = {'prompts': prompts, 'rank': rank, 'bottleneck': bottleneck}
  if architecture is not None:
    errors.one_of('noah architecture', architecture, ARCHITECTURES)
    if spec.depth != DEPTH:
      raise errors.UserError(f'noah architecture needs {DEPTH} blocks, not {spec.depth}.')
  widths_given = [name for name, value in given.items() if value is not None]
  chosen = ['supernet'] * supernet + ['architecture'] * (architecture is not None) + widths_given
  if len(chosen) > 1 and chosen != widths_given:
    raise errors.UserError(f'noah {chosen[0]} and {chosen[1]} exclude each other.')
  if supernet:
    return noah_supernet.build(spec, dropout)
  if architecture is not None:
    given = dict(zip(given, ARCHITECTURES[architecture], strict=True))
  widths = {k: parse(k, _DEFAULT if v is None else v, spec.depth) for k, v in given.items()}
  return _method(widths, dropout)


def parse(name: str, text: str, depth: int) -> tuple[int, ...]:
  """'3,0,5' or '5' -> one integer for each of `depth` blocks. Raises `UserError`."""
  values = [int(v) for v in text.split(',')] if re.fullmatch(r'\d+(,\d+)*', text) else []
  if len(values) not in (1, depth):
    raise errors.UserError(
      f"noah {name} must be {depth} integers of at least 0, joined by commas, or one: got '{text}'."
    )
  return tuple(values * depth if len(values) == 1 else values)


def _method(widths: dict[str, tuple[int, ...]], dropout: float) -> Method:
  def prompt(count: int) -> nn.Module:
    return tokens.Prompts(count, noah_supernet.PROMPT_INIT, dropout, stay=True, replace=True)

  def lora(rank: int) -> nn.Module:
    return inserts.LowRank(rank, shared_down=True, dropout=dropout)

  def adapter(width: int) -> nn.Module:
    make = functools.partial(inserts.Bottleneck, width, 'quick_gelu', dropout)
    return inserts.Delta(make, place='after')

  def at(makes: Callable[[int], nn.Module], of_layer: tuple[int, ...]) -> sites.PerLayer:
    return sites.PerLayer(lambda i: functools.partial(makes, of_layer[i]) if of_layer[i] else None)

  table: dict[Any, Any] = {}
  for where, make, name in (
    ('block', prompt, 'prompts'),
    (('query', 'key', 'value'), lora, 'rank'),
    ('mlp', adapter, 'bottleneck'),
  ):
    if any(widths[name]):
      table[where] = at(make, widths[name])
  if not table:
    raise errors.UserError('noah: all widths are 0, which is linear probing.')
  if prompted := 'block' in table:
    table['encoder'] = tokens.Strip
  return Method(inserts=table, unrolled=True, adds_tokens=prompted, exact_at_init=not prompted)
