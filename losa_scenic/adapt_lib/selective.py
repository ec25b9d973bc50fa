"""Methods that add nothing and only say which of the backbone's own parameters train.

linear: none of them (linear probing): only the classifier trains.
full: all of them (full fine-tuning), class token, position embedding and MAP head included.
"""

import functools

from losa_scenic.adapt_lib import inserts
from losa_scenic.adapt_lib.method import Method
from losa_scenic.common_lib import errors
from losa_scenic.model_lib.presets import BackboneSpec


def _everything(path: str) -> bool:
  del path
  return True


def linear(spec: BackboneSpec) -> Method:
  """Linear probing."""
  del spec
  return Method()


def full(spec: BackboneSpec, *, token_keep: float = 1.0) -> Method:
  """Full fine-tuning, or training from scratch.

  Args:
    spec: the backbone.
    token_keep: share of the patch tokens that the encoder sees in training, drawn anew for every
      image (PatchDropout); 1 for all. Evaluation always uses all.

  Raises:
    errors.UserError: for a share outside (0, 1].
  """
  del spec
  if not 0 < token_keep <= 1:
    raise errors.UserError(f'token_keep must be in (0, 1], got {token_keep}.')
  drop = functools.partial(inserts.TokenDropout, keep=token_keep)
  return Method(trains=_everything, inserts={'encoder': drop} if token_keep < 1 else {})
