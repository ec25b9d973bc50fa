"""Backbones written under public names, for timm, transformers and others to load.

  like = spelling.Original.of(checkpoint.open_checkpoint('facebook/...'))   # or from_json
  export.write('tuned', spec, params, 'timm', like=like)

A format takes its names from `format_tables`: of the library's models the first that can hold the
backbone. Where two spellings of one library are the same function (a fused or a separate query, key
and value), `like`, the spelling of the file that the backbone was converted from, decides; and
'original' writes the very names of that file, whatever project they are from.

Positions: where a file has rows for fewer leading tokens than our embedding, the other rows are
added to the tokens themselves, which is the same. Only the encoder is written: no classifier, no
text tower, no pooler.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.model_lib.spec import BackboneSpec
from losa_scenic.weights_lib import assembly, export_config, sources, stored
from losa_scenic.weights_lib.assembly import Assembly
from losa_scenic.weights_lib.checkpoint import param_shapes
from losa_scenic.weights_lib.format_tables import FORMATS
from losa_scenic.weights_lib.formats import Format
from losa_scenic.weights_lib.spelling import Original
from losa_scenic.weights_lib.stored import DTYPES

ORIGINAL = 'original'
_param_shapes = functools.cache(param_shapes)  # A pass through the model, on shapes.
_WEIGHTS = 'model.safetensors'
_NPZ = 'model.npz'
# What weights are called, and files that would be read beside them.
_SUFFIXES = ('.safetensors', '.npz', '.bin', '.pth', '.pt', '.msgpack')
_TAKEN = (*sources.CONVENTIONAL, *sources.SIDE_FILES)


def names() -> list[str]:
  """What `family` can be."""
  return [*FORMATS, ORIGINAL]


def to_family(
  spec: BackboneSpec,
  params: Mapping[str, Any],
  family: str,
  dtype: str = 'float32',
  like: Original | None = None,
) -> dict[str, np.ndarray]:
  """The tensors of a file.

  Args:
    spec: a plain backbone's geometry.
    params: {path: array} of its parameters, layers unrolled, as `checkpoint.param_shapes` has them.
      Values are asked for one after the other, so that a mapping which reads them is not held.
    family: one of `names()`.
    dtype: a key of `DTYPES`.
    like: how the file was spelled that the backbone was converted from.

  Returns:
    {name: array}.

  Raises:
    errors.UserError: if the family has no place for a parameter, parameters are missing or too
      many, or a value is not finite in that dtype.
  """
  file = _plan(spec, params, family, like).file
  target = _dtype(dtype)
  return {name: file.tensor(name, target) for name in file.tensors}


def write(
  folder: str | pathlib.Path,
  spec: BackboneSpec,
  params: Mapping[str, Any],
  family: str,
  dtype: str = 'float32',
  config: Mapping[str, Any] | None = None,
  like: Original | None = None,
) -> list[str]:
  """Writes model.safetensors (big_vision: model.npz), config.json and preprocessor_config.json.

  Tensors of a safetensors file are made and written one after the other, so that no more than one
  is held; those of an npz file are made first.

  Args:
    folder: a folder without weights (see `check_free`), made if it does not exist.
    spec: see `to_family`.
    params: see `to_family`.
    family: see `to_family`.
    dtype: see `to_family`.
    config: the config.json of the file that the backbone was converted from, in the place of
      `like`'s. For timm it adds what it says about preprocessing and licence; with `like` it says
      which architecture the names are of.
    like: see `to_family`.

  Returns:
    What the format cannot say and the user should know, as sentences.

  Raises:
    errors.UserError: see `to_family` and `check_free`; or the files cannot be written.
  """
  if config is not None and like is not None:
    like = dataclasses.replace(like, config=config)
  plan = _plan(spec, params, family, like)
  target, npz = _dtype(dtype), plan.file.spelling.jax
  folder = pathlib.Path(folder)
  if npz and dtype == 'bfloat16':
    raise errors.UserError("An npz file has no dtype 'bfloat16'; take float32 or float16.")
  check_free(folder)
  files, remarks = _side_files(plan, family, dtype, dict(config or (like.config if like else {})))
  paths = [folder / name for name in (*files, _NPZ if npz else _WEIGHTS)]
  with stored.replacing(*paths) as (*beside, weights):
    for path, content in zip(beside, files.values(), strict=True):
      path.write_text(json.dumps(content, indent=2) + '\n')
    if npz:
      arrays: dict[str, Any] = {n: plan.file.tensor(n, target) for n in plan.file.tensors}
      np.savez(weights, **arrays)
    else:
      with open(weights, 'wb') as stream:
        assembly.write_safetensors(stream, plan.file, target)
  return remarks


def check_free(folder: str | pathlib.Path, own: str | None = None) -> None:
  """Refuses a folder with a checkpoint: it may be the original, and two in one are confused.

  Args:
    folder: where weights shall be written; need not exist.
    own: NAME.json of a backbone of ours that may be replaced there, with its NAME.safetensors.

  Raises:
    errors.UserError: if it holds other weights or files that are read beside weights, whoever
      wrote them, or is no folder that can be looked into.
  """
  folder = pathlib.Path(folder)
  try:
    names = {path.name for path in folder.iterdir()}
  except FileNotFoundError:
    return
  except OSError as e:
    raise errors.UserError(f'Cannot write to {folder}: {e.strerror}.') from None
  if own in names:
    stored.open_stored(folder / own)  # Raises if it is not ours.
    names.discard(pathlib.Path(own).with_suffix('.safetensors').name)
  taken = sorted(name for name in names if name in _TAKEN or name.endswith(_SUFFIXES))
  if taken:
    raise errors.UserError(
      f'{folder} holds {", ".join(taken[:8])} already, which may be an original: nothing is '
      f'written. Choose another folder, or remove what is there.'
    )


@dataclasses.dataclass(frozen=True)
class _Plan:
  """The weights, the library's model or None, and the original whose names are taken or None."""

  file: Assembly
  format: Format | None
  like: Original | None


