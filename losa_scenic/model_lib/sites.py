"""Sites: the named operations of a backbone around which a method may place an insert.

An insert is a Linen module that stands *around* an operation: it is called with the operation
itself, the operation's input and a `Ctx`, and returns what shall stand in its place. LoRA is
`f(x) + x A B`, a serial adapter is `y + up(act(down(y)))` with `y = f(x)`, deep prompts are
`f(concat(p, x))[:, n:]`. The backbone only ever says `at(site, operation)(x)`.

Nesting of the sites of a layer:
  block(x)      = mlp_block(attn_block(x))
  attn_block(x) = x + attn(norm1(x))      attn(u) = out(attend(query(u), key(u), value(u)))
  mlp_block(x)  = x + mlp(norm2(x))       mlp(u)  = fc2(gelu(fc1(u)))
in a gated MLP fc2(act(gate(u)) * fc1(u)); in a block with post-norm norm1(attn(x)), norm2(mlp(x)).
LayerScale ends `attn` and `mlp`; rotary positions and norms of q and k come before `attend`.

A table of inserts maps a site to a factory of modules, one for every layer. A tuple of sites shares
one module (its parameters stand at `insert_query+key+value`); `PerLayer` makes a different module,
or none, for each layer, which only unrolled layers can have.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import flax.linen as nn

from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Array, PyTree
from losa_scenic.model_lib import quantised

# Of an array; at 'attend' of (q, k, v) or (q, k, v, mask).
Op = Callable[[Any], Array]

ModelSite = Literal[
  'patch',  # images -> patch tokens [b n_patches d]
  'encoder',  # embedded tokens [b n d] -> output of the last block [b n d]
  'norm',  # final norm, of tokens [b n d], or of pooled features [b 1 d]
  'pool',  # tokens [b n d] -> features [b d]
  'time',  # of factorised backbones: features in time [b t d] -> those of the clip [b d]
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
  'attend',  # (q, k, v[, mask]) -> context [b n d]; the mask [b|1 1 n m] is True where q sees k
  'out',
  'mlp_block',
  'norm2',
  'mlp',
  'fc1',
  'gate',  # of gated MLPs only
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
    grid: token grid (t, h, w) of the sequence that the insert sees.
    prefix: number of leading tokens that are not on the grid (class token). What an insert adds
      goes to the end of the sequence: the first prefix + t h w tokens are always the model's own.
    train: whether this is a training pass (dropout and the like).
    layer: this layer's slice of `Encoder(..., per_layer=)`, or None for "no signal".
    shared: values common to all layers, or None.
    record: `record(name, value)` hands a value of a layer to the side network.
    site: where the insert is being called.
    sequences: how many neighbours in the batch are one clip, in the order of time (factorised
      backbones; 1 otherwise).
  """

  grid: tuple[int, int, int]
  prefix: int = 0
  train: bool = False
  layer: PyTree | None = None
  shared: PyTree | None = None
  record: Callable[[str, Array], None] = _no_record
  site: str = ''
  sequences: int = 1

  def split(self, x: Array) -> tuple[Array, Array, Array]:
    """[b n d] -> prefix tokens [b p d], the grid [b t h w d], tokens added at the end [b s d].

    The grid is that of whole clips: where a clip is several sequences, its b is that much smaller
    and its t that much larger.
    """
    t, h, w = self.grid
    end = self.prefix + t * h * w
    grid = x[:, self.prefix : end].reshape(-1, self.sequences * t, h, w, x.shape[-1])
    return x[:, : self.prefix], grid, x[:, end:]


@runtime_checkable
class Insert(Protocol):
  """A module that stands around the frozen operation `f`."""

  def __call__(self, f: Op, x: Array, ctx: Ctx) -> Array: ...


MakeInsert = Callable[[], nn.Module]
Where = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class PerLayer:
  """A different insert in every layer.

  Attributes:
    make: `make(i)` -> the factory of layer i's module (0-based), or None for no insert there.
  """

  make: Callable[[int], MakeInsert | None]


# The keys are `Where`; type checkers take a mapping's key type too strictly to say so.
Inserts = Mapping[Any, MakeInsert | PerLayer]
LayerInserts = Mapping[Any, MakeInsert]


