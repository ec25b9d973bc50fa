"""The block `feature_cache` of a run's config."""

import ml_collections
from ml_collections import config_dict

from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Config
from losa_scenic.dataset_lib.augment import Augment
from losa_scenic.train_lib.feature_layout import DTYPES


def default() -> Config:
  """Its fields."""
  return ml_collections.ConfigDict(
    {
      # Where features are kept; several runs may share it. None: they are not.
      'dir': config_dict.placeholder(str),
      'dtype': 'int8',  # with a scale for each token; or bfloat16, or float32, which is exact
      # Of what is drawn at random in training so many draws, one an epoch in turn.
      'views': config_dict.placeholder(int),
      'test': False,  # the test split too, which a run goes through once
    }
  )


def check(config: Config) -> None:
  """Raises `UserError` for a value that no cache can have, or that would have no effect.

  Args:
    config: of a run.
  """
  block, augment = config.feature_cache, Augment(**config.augment)
  errors.one_of('feature_cache.dtype', block.dtype, DTYPES)
  if block.views is not None:
    errors.check_at_least('feature_cache.views', block.views, 1)
  if not block.dir:
    usual = default()
    for field in ('dtype', 'views', 'test'):
      if block[field] != usual[field]:
        raise errors.UserError(f'feature_cache.{field} has no effect without feature_cache.dir.')
    return
  if augment.mixes:
    raise errors.UserError(
      'feature_cache: mixup and cutmix make other images of every batch, whose features cannot be '
      'kept. Leave augment.mixup_alpha and augment.cutmix_alpha out, or feature_cache.dir.'
    )
  if block.views is None and augment.active:
    raise errors.UserError(
      'feature_cache: images are augmented anew in every epoch, so features would never be the '
      'same again. Give feature_cache.views=K for K fixed views of each, in turn.'
    )
  if config.num_workers:
    raise errors.UserError(
      f'num_workers {config.num_workers} has no effect with feature_cache.dir: threads decode each '
      'image once.'
    )
