"""Merges a trained method into the weights: a plain backbone with the same features.

An insert that stands around a linear operation and is itself affine leaves an affine operation, so
its weights can be read off by probing: W' and b' are what the adapted operation makes of the unit
vectors and of zero. A final or inner norm followed by a scale and a shift per channel is read off
the same way. This needs to know nothing about any method; what is not affine is found out.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from losa_scenic.adapt_lib.inserts import LINEAR_SITES, TokenDropout
from losa_scenic.adapt_lib.method import BACKBONE, Method
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Array, Params
from losa_scenic.model_lib import encoder, layers, sites
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.spec import BackboneSpec

_POOL_LINEAR = ('pool_query', 'pool_key', 'pool_value', 'pool_out')
_NORMS = ('norm1', 'norm2', 'norm')
FOLDABLE_SITES = (*LINEAR_SITES, *_POOL_LINEAR, *_NORMS, 'patch')
# Relative to the largest output; folding itself is exact to float32 rounding.
_TOLERANCE = 1e-4

ApplyInserts = Callable[[str, sites.Op], sites.Op]


def check(method: Method) -> None:
  """Raises `UserError` with the reason if a method cannot be merged into the backbone."""
  if method.side is not None:
    raise errors.UserError(
      'This method cannot be merged into the backbone: its side network is no part of it.'
    )
  for where, make in method.inserts.items():
    if _only_in_training(make):
      continue
    for site in sites.sites_of(where):
      if site not in FOLDABLE_SITES:
        raise errors.UserError(
          f"This method cannot be merged into the backbone: it has an insert around '{site}', "
          'which is not a linear operation.'
        )


def _check_floats(model: Adapted) -> None:
  if model.quantisation is not None:
    raise errors.UserError(
      f"A quantised backbone ('{model.quantisation}') cannot be merged with what was trained on "
      'it: leave backbone_quantisation or export_backbone out.'
    )


def fold(model: Adapted, params: Params) -> dict[str, Any]:
  """The parameters of a plain backbone that computes what the adapted one computes.

  Args:
    model: the adapted model.
    params: all its parameters, trainable and frozen together.

  Returns:
    The tree of `ViT(model.spec, {})`, float32 where something was merged, in the layout (stacked or
    unrolled layers) of `params`.

  Raises:
    errors.UserError: if the method cannot be merged, with the reason.
  """
  _check_floats(model)
  check(model.method)
  backbone = _merge(model, encoder.unstack_layers(params) if model.scan else params)
  return encoder.stack_layers(backbone) if model.scan else backbone


def check_model(model: Adapted) -> None:
  """Raises the `UserError` that `fold` would raise, found out without the weights.

  Random parameters are merged: those of the model, and of one layer of each kind.
  """
  _check_floats(model)
  check(model.method)
  if not any(not _only_in_training(make) for make in model.method.inserts.values()):
    return
  shapes = model.param_shapes()
  shapes = jax.eval_shape(encoder.unstack_layers, shapes) if model.scan else shapes
  inner = sites.split(model.method.inserts)[1]
  kinds = {
    frozenset(map(sites.name_of, sites.of_layer(inner, i))): i
    for i in reversed(range(model.spec.depth))
  }
  layers_ = {f'layers_{i}' for i in kinds.values()}
  backbone = dict(shapes[BACKBONE])
  backbone['encoder'] = {
    name: part
    for name, part in backbone['encoder'].items()
    if name in layers_ or not name.startswith('layers_')
  }
  rng = np.random.default_rng(0)
  tree = jax.tree.map(
    lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32)),
    {BACKBONE: backbone, 'shared': shapes.get('shared', {})},
  )
  _merge(model, tree)


def _merge(model: Adapted, tree: Params) -> dict[str, Any]:
  """Merges the inserts of the model and of those layers that a tree has, which are unrolled."""
  backbone = jax.tree.map(lambda leaf: leaf, dict(tree[BACKBONE]))
  shared = model.method.shared
  ctx = sites.Ctx(
    grid=model.spec.grid,
    prefix=model.spec.prefix,
    shared=shared().apply({'params': tree.get('shared', {})}) if shared else None,
  )
  outer, inner = sites.split(model.method.inserts)
  with jax.default_matmul_precision('highest'):
    _fold_model_sites(backbone, model.spec, _inserts(outer, backbone, ctx))
    for i in range(model.spec.depth):
      if f'layers_{i}' not in backbone['encoder']:
        continue
      layer = backbone['encoder'][f'layers_{i}']
      apply = _inserts(sites.of_layer(inner, i), layer, ctx)
      layer['block'] = {
        name: _fold_site(name, part, model.spec, apply) if name in FOLDABLE_SITES else part
        for name, part in layer['block'].items()
      }
      backbone['encoder'][f'layers_{i}'] = _without_inserts(layer)
  return _without_inserts(backbone)


def _only_in_training(make: sites.MakeInsert | sites.PerLayer) -> bool:
  return not isinstance(make, sites.PerLayer) and isinstance(make(), TokenDropout)


def _without_inserts(tree: Mapping[str, Any]) -> dict[str, Any]:
  return {name: value for name, value in tree.items() if not name.startswith('insert_')}


def _inserts(table: sites.LayerInserts, params: Params, ctx: sites.Ctx) -> ApplyInserts:
  """The inserts of one layer, or of the model, as functions: {(site, operation) -> operation}."""
  bound = {}
  for where, make in table.items():
    if not _only_in_training(make):
      name = sites.name_of(where)
      bound[name] = make().bind({'params': params.get(f'insert_{name}', {})})
  return sites.make_at(sites.by_site(bound), ctx)


def _fold_model_sites(backbone: dict[str, Any], spec: BackboneSpec, apply: ApplyInserts) -> None:
  if 'norm' in backbone:
    backbone['norm'] = _fold_site('norm', backbone['norm'], spec, apply)
  backbone['patch'] = {'proj': _fold_patch(backbone['patch'], spec, apply)}
  if 'map_head' in backbone:
    head = dict(backbone['map_head'])
    for site in _POOL_LINEAR:
      name = site.removeprefix('pool_')
      head[name] = _fold_site(site, head[name], spec, apply)
    backbone['map_head'] = head


def _fold_site(site: str, params: Params, spec: BackboneSpec, apply: ApplyInserts) -> Params:
  """A linear layer's or a norm's parameters with the site's inserts merged into them."""
  norm = layers.norm(spec, jnp.float32)
  f = (norm if site in _NORMS else _dense(params)).bind({'params': params})
  adapted = apply(site, f)
  if adapted is f:
    return params
  if site in _NORMS:
    return _probe_norm(site, adapted, norm, params)
  return _probe_linear(site, lambda x: adapted(x[:, None])[:, 0], params)


