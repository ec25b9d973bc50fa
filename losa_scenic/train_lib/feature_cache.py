"""The cache of frozen features: what the frozen encoder makes of an image is computed once.

With `feature_cache.dir`, the first epoch writes it there, and later epochs, runs that go on and
other runs over the same backbone read it: no image is decoded, and the encoder is not run. What is
kept of an image is in `feature_layout`, how in `feature_store`, and when in `cached_batches`.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Num

from losa_scenic.common_lib import errors, trees
from losa_scenic.common_lib.types import Config
from losa_scenic.dataset_lib import dataset_utils
from losa_scenic.dataset_lib.augment import Augment
from losa_scenic.train_lib import feature_layout, sharding
from losa_scenic.train_lib.cached_batches import CachedBatches, Encode
from losa_scenic.train_lib.feature_store import Store, check_room
from losa_scenic.train_lib.program import Program

_FORMAT = 1
_NAMES = {'train': 'training', 'valid': 'validation', 'test': 'test'}


@dataclasses.dataclass(frozen=True)
class Cache:
  """An open cache.

  Attributes:
    dataset: the data set with batches of rows in the place of images.
    line: what there is, for people.
    stores: part -> its rows.
  """

  dataset: dataset_utils.Dataset
  line: str
  stores: Mapping[str, Store]

  def close(self) -> None:
    """Closes the files."""
    for store in self.stores.values():
      store.close()


def open_cache(config: Config, program: Program, dataset: dataset_utils.Dataset) -> Cache:
  """Opens the features of the parts of a data set that are gone through again and again.

  Args:
    config: of the run, resolved, with `feature_cache.dir`.
    program: its fixed parts; the layout of rows among them.
    dataset: of images or clips.

  Raises:
    errors.UserError: where features would not be the same in each epoch, for several processes, if
      the folder cannot be used, or if the disk has no room for all of them.
  """
  layout, options = program.layout, config.feature_cache
  if layout is None:
    raise ValueError('The program was not built for a feature cache.')
  _check(config, dataset.meta_data)
  encode, of_model = _encode(program, layout), _of_model(config, program)
  stores, parts = {}, {}
  for part in ('train', 'valid', *(['test'] if options.test else [])):
    images = getattr(dataset, f'{part}_ds')
    if images is None:
      continue
    views = (options.views or 1) if part == 'train' else 1
    rows = views * len(images.loader.source)
    meta = of_model | {'data': _of_data(config, dataset.meta_data, part), 'row': layout.describe()}
    stores[part] = store = Store(options.dir, meta, rows, layout.row_bytes)
    parts[f'{part}_ds'] = CachedBatches(images, store, layout, encode, views)
  lacking = sum(store.count - store.have for store in stores.values())
  check_room(pathlib.Path(options.dir), lacking * layout.row_bytes, 'the features')
  return Cache(dataclasses.replace(dataset, **parts), _line(stores, layout), stores)


def _check(config: Config, meta_data: Mapping[str, Any]) -> None:
  """Raises `UserError` for what cannot be cached."""
  clips, options = meta_data.get('clips'), config.feature_cache
  if jax.process_count() > 1:
    raise errors.UserError('feature_cache is for runs of one process: leave feature_cache.dir out.')
  if clips and options.views is None:
    raise errors.UserError(
      'feature_cache: training shows another window of each clip in every epoch, so features would '
      'never be the same again. Give feature_cache.views=K for K fixed windows of each, in turn.'
    )
  if options.views is not None and not (clips or Augment(**config.augment).active):
    raise errors.UserError(
      f'feature_cache.views={options.views} has no effect: images are not augmented.'
    )
  if options.test and clips and clips['num_test_clips'] * clips['num_test_crops'] > 1:
    raise errors.UserError(
      'feature_cache.test keeps one view of a clip: leave num_test_clips and num_test_crops at 1.'
    )


def _encode(program: Program, layout: feature_layout.Layout) -> Encode:
  encoder = program.encoder
  compiled = jax.jit(
    functools.partial(layout.encode, encoder),
    out_shardings=sharding.batched(program.mesh),
    compiler_options=encoder.compiler_options(),
  )

  def encode(images: Num[np.ndarray, 'b ...']) -> Num[np.ndarray, 'b items']:
    placed = sharding.put({'inputs': images}, program.mesh)['inputs']
    return np.asarray(compiled(program.frozen, placed))

  return encode


def _of_model(config: Config, program: Program) -> dict[str, Any]:
  """All that decides what the encoder makes of an input."""
  model = program.model
  identity = {name: value for name, value in model.identity().items() if name != 'method'}
  weights = model.backbone.sha256
  if weights is None:
    weights = trees.digest(sharding.fetch(program.frozen))
  return {
    'format': _FORMAT,
    'weights': weights,
    **identity,
    'model_dtype': config.model_dtype_str,
    'frozen_dtype': config.frozen_dtype_str,
    # They round differently.
    'platform': jax.default_backend(),
    'matmul_precision': jax.config.jax_default_matmul_precision,
  }


def _of_data(config: Config, meta_data: Mapping[str, Any], part: str) -> dict[str, Any]:
  """All that decides what the model is shown at a position."""
  views = config.feature_cache.views if part == 'train' else None
  return {
    'part': part,
    'fingerprint': meta_data['fingerprints'][part],
    **{name: meta_data[name] for name in ('input_shape', 'interpolation', 'central_crop', 'clips')},
    'dtype': config.data_dtype_str,
    'views': views,
    'augment': None if views is None else config.augment.to_dict(),
  }


def _line(stores: Mapping[str, Store], layout: feature_layout.Layout) -> str:
  """'features from cache: 12 of 800 training, 0 of 200 validation; 6,528 bytes each ...'."""
  parts = [f'{store.have:,} of {store.count:,} {_NAMES[k]}' for k, store in stores.items()]
  size = layout.row_bytes * sum(store.count for store in stores.values())
  where = ', '.join(str(store.path) for store in stores.values())
  return (
    f'features from cache: {", ".join(parts)}; {layout.row_bytes:,} bytes each in {layout.dtype}, '
    f'{size / 1e9:,.3g} GB when all are there ({where})'
  )