def sites_of(where: Where) -> tuple[str, ...]:
  """The sites of one entry of a table of inserts."""
  return (where,) if isinstance(where, str) else where


def name_of(where: Where) -> str:
  """What the parameters of that entry are called, without `insert_`: 'query+key+value'."""
  return '+'.join(sites_of(where))


def check(names: Iterable[Where]) -> None:
  """Raises `UserError` for a name that is no site, listing the sites."""
  for where in names:
    for name in sites_of(where):
      errors.one_of('site', name, MODEL_SITES + LAYER_SITES)
    if len({name in MODEL_SITES for name in sites_of(where)}) != 1:
      raise errors.UserError(f'{where}: sites of the model and of its layers share no insert.')


def check_layer_sites(names: tuple[str, ...]) -> None:
  """Raises `UserError` for a name that is no site of a layer: only their outputs are collected."""
  for name in names:
    errors.one_of('layer site', name, LAYER_SITES)


def split(inserts: Inserts) -> tuple[LayerInserts, Inserts]:
  """The inserts of the model's own sites, and those of every layer's sites."""
  check(inserts)
  inner = {w: make for w, make in inserts.items() if sites_of(w)[0] in LAYER_SITES}
  outer: dict[Where, MakeInsert] = {}
  for where, make in inserts.items():
    if where in inner:
      continue
    if isinstance(make, PerLayer):
      raise errors.UserError(f"Site '{name_of(where)}' is the model's: it has no layers.")
    outer[where] = make
  return outer, inner


def differ_by_layer(inserts: Inserts) -> bool:
  """Whether some layers have other inserts than the rest."""
  return any(isinstance(make, PerLayer) for make in inserts.values())


def of_layer(inserts: Inserts, i: int) -> LayerInserts:
  """What stands in layer i."""
  table: dict[Where, MakeInsert] = {}
  for where, make in inserts.items():
    if not isinstance(make, PerLayer):
      table[where] = make
    elif (of_this_layer := make.make(i)) is not None:
      table[where] = of_this_layer
  return table


def by_site(modules: Mapping[str, Insert]) -> dict[str, list[Insert]]:
  """{name of an entry: its module} -> {site: modules there, the innermost first}."""
  table: dict[str, list[Insert]] = {}
  for name, module in modules.items():
    for site in name.split('+'):
      table.setdefault(site, []).append(module)
  return table


def kernel(f: Op) -> Array:
  """The weight [d e] of the linear operation that an insert stands around.

  Raises:
    errors.UserError: if `f` is no linear layer of the backbone, for example because another insert
      stands between, or if its weight is quantised.
  """
  if isinstance(f, quantised.QuantisedDense):
    raise errors.UserError(
      'This method needs the frozen weights themselves, which are quantised '
      f"('{f.kind}'): leave backbone_quantisation out."
    )
  if not isinstance(f, nn.Dense):
    raise errors.UserError(
      'This insert needs the frozen weight itself: no other insert may stand at its site, and the '
      'site must be a linear layer.'
    )
  return f.variables['params']['kernel']


def make_at(
  modules: Mapping[str, Sequence[Insert]],
  ctx: Ctx,
  collect: tuple[str, ...] = (),
  seen: dict[str, Array] | None = None,
) -> Callable[[str, Op], Op]:
  """Returns `at(site, f)`, which is `f` itself unless someone asked for the site.

  Args:
    modules: the inserts that stand at each site, the innermost first.
    ctx: what those inserts are told.
    collect: sites whose outputs are put into `seen`.
    seen: receives {site: output}.
  """

  def at(site: str, f: Op) -> Op:
    for module in modules.get(site, ()):
      f = _around(module, f, dataclasses.replace(ctx, site=site))
    return f if site not in collect or seen is None else _noting(f, site, seen)

  return at


def _noting(f: Op, site: str, seen: dict[str, Array]) -> Op:
  def noted(x: Array) -> Array:
    seen[site] = f(x)
    return seen[site]

  return noted


def _around(module: Insert, f: Op, ctx: Ctx) -> Op:
  return lambda x: module(f, x, ctx)
