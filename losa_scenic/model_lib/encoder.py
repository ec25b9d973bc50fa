"""The one encoder: transformer blocks with named sites, scanned over stacked layers or unrolled.

Scanned: parameters at `layers/...` with a leading [depth] axis; compiles in constant time.
Unrolled: parameters at `layers_0/...`, `layers_1/...`; faster to run where there is no backward
pass through the blocks, and every operation is visible to XLA's cost analysis.
`stack_layers` and `unstack_layers` convert between the two.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Float

from losa_scenic.common_lib import errors, trees
from losa_scenic.common_lib.types import Array, DType, Params, PyTree
from losa_scenic.model_lib import attention, sites, streaming
from losa_scenic.model_lib.block import Layer
from losa_scenic.model_lib.spec import BackboneSpec


@flax.struct.dataclass
class Encoded:
  """What one pass through the encoder yields.

  Attributes:
    tokens: output of the last block, before the final norm, [b n d].
    embedded: input of the first block (b_0), [b n d].
    layers: collected site outputs and recorded values by name; `layers[name][i]` is layer i's,
      [b n d] each (one stacked array when scanned, a tuple when unrolled, with None for a layer
      that recorded nothing of that name).
    grid: token grid (t, h, w) of `tokens` without its first `prefix` ones.
    prefix: leading tokens that are not on the grid.
    sequences: in how many sequences, one after the other in time, the layers saw an input; each had
      its share of the leading tokens.
  """

  tokens: PyTree  # An array, or its shape under `jax.eval_shape`.
  embedded: PyTree
  layers: Mapping[str, Any]
  grid: tuple[int, int, int] = flax.struct.field(pytree_node=False)
  prefix: int = flax.struct.field(pytree_node=False)
  sequences: int = flax.struct.field(pytree_node=False, default=1)


# `read(layer, {name: collected or recorded value})` -> {name: what is wanted of it}, any tree.
Read = Callable[[int, Mapping[str, Any]], dict[str, Any]]


def read_layers(values: Mapping[str, Any], depth: int, read: Read) -> dict[str, tuple[Any, ...]]:
  """What is wanted of the values of all layers, {name: [layer]}, when all layers have run.

  Args:
    values: `Encoded.layers`.
    depth: number of layers.
    read: called for one layer after the other.
  """
  each = [
    read(i, {name: x[i] for name, x in values.items() if x[i] is not None}) for i in range(depth)
  ]
  return _by_name(each)


def _by_name(each: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
  names = dict.fromkeys(name for values in each for name in values)
  return {name: tuple(values.get(name) for values in each) for name in names}


def _in_turn(x: Array, values: Any) -> tuple[Array, Any]:
  """Makes what comes after wait until `values` are there; no gradient passes x."""
  # Without a gradient, else the barrier would give x one wherever `values` have one.
  x, values = jax.lax.optimization_barrier((jax.lax.stop_gradient(x), values))
  return jax.lax.stop_gradient(x), values


# `gather(name of the layer, its parameters)`: 'layers' when scanned, else 'layers_<i>'.
Gather = Callable[[str, Params], Params]


class Encoder(nn.Module):
  """`spec.depth` layers in a row.

  Attributes:
    spec: geometry.
    inserts: what stands at each layer site; in every layer the same, unless it is `PerLayer`.
    collect: layer sites whose outputs are returned.
    dtype: dtype of compute.
    scan: scan over stacked layers, or unroll over per-layer leaves.
    remat: recompute each layer in the backward pass instead of keeping its activations.
    gather: what the parameters of a layer pass through just before it runs, in the backward pass
      anew; for weights that are not whole on each device. None: they are.
    quantisation: what the linear layers of blocks are stored as, a key of `quantised.KINDS`; None
      for floats.
    stream: how layers run whose weights are packed in the host's memory; it is not for others.
    frozen: no gradient is wanted of anything in here, nor of the input.
  """

  spec: BackboneSpec
  inserts: sites.Inserts
  collect: tuple[str, ...] = ()
  dtype: DType = jnp.float32
  scan: bool = False
  remat: bool = False
  gather: Gather | None = None
  quantisation: str | None = None
  stream: streaming.Stream | None = None
  frozen: bool = False

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'b n d'],
    ctx: sites.Ctx,
    per_layer: PyTree | None = None,
    shared: PyTree | None = None,
    read: Read | None = None,
  ) -> tuple[Float[Array, 'b m d'], dict[str, Any]]:
    """Runs all layers.

    Args:
      x: embedded tokens.
      ctx: grid, prefix and mode.
      per_layer: optional values with a leading [depth] axis, handed to each layer's inserts.
      shared: optional values handed to every layer's inserts.
      read: what is wanted of the values of each layer. Of unrolled layers that are frozen, each is
        read before the next one runs, so that nothing else of its values stays in memory.

    Returns:
      The last layer's output (m tokens, n unless inserts add some) and {name: collected or recorded
      values, or what was read of them, indexable by layer}.

    Raises:
      errors.UserError: for a scan of layers that differ.
    """
    sites.check_layer_sites(self.collect)
    if self.scan and sites.differ_by_layer(self.inserts):
      raise errors.UserError('The layers of this method differ: they cannot be scanned.')
    body = {'dtype': self.dtype, 'quantisation': self.quantisation}
    if self.frozen and not self.is_initializing():
      found = self._one_by_one(x, ctx, per_layer, shared, read)
      if found is not None:
        return found
    if not self.scan:
      seen = []
      alike = self._traced_once(x, ctx, shared)
      for i in range(self.spec.depth):
        inserts = tuple(sites.of_layer(self.inserts, i).items())
        name, own = f'layers_{i}', jax.tree.map(lambda a, i=i: a[i], per_layer)
        if alike is not None:
          with jax.named_scope(name):
            x, values = alike(self.get_variable('params', name), x, own)
        else:
          # On CPUs side networks mix tokens quicker if tokens come first; to layers it is the same.
          body['tokens_first'] = not inserts and attention.on_cpu()
          module = self._body(name)(self.spec, inserts, self.collect, ctx, **body, name=name)
          x, values = module(x, own, shared)
        if read is not None:
          values = read(i, values)
          if self.frozen and not attention.on_cpu():
            x, values = _in_turn(x, values)
        seen.append(values)
      return x, _by_name(seen)
    scanned = nn.scan(
      self._body('layers'),
      variable_axes={'params': 0},
      split_rngs={'params': True, 'dropout': True},
      in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType] (flax's type is too narrow)
      length=self.spec.depth,
    )
    inserts = tuple(sites.of_layer(self.inserts, 0).items())
    x, stacked = scanned(self.spec, inserts, self.collect, ctx, **body, name='layers')(
      x, per_layer, shared
    )
    return x, stacked if read is None else read_layers(stacked, self.spec.depth, read)

  def _one_by_one(
    self, x: Array, ctx: sites.Ctx, per_layer: PyTree, shared: PyTree, read: Read | None
  ) -> tuple[Array, dict[str, Any]] | None:
    """Runs layers whose weights are elsewhere until their turn; None if there are none."""
    stream, gather, run = self.stream, self.gather, self._alone(ctx, shared)
    if stream is not None and self.has_variable('params', stream.layout.names[0]):
      rows = [self.get_variable('params', name) for name in stream.layout.names]
      if self.scan:
        x, stacked = stream.run(rows[0], run, x, per_layer)
        return x, stacked if read is None else read_layers(stacked, self.spec.depth, read)
      x, each = stream.run_apart(rows, run, x, per_layer, read)
      return x, _by_name(each)
    # On GPUs XLA would make the weights of all layers whole before the first one runs.
    in_turn = gather is not None or (self.quantisation is not None and not attention.on_cpu())
    if self.scan or self.inserts or not in_turn:
      return None
    parts = [self.get_variable('params', f'layers_{i}') for i in range(self.spec.depth)]

    def whole(i: int, params: Params) -> Params:
      return params if gather is None else gather(f'layers_{i}', params)

    x, each = streaming.one_by_one(parts, whole, dict, run, x, per_layer, read)
    return x, _by_name(each)

  def _traced_once(self, x: Array, ctx: sites.Ctx, shared: PyTree | None) -> Any:
    """A frozen layer as a function whose Python runs for the first layer alone, if that can be."""
    # Inline: what one layer makes is then seen to be what the next one reads.
    alike = self.frozen and not self.inserts and isinstance(x, jax.core.Tracer)
    if not alike or self.is_initializing() or self.is_mutable_collection('intermediates'):
      return None
    return jax.jit(self._alone(ctx, shared, tokens_first=attention.on_cpu()), inline=True)

  def _alone(
    self, ctx: sites.Ctx, shared: PyTree | None, tokens_first: bool = False
  ) -> streaming.Layer:
    """A layer without inserts as a function of its parameters."""
    body = {'dtype': self.dtype, 'quantisation': self.quantisation, 'tokens_first': tokens_first}
    layer: Any = Layer(self.spec, (), self.collect, ctx, **body, parent=None)

    def run(params: Any, x: Array, own: PyTree) -> tuple[Array, dict[str, Array]]:
      return layer.apply({'params': params}, x, own, shared)

    return run

  def _body(self, name: str) -> Callable[..., Layer]:
    """What makes the layer of that name."""
    gather, body = self.gather, Layer
    if self.is_initializing() or gather is None:
      policy = None
    else:
      body = nn.map_variables(
        Layer, 'params', lambda tree: {'params': gather(name, tree['params'])}
      )
      policy = None if self.remat else _is_activation
    if not (self.remat or policy):
      return body
    # prevent_cse is only needed outside a scan.
    return nn.remat(body, prevent_cse=not self.scan, policy=policy)


def _is_activation(_: Any, *inputs: Any, **__: Any) -> bool:
  """Whether the backward pass may keep the results of an operation, by what goes into it.

  Activations have axes of examples, tokens and channels. What has fewer is made of weights alone,
  and would keep every layer's gathered weights until the backward pass.
  """
  return any(len(getattr(aval, 'shape', ())) > 2 for aval in inputs)


_LAYER = re.compile(r'(^|.*/)layers_(\d+)/(.*)')


def stack_layers(params: Params) -> dict[str, Any]:
  """Unrolled tree -> scanned tree: `layers_<i>/x` become one `layers/x` with a [depth] axis."""
  flat, groups = {}, {}
  for path, leaf in trees.flatten(params).items():
    match = _LAYER.fullmatch(path)
    if match:
      groups.setdefault(f'{match[1]}layers/{match[3]}', {})[int(match[2])] = leaf
    else:
      flat[path] = leaf
  for path, leaves in groups.items():
    if sorted(leaves) != list(range(len(leaves))):
      raise ValueError(f'{path}: layers {sorted(leaves)} are not 0..{len(leaves) - 1}.')
    flat[path] = jnp.stack([leaves[i] for i in range(len(leaves))])
  return trees.unflatten(flat)


def unstack_layers(params: Params) -> dict[str, Any]:
  """Scanned tree -> unrolled tree, the inverse of `stack_layers`."""
  flat = {}
  for path, leaf in trees.flatten(params).items():
    match = re.fullmatch(r'(^|.*/)layers/(.*)', path)
    if match:
      for i in range(leaf.shape[0]):
        flat[f'{match[1]}layers_{i}/{match[2]}'] = leaf[i]
    else:
      flat[path] = leaf
  return trees.unflatten(flat)
