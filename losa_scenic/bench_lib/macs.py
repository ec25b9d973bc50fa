"""Multiply-accumulates of adapted models, a forward pass of one image or clip.

What is counted stands in `model_lib.macs`. The tables of the LoSA paper call multiply-accumulates
"GFLOPs" (of one image, with a MAP head and the classifier), by XLA's count halved, which includes
element-wise operations.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from losa_scenic.bench_lib import params
from losa_scenic.model_lib import macs
from losa_scenic.model_lib.adapted import Adapted


def of_method(
  backbone: str,
  method: str,
  options: Mapping[str, Any] | None = None,
  backbone_options: Mapping[str, Any] | None = None,
  num_classes: int = 1000,
) -> dict[str, Any]:
  """Multiply-accumulates of an adapted model on one image or clip, classifier included.

  The arguments are those of `params.count`; `num_classes` is part of what is counted.

  Returns:
    {'macs' (of the adapted model), 'backbone_macs' (the plain backbone with the classifier)} and
    what was asked for.

  Raises:
    errors.UserError: for unknown names or values out of range.
  """
  model, plain = params.models(backbone, method, options, backbone_options, num_classes)
  return {
    'backbone': backbone,
    'method': method,
    'set': dict(options or {}),
    'macs': of_model(model),
    'backbone_macs': of_model(plain),
  }


def of_model(model: Adapted) -> int:
  """Multiply-accumulates of one image or clip, from pixels to logits."""
  inputs = jax.ShapeDtypeStruct(model.input_shape(), jnp.float32)
  return macs.count(model.apply, model.variable_shapes(), inputs)
