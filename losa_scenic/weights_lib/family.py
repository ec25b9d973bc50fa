"""How a family of checkpoints is described: tables of what it calls the parameters of a ViT.

An entry says where a parameter of ours stands in a file. Its key is a module ('norm1', with leaves
kernel, scale and bias) or a single leaf ('cls', 'query/bias'); its values are names, of which the
first that the file has counts. A module's name is that of its `.weight` and `.bias` (in JAX files
`/kernel`, `/scale` and `/bias`), a leaf's name is the tensor's own. `name[i/n]` is the i-th of n
equal parts along the first axis (a fused query, key and value); a name that starts with '/' belongs
to no layer and is shared by all of them.
"""

import dataclasses
from collections.abc import Mapping

Table = Mapping[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Family:
  """A way of naming.

  Attributes:
    name: for people.
    anchor: a tensor that every file of the family has; what stands before it is the file's prefix.
    layer: prefix of a layer's names, with {i}, or without where layers are stacked on axis 0.
    model: the table of what there is once.
    block: the table of what each layer has.
    left_out: patterns of tensors that are no part of the encoder: classifier, decoder, text tower.
    pooled_norms: names of final norms that stand after the pooling.
    masked: leaf -> tensor whose presence says that the leaf does not count.
    packed: entries for a gated MLP whose `fc1` holds the gate as well.
    resize: how the family resamples position embeddings; see `resize.METHODS`.
    jax: kernels are stored [in, out], heads on an axis of their own.
  """

  name: str
  anchor: str
  layer: str
  model: Table
  block: Table
  left_out: tuple[str, ...] = ()
  pooled_norms: tuple[str, ...] = ()
  masked: Mapping[str, str] = dataclasses.field(default_factory=dict)
  packed: Table = dataclasses.field(default_factory=dict)
  jax: bool = False
  resize: str = 'bicubic'

  @property
  def stacked(self) -> bool:
    """Whether a file's tensors hold all layers."""
    return '{i}' not in self.layer


def one(**names: str) -> dict[str, tuple[str, ...]]:
  """Entries with one name each."""
  return {ours: (theirs,) for ours, theirs in names.items()}


def fused(name: str) -> dict[str, tuple[str, ...]]:
  """Entries of query, key and value in one tensor."""
  return {ours: (f'{name}[{i}/3]',) for i, ours in enumerate(('query', 'key', 'value'))}
