"""What an adaptation method is: data. And the split of parameters into trainable and frozen.

Shared code never asks which method is running. A method says which modules stand at which sites of
the backbone, which of the backbone's outputs a side network reads, and which of the backbone's own
parameters train; `partition` turns that into two trees, and only the first is ever differentiated,
optimised or saved.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
from jaxtyping import Float

from losa_scenic.common_lib import errors, trees
from losa_scenic.common_lib.types import Array, Params
from losa_scenic.model_lib import sites
from losa_scenic.model_lib.encoder import Encoded

BACKBONE = 'backbone'
HEAD = 'output_projection'
# Top-level subtrees that a method adds beside the backbone.
_METHOD_SUBTREES = ('side', 'shared', HEAD)


@dataclasses.dataclass(frozen=True)
class Run:
  """The (possibly inserted-into) backbone as a side network may use it.

  Attributes:
    encode: `encode(images, per_layer=None, train=False, read=None)` -> `Encoded`; images are None
      where the caller of the model has run the encoder before. For `read` see `encoder.Encoder`.
    encode_twice: `encode_twice(images, read, weights)`, where `read(i, weights[i], values)` is
      what is wanted of layer i. Nothing else is kept: the backward pass runs the encoder again, for
      the gradient of the weights.
    normed: `normed(tokens, train=False)`: final norm, [b n d] -> [b n d].
    pooled: `pooled(tokens, train=False)`: pooling of normed tokens, [b n d] -> [b d].
    tokens_read: how many leading tokens of the last block the features depend on; None for all.
    scanned: whether layers are scanned, so that what they give is stacked.
    frozen: whether no gradient is wanted of what the encoder gives.
  """

  encode: Callable[..., Encoded]
  encode_twice: Callable[..., Any]
  normed: Callable[..., Array]
  pooled: Callable[..., Array]
  tokens_read: int | None = None
  scanned: bool = False
  frozen: bool = True

  def features(self, tokens: Array, *, train: bool = False) -> Array:
    """Final norm and pooling, [b n d] -> [b d]; n may be no more than `tokens_read`."""
    return self.pooled(self.normed(tokens[:, : self.tokens_read], train=train), train=train)


@runtime_checkable
class Side(Protocol):
  """A Linen module beside the backbone that makes the features the classifier sees."""

  def __call__(self, run: Run, inputs: Array | None, *, train: bool) -> Float[Array, 'b d']: ...


def nothing(path: str) -> bool:
  """Trains no backbone parameter."""
  del path
  return False


# What training costs, by what passes through the backbone.
MEMORY_CLASSES = {
  'A': 'backbone forward only',
  'B': 'gradients in the last layers only',
  'C': 'activation gradients through the whole depth',
  'D': 'activation gradients, and gradients of backbone weights',
}


def _kernels() -> Iterator[str]:
  """Paths of the weight matrices of layers, of more than any backbone has."""
  for layer in ('layers', *(f'layers_{i}' for i in range(256))):
    for name in ('query', 'key', 'value', 'out', 'fc1', 'gate', 'fc2'):
      yield f'encoder/{layer}/block/{name}/kernel'


@dataclasses.dataclass(frozen=True)
class Method:
  """An adaptation method.

  Attributes:
    inserts: the module that stands at each site (its parameters train); see `sites`.
    shared: makes a module whose output every insert receives as `ctx.shared`, or None.
    collect: layer sites whose outputs the side network reads.
    side: makes the side network, or None.
    trains: says of each path in the backbone, e.g. 'encoder/layers/block/fc1/bias', whether it
      trains. A layer's component is 'layers' or 'layers_<i>', and unless `unrolled` the answer must
      not depend on which.
    unrolled: the method treats layers differently, so they cannot be scanned.
    first: no gradient enters the layers before this one (0-based); 0 for methods that reach down to
      the first layer, and for those that spare the whole backbone.
    adds_tokens: layers see more tokens than the model's own, so no side network can read them.
    drops_tokens: in training, layers see fewer.
    exact_at_init: whether the adapted model's features equal the frozen one's before training.
    one_device: the option that its step cannot be split over several devices with, or ''.
    files: digest of the files that options name, or ''; part of a checkpoint's identity.
    penalty: a scalar function of the trainable tree, classifier included, that training adds to the
      loss, or None. Evaluation leaves it out.
  """

  inserts: sites.Inserts = dataclasses.field(default_factory=dict)
  shared: Callable[[], nn.Module] | None = None
  collect: tuple[str, ...] = ()
  side: Callable[[], nn.Module] | None = None
  trains: Callable[[str], bool] = nothing
  unrolled: bool = False
  first: int = 0
  adds_tokens: bool = False
  drops_tokens: bool = False
  exact_at_init: bool = True
  one_device: str = ''
  files: str = ''
  penalty: Callable[[Params], Array] | None = None

  def __post_init__(self):
    sites.check(self.inserts)
    sites.check_layer_sites(self.collect)
    if sites.differ_by_layer(self.inserts) and not self.unrolled:
      raise ValueError('Inserts that differ by layer need unrolled=True.')

  def check_devices(self, devices: int) -> None:
    """Raises `UserError` if a step cannot be split over so many."""
    if self.one_device and devices > 1:
      raise errors.UserError(
        f'{self.one_device} is for one device, not {devices}: leave it out, or show JAX one '
        'alone with CUDA_VISIBLE_DEVICES=0.'
      )

  @property
  def spares_backbone(self) -> bool:
    """Whether no gradient enters the encoder: it is only ever run forward (memory class A)."""
    after_encoder = {'norm', 'pool', 'time', *sites.MAP_HEAD_SITES}
    return self.trains is nothing and all(
      after_encoder.issuperset(sites.sites_of(where)) for where in self.inserts
    )

  @property
  def trains_kernels(self) -> bool:
    """Whether weight matrices of the encoder's layers train."""
    return any(map(self.trains, _kernels()))

  @property
  def memory_class(self) -> str:
    """What training keeps of the backbone: see `MEMORY_CLASSES`."""
    if self.spares_backbone:
      return 'A'
    if self.first:
      return 'B'
    return 'D' if self.trains_kernels else 'C'


