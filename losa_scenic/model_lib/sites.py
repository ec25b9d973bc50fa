"""Sites: the named operations of a backbone around which a method may place an insert.

An insert is a Linen module that stands *around* an operation: it is called with the operation
itself, the operation's input and a `Ctx`, and returns what shall stand in its place. LoRA is
`f(x) + x A B`, a serial adapter is `y + up(act(down(y)))` with `y = f(x)`, deep prompts are
`f(concat(p, x))[:, n:]`. The backbone only ever says `at(site, operation)(x)`.

Nesting of the sites of a layer:
  block(x)      = mlp_block(attn_block(x))
  attn_block(x) = x + attn(norm1(x))      attn uses query, key, value, out
  mlp_block(x)  = x + mlp(norm2(x))       mlp uses fc1, fc2
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal, Protocol, get_args, runtime_checkable

import flax.linen as nn

from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Array, PyTree

Op = Callable[[Array], Array]

ModelSite = Literal[
  'patch',  # images -> patch tokens [b n_patches d]
  'encoder',  # embedded tokens [b n d] -> output of the last block [b n d]
  'norm',  # final LayerNorm
  'pool',  # normalised tokens [b n d] -> features [b d]
  'pool_query',  # the linears of the MAP head, and its whole MLP
  'pool_key',
  'pool_value',
  'pool_out',
  'pool_mlp',
]
LayerSite = Literal[
  'block',
  'attn_block',
  'norm1',
  'attn',
  'query',
  'key',
  'value',
  'out',
  'mlp_block',
  'norm2',
  'mlp',
  'fc1',
  'fc2',
]
Site = ModelSite | LayerSite

MODEL_SITES: tuple[str, ...] = get_args(ModelSite)
LAYER_SITES: tuple[str, ...] = get_args(LayerSite)
MAP_HEAD_SITES = ('pool_query', 'pool_key', 'pool_value', 'pool_out', 'pool_mlp')


def _no_record(name: str, value: Array) -> None:
  raise ValueError(f"An insert outside the layers cannot record '{name}'.")


@dataclasses.dataclass(frozen=True)
class Ctx:
  """What an insert may know besides its input.

  Attributes:
    grid: token grid (t, h, w).
    prefix: number of leading tokens that are not on the grid (class token).
    train: whether this is a training pass (dropout and the like).
    layer: this layer's slice of `Encoder(..., per_layer=)`, or None for "no signal".
    shared: values common to all layers, or None.
    record: `record(name, value)` hands a value of a layer to the side network.
  """

  grid: tuple[int, int, int]
  prefix: int = 0
  train: bool = False
  layer: PyTree | None = None
  shared: PyTree | None = None
  record: Callable[[str, Array], None] = _no_record


@runtime_checkable
class Insert(Protocol):
  """A module that stands around the frozen operation `f`."""

  def __call__(self, f: Op, x: Array, ctx: Ctx) -> Array: ...


MakeInsert = Callable[[], nn.Module]
Inserts = Mapping[str, MakeInsert]


def check(names: Mapping[str, object] | tuple[str, ...]) -> None:
  """Raises `UserError` for a name that is no site, listing the sites."""
  for name in names:
    errors.one_of('site', name, MODEL_SITES + LAYER_SITES)


def check_layer_sites(names: tuple[str, ...]) -> None:
  """Raises `UserError` for a name that is no site of a layer: only their outputs are collected."""
  for name in names:
    errors.one_of('layer site', name, LAYER_SITES)


def split(inserts: Inserts) -> tuple[dict[str, MakeInsert], dict[str, MakeInsert]]:
  """The inserts of the model's own sites, and those of every layer's sites."""
  check(inserts)
  outer = {site: make for site, make in inserts.items() if site in MODEL_SITES}
  inner = {site: make for site, make in inserts.items() if site in LAYER_SITES}
  return outer, inner


def make_at(
  modules: Mapping[str, Insert],
  ctx: Ctx,
  collect: tuple[str, ...] = (),
  seen: dict[str, Array] | None = None,
) -> Callable[[str, Op], Op]:
  """Returns `at(site, f)`, which is `f` itself unless someone asked for the site.

  Args:
    modules: the insert that stands at each site, if any.
    ctx: what those inserts are told.
    collect: sites whose outputs are put into `seen`.
    seen: receives {site: output}.
  """

  def at(site: str, f: Op) -> Op:
    if site not in modules and site not in collect:
      return f

    def adapted(x: Array) -> Array:
      y = modules[site](f, x, ctx) if site in modules else f(x)
      if site in collect and seen is not None:
        seen[site] = y
      return y

    return adapted

  return at
