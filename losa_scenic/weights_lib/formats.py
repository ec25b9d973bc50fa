"""What libraries' own models can hold, and what they call it: one `Format` a kind of model.

`families` lists every name under which checkpoints have a parameter; a format picks those that a
library's current code loads.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from losa_scenic.model_lib.spec import BackboneSpec
from losa_scenic.weights_lib import mapping
from losa_scenic.weights_lib.family import Family
from losa_scenic.weights_lib.spelling import Place, Spelling, layer_of

Names = Mapping[str, str | None]
ANY = None  # Any value.
# What every library's ViT holds; formats list what they hold beyond.
_PLAIN: dict[str, tuple[Any, ...] | None] = {
  'frames': (0,),
  'class_token': (True,),
  'registers': (0,),
  'gated': (False,),
  'norm': ('layer',),
  'block_norm': ('pre',),
  'final_norm': ('tokens',),
  'patch_norm': (False,),
  'pre_norm': (False,),
  'attn_norm': (False,),
  'mlp_norm': (False,),
  'qk_norm': ('none',),
  'layer_scale': (False,),
  'patch_bias': (True,),
  'qkv_bias': ('qkv', 'none'),
  'linear_bias': (True,),
  'positions': ('learned',),
  'rope': ('none',),
  'relative_positions': (False,),
}


def _first_names(spec: BackboneSpec) -> Names:
  del spec
  return {}


def _nothing(spec: BackboneSpec) -> str:
  del spec
  return ''


@dataclasses.dataclass(frozen=True)
class Format:
  """A library's model; those that there are stand in `format_tables`.

  Attributes:
    name: what a user types, or the kind within it.
    family: the table that its names are from.
    holds: field of `BackboneSpec` -> values that the model can have, beside `_PLAIN`'s.
    names: which of the table's names it uses, where that is not the first: entry of the table ->
      name, or None for an entry that it has not.
    also: a further reason why it cannot hold a spec, or ''.
    prefix: what stands before all names.
    covered: whether positions are of 'all' leading tokens or of the 'class' token alone.
    flat: leaves without the leading axes of 1 that ours have; of a patch kernel, a linear layer's.
    title: what the library calls the model.
  """

  name: str
  family: Family
  holds: Mapping[str, tuple[Any, ...] | None] = dataclasses.field(default_factory=dict)
  names: Callable[[BackboneSpec], Names] = _first_names
  also: Callable[[BackboneSpec], str] = _nothing
  prefix: str = ''
  covered: str = 'all'
  flat: tuple[str, ...] = ()
  title: str = ''

  def filled(self, spec: BackboneSpec) -> BackboneSpec:
    """The spec with those biases of queries, keys and values that the model has at least.

    A bias that a backbone lacks is one of 0.
    """
    allowed = ({**_PLAIN, **self.holds})['qkv_bias'] or ()
    need = set(spec.qkv_bias.replace('none', ''))
    fitting = [b for b in allowed if need <= set(b.replace('none', ''))]
    fitting.sort(key=lambda bias: len(bias.replace('none', '')))
    return dataclasses.replace(spec, qkv_bias=fitting[0]) if fitting else spec

  def reasons(self, spec: BackboneSpec, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Why the model cannot hold a backbone: fields, and leaves of the model and of its first layer
    that it has no name for. Empty if it can. `spec` is `filled`."""
    found = [
      f'{field}={getattr(spec, field)!r}'
      for field, values in {**_PLAIN, **self.holds}.items()
      if values is not None and getattr(spec, field) not in values
    ]
    also = self.also(spec)
    found += [also] if also else []
    entries = self._entries(spec)
    nameless = [path for path in shapes if self._name(entries, path) is None]
    return found + [path for path in nameless if not layer_of(path)[0]]

  def spelling(self, spec: BackboneSpec, shapes: Mapping[str, tuple[int, ...]]) -> Spelling:
    """The places of a backbone's parameters; there have to be no `reasons`. `spec` is `filled`."""
    entries, jax, places = self._entries(spec), self.family.jax, {}
    covered = spec.prefix if self.covered == 'all' else int(spec.class_token)
    for path, ours in shapes.items():
      name, part = mapping.split(self._name(entries, path) or '')
      places[path] = Place(name, self._shape(spec, layer_of(path)[1], ours, covered), part)
    return Spelling(places, covered, jax)

  def _entries(self, spec: BackboneSpec) -> dict[str, str | None]:
    family = self.family
    entries: dict[str, str | None] = {
      ours: names[0] for ours, names in {**family.model, **family.block}.items()
    }
    after = [name for name in family.model['norm'] if name in family.pooled_norms]
    if spec.final_norm == 'pooled':
      entries['norm'] = after[0] if after else None
    return entries | dict(self.names(spec))

  def _name(self, entries: Names, path: str) -> str | None:
    """Full name of a parameter, with its part, or None."""
    layer, own = layer_of(path)
    root = self.prefix
    start = root if layer is None else root + self.family.layer.format(i=layer)
    module, _, leaf = own.rpartition('/')
    name, part = entries.get(own), ''
    if name is None:
      name = entries.get(module)
      if name is None:
        return None
      name, bracket, part = name.partition('[')
      name, part = mapping.leaf_name(self.family, name, leaf), bracket + part
    return root + name[1:] + part if name.startswith('/') else start + name + part

  def _shape(
    self, spec: BackboneSpec, own: str, ours: tuple[int, ...], covered: int
  ) -> tuple[int, ...]:
    if own == 'pos_embedding':
      ours = (1, covered + ours[1] - spec.prefix, spec.width)
    if own in self.flat:
      return {'cls': ours[2:], 'pos_embedding': ours[1:], 'patch/proj/kernel': ours[::-1]}[own]
    if own == 'patch/proj/kernel':
      patch = (spec.patch, spec.patch)
      return (*patch, 3, spec.width) if self.family.jax else (spec.width, 3, *patch)
    if not self.family.jax:
      return ours[::-1] if own.endswith('kernel') else ours
    module, _, leaf = own.rpartition('/')
    heads = (spec.heads, spec.width // spec.heads)
    if module.rpartition('/')[2] in ('query', 'key', 'value'):
      return (spec.width, *heads) if leaf == 'kernel' else heads
    return (*heads, spec.width) if own.endswith('out/kernel') else ours