def _dense(params: Params) -> layers.Linear:
  return layers.dense(params['kernel'].shape[1], jnp.float32, use_bias='bias' in params)


def _fold_patch(params: Params, spec: BackboneSpec, apply: ApplyInserts) -> Params:
  f = layers.PatchEmbed(spec).bind({'params': params})
  adapted = apply('patch', f)
  if adapted is f:
    return params['proj']
  shape = (spec.tubelet, spec.patch, spec.patch, 3)
  return _probe_linear('patch', lambda x: adapted(x.reshape(-1, *shape))[:, 0], params['proj'])


def _probe_linear(site: str, f: Callable[[Array], Array], params: Params) -> Params:
  """Kernel and, if `params` have one, bias of an affine function of vectors [k width] -> [k e]."""
  f, width = jax.jit(f), params['kernel'].shape[0]
  bias = f(jnp.zeros((1, width)))[0]
  kernel = f(jnp.eye(width)) - bias
  x = jnp.asarray(np.random.default_rng(0).standard_normal((8, width)), jnp.float32)
  _check_same(site, f(x), x @ kernel + bias)
  return _as_stored(site, {'kernel': kernel, 'bias': bias}, params)


def _as_stored(site: str, merged: Params, params: Params) -> Params:
  """`merged` without a bias that the backbone's own operation has no place for, if it is 0."""
  if 'bias' in params:
    return merged
  if jnp.abs(merged['bias']).max() > 0:
    raise errors.UserError(
      f"This method cannot be merged into the backbone: it adds a bias at '{site}', where the "
      'backbone has none.'
    )
  return {name: leaf for name, leaf in merged.items() if name != 'bias'}


def _probe_norm(site: str, f: Callable[[Array], Array], norm: nn.Module, params: Params) -> Params:
  """{'scale', 'bias'} of a function that normalises and then scales and shifts each channel."""
  rng, d = np.random.default_rng(0), params['scale'].shape[0]
  # No channel of x is near the mean, so that each normalised value can be divided by.
  x = np.where(np.arange(d) % 2, 1.0, -1.0) * (1 + 0.25 * rng.random(d))
  x = jnp.asarray(np.stack([x, -x, rng.standard_normal(d)])[None], jnp.float32)
  unit = {'scale': jnp.ones(d), 'bias': jnp.zeros(d)}
  plain = functools.partial(norm.apply, {'params': {name: unit[name] for name in params}})
  z, y = plain(x)[0], f(x)[0]
  # z[0] = -z[1]
  scale, bias = (y[0] - y[1]) / (z[0] - z[1]), (y[0] + y[1]) / 2
  _check_same(site, y, z * scale + bias)
  return _as_stored(site, {'scale': scale, 'bias': bias}, params)


def _check_same(site: str, have: Array, want: Array) -> None:
  difference, largest = float(jnp.abs(have - want).max()), float(jnp.abs(have).max())
  if not difference <= _TOLERANCE * largest:  # NaN is not, either.
    raise errors.UserError(
      f"This method cannot be merged into the backbone: with its insert, '{site}' is no longer a "
      'linear function of its input.'
    )