def _dtype(name: str) -> np.dtype:
  return np.dtype(jnp.dtype(errors.one_of('dtype', name, DTYPES)))


def _plan(
  spec: BackboneSpec, params: Mapping[str, Any], family: str, like: Original | None
) -> _Plan:
  shapes = _param_shapes(spec)
  differing = [f'missing {path}' for path in shapes if path not in params]
  differing += [f'too many: {path}' for path in params if path not in shapes]
  if differing:
    more = f' ... and {len(differing) - 8} more' if len(differing) > 8 else ''
    raise errors.UserError(
      f"These are not the parameters of a plain backbone '{spec.name}', layers unrolled: "
      f'{"; ".join(differing[:8])}{more}.'
    )
  errors.one_of('format', family, names())
  if family == ORIGINAL:
    if like is None:
      raise errors.UserError(
        f"Format '{ORIGINAL}' needs the spelling of the file that the backbone was converted from; "
        f'without one, take one of {", ".join(FORMATS)}.'
      )
    return _Plan(Assembly(spec, params, like.spelling(spec, shapes)), None, like)
  own = _format_of(like, FORMATS[family], spec) if like is not None else None
  if like is not None and own is not None:
    prefix = own.prefix if 'vision_config' in like.config else None
    return _Plan(Assembly(spec, params, like.spelling(spec, shapes, prefix)), own, like)
  chosen, filled = _first_that_holds(family, spec, shapes)
  wanted = _param_shapes(filled)
  added = frozenset(wanted) - frozenset(shapes)
  file = Assembly(filled, params, chosen.spelling(filled, wanted), added)
  return _Plan(file, chosen, None)


def _format_of(like: Original, formats: Iterable[Format], spec: BackboneSpec) -> Format | None:
  """The model of the library that an original is one of, or None if it is no original of theirs.

  A file is of timm or of transformers if such a config.json lies beside it.
  """
  config = like.config
  if 'architecture' in config and like.family == 'timm':
    arguments = config.get('model_args', {})
    pool = config.get(
      'global_pool', arguments.get('global_pool', export_config.TIMM_POOLS[spec.pool])
    )
    if pool != export_config.TIMM_POOLS[spec.pool]:
      return None  # Another pooling has its norm and its head in another place.
    return next((kind for kind in formats if kind.name == 'timm'), None)
  vision = config.get('vision_config', config)
  kind = vision.get('model_type', f'{config.get("model_type")}_vision_model')
  fitting = (f for f in formats if f.name == f'transformers:{kind}')
  return next((f for f in fitting if f.family.name == like.family), None)


def _first_that_holds(
  family: str, spec: BackboneSpec, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Format, BackboneSpec]:
  """The first model of a format that can hold a backbone, and the spec as that model has it."""
  refused = []
  for kind in FORMATS[family]:
    filled = kind.filled(spec)
    reasons = kind.reasons(filled, shapes)
    if not reasons:
      return kind, filled
    refused.append((kind, reasons))
  fewest = min(len(reasons) for _, reasons in refused)
  shown = '; '.join(
    f'{kind.title} cannot have {", ".join(reasons[:8])}'
    for kind, reasons in refused
    if len(reasons) == fewest
  )
  able = [
    name
    for name, kinds in FORMATS.items()
    if any(not kind.reasons(kind.filled(spec), shapes) for kind in kinds)
  ]
  raise errors.UserError(
    f"Format '{family}' cannot hold the backbone '{spec.name}': {shown}. Formats that can: "
    f'{", ".join(able) or "none"}.'
  )


def _side_files(
  plan: _Plan, family: str, dtype: str, original: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
  """{file name: content} of the JSON files, and remarks."""
  own = plan.like is not None
  remarks = []
  spec, added = plan.file.spec, plan.file.added
  if added:
    shown = min(added)
    remarks.append(f'The model has biases that the backbone has not: 0 is written for {shown} etc.')
  if plan.format is None:
    return ({'config.json': dict(original)} if original else {}), remarks
  if plan.format.name == 'timm':
    config, more = export_config.timm(spec, plan.format.title, original, own)
    return {'config.json': config}, remarks + more
  library, _, kind = plan.format.name.partition(':')
  if library != 'transformers':
    return {}, [*remarks, f'{family} has no description of an encoder alone: only weights.']
  kept = original if own else {}
  config, more = export_config.transformers(spec, kind, plan.format.title, dtype, kept)
  beside = export_config.preprocessor(spec)
  return {'config.json': config, 'preprocessor_config.json': beside}, [*remarks, *more]
