"""Two or more methods at once: the union of their tables.

Where two inserts stand at one site, the method that was named first stands closest to the frozen
operation, and the next one around it: `lora+ssf` scales what LoRA has made.
"""

import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax.numpy as jnp

from losa_scenic.adapt_lib.method import Method, nothing
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Array, Params
from losa_scenic.model_lib import sites


class Chain(nn.Module):
  """Two inserts at one site: `outer` stands around `inner` stands around the operation.

  Attributes:
    inner: makes the insert that stands closest to the frozen operation.
    outer: makes the one around it.
  """

  inner: sites.MakeInsert
  outer: sites.MakeInsert

  def setup(self):
    self.first, self.second = self.inner(), self.outer()

  def __call__(self, f: sites.Op, x: Array, ctx: sites.Ctx) -> Array:
    return self.second(lambda u: self.first(f, u, ctx), x, ctx)


def union(methods: Mapping[str, Method]) -> Method:
  """The methods together.

  Args:
    methods: at least one method by name, the innermost first.

  Returns:
    A method that has the inserts of all, trains what any of them trains, has the one side network
    and the one shared module among them, and the sum of their penalties.

  Raises:
    errors.UserError: if two have a side network, or two a shared module, if one adds or drops
      tokens and another could not cope with that, or if inserts cannot stand in this order.
  """
  for what in ('side', 'shared'):
    having = [name for name, method in methods.items() if getattr(method, what)]
    if len(having) > 1:
      names = {'side': 'a side network', 'shared': 'values shared by all layers'}
      raise errors.UserError(f'{" and ".join(having)} each have {names[what]}: only one can.')
  adding = [name for name, method in methods.items() if method.adds_tokens]
  reading = [name for name, method in methods.items() if method.side]
  if len(adding) > 1:
    raise errors.UserError(f'{" and ".join(adding)} each add tokens: only one can.')
  if adding and reading and adding != reading:
    raise errors.UserError(
      f"{adding[0]} adds tokens to the layers, which {reading[0]}'s side network cannot read."
    )
  parts = list(methods.values())
  dropping = [name for name, method in methods.items() if method.drops_tokens]
  others = [n for n, m in methods.items() if n not in dropping and (m.inserts or m.side)]
  if dropping and others:
    raise errors.UserError(
      f'{dropping[0]} drops tokens in training, which {others[0]} cannot cope with: keep them all.'
    )
  _check_order(methods, adding)
  return Method(
    inserts=functools.reduce(_merge, (part.inserts for part in parts)),
    shared=next((part.shared for part in parts if part.shared), None),
    collect=tuple(dict.fromkeys(site for part in parts for site in part.collect)),
    side=next((part.side for part in parts if part.side), None),
    trains=_any([part for part in parts if part.trains is not nothing]),
    unrolled=any(part.unrolled for part in parts),
    first=min((part.first for part in parts if not part.spares_backbone), default=0),
    adds_tokens=bool(adding),
    drops_tokens=bool(dropping),
    files='+'.join(part.files for part in parts if part.files),
    exact_at_init=all(part.exact_at_init for part in parts),
    one_device=', '.join(part.one_device for part in parts if part.one_device),
    penalty=_sum([part.penalty for part in parts if part.penalty]),
  )


def _check_order(methods: Mapping[str, Method], adding: list[str]) -> None:
  """Raises `UserError` if an insert stands around one that adds tokens: it would see those too."""
  names = list(methods)
  for inner in adding:
    for outer in names[names.index(inner) + 1 :]:
      both = _sites(methods[inner]) & _sites(methods[outer]) & {'encoder', 'block'}
      if both:
        raise errors.UserError(
          f"{outer} would see {inner}'s added tokens at {sorted(both)}: write '{outer}+{inner}'."
        )


def _sites(method: Method) -> set[str]:
  return {site for where in method.inserts for site in sites.sites_of(where)}


def _any(parts: list[Method]) -> Callable[[str], bool]:
  if len(parts) < 2:
    return parts[0].trains if parts else nothing
  return lambda path: any(part.trains(path) for part in parts)


def _sum(penalties: list[Callable[[Params], Array]]) -> Callable[[Params], Array] | None:
  if len(penalties) < 2:
    return penalties[0] if penalties else None
  return lambda trainable: jnp.stack([penalty(trainable) for penalty in penalties]).sum()


def _merge(inner: sites.Inserts, outer: sites.Inserts) -> sites.Inserts:
  keys = list(inner)
  for where in outer:
    # A chain takes the place of its inner part: what stands between would end up around it.
    later = keys[keys.index(where) + 1 :] if where in inner else []
    between = [key for key in later if set(sites.sites_of(key)) & set(sites.sites_of(where))]
    if between:
      raise errors.UserError(
        f"The inserts at '{sites.name_of(where)}' cannot stand in this order, with one at "
        f"'{sites.name_of(between[0])}' between them: name the methods in another order."
      )
  both = {where: _chain(inner[where], outer[where]) for where in inner if where in outer}
  return {**inner, **outer, **both}


def _chain(
  inner: sites.MakeInsert | sites.PerLayer, outer: sites.MakeInsert | sites.PerLayer
) -> sites.MakeInsert | sites.PerLayer:
  if not isinstance(inner, sites.PerLayer) and not isinstance(outer, sites.PerLayer):
    return functools.partial(Chain, inner, outer)

  def make(i: int) -> sites.MakeInsert | None:
    pair = (sites.of_layer({'block': each}, i).get('block') for each in (inner, outer))
    there = [each for each in pair if each is not None]
    if len(there) == 2:
      return functools.partial(Chain, *there)
    return there[0] if there else None

  return sites.PerLayer(make)