def _is_trainable(path: str, method: Method) -> bool:
  first, _, rest = path.partition('/')
  if first in _METHOD_SUBTREES:
    return True
  if any(part.startswith('insert_') for part in path.split('/')):
    return True
  return first == BACKBONE and method.trains(rest)


def partition(params: Params, method: Method) -> tuple[dict[str, Any], dict[str, Any]]:
  """Splits the parameters of an adapted model into (trainable, frozen).

  Args:
    params: nested dicts of arrays or of shapes.
    method: says what trains.

  Returns:
    Two trees that share no path and together hold every leaf of `params`.

  Raises:
    errors.UserError: if nothing would train, or if the method's rule matches no parameter.
  """
  flat = trees.flatten(params)
  chosen = {path for path in flat if _is_trainable(path, method)}
  if not chosen:
    raise errors.UserError('Nothing would train: the method selects no parameter and has no head.')
  if method.trains is not nothing and not any(
    path.startswith(f'{BACKBONE}/') and method.trains(path[len(BACKBONE) + 1 :]) for path in flat
  ):
    raise errors.UserError("The method's rule for training backbone parameters matches none.")
  trainable = {path: leaf for path, leaf in flat.items() if path in chosen}
  frozen = {path: leaf for path, leaf in flat.items() if path not in chosen}
  return trees.unflatten(trainable), trees.unflatten(frozen)


def combine(trainable: Params, frozen: Params) -> dict[str, Any]:
  """Joins what `partition` split. Raises `ValueError` if a path is in both trees."""
  left, right = trees.flatten(trainable), trees.flatten(frozen)
  both = sorted(set(left) & set(right))
  if both:
    raise ValueError(f'Both trainable and frozen: {both[:5]}.')
  return trees.unflatten(left | right)


def split_head(trainable: Params) -> tuple[dict[str, Any], dict[str, Any]]:
  """Trainable tree -> (without the classifier, the classifier)."""
  rest = {key: value for key, value in trainable.items() if key != HEAD}
  return rest, {key: value for key, value in trainable.items() if key == HEAD}
