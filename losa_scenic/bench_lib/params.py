"""Parameter counts by shape evaluation: nothing is allocated, whatever the size of the model."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from losa_scenic.adapt_lib import methods
from losa_scenic.adapt_lib.method import partition, split_head
from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.weights_lib import backbones


def count(
  backbone: str,
  method: str,
  options: Mapping[str, Any] | None = None,
  backbone_options: Mapping[str, Any] | None = None,
  num_classes: int = 1000,
) -> dict[str, Any]:
  """Counts the parameters of an adapted model.

  Args:
    backbone: a preset such as 'g/14', a packaged backbone, or a backbone file.
    method: a key of `methods.METHODS`, or several joined by '+'.
    options: the method's options, as `methods.build` takes them.
    backbone_options: fields of the backbone to change, e.g. {'pool': 'gap'}.
    num_classes: width of the classifier, which only `head_params` counts.

  Returns:
    {'trainable_params' (without the classifier), 'frozen_params', 'head_params', 'backbone_params'
    (the plain backbone's), 'tokens' and what was asked for}.

  Raises:
    errors.UserError: for unknown names or values out of range.
  """
  model, plain = models(backbone, method, options, backbone_options, num_classes)
  trainable, frozen = partition(model.param_shapes(), model.method)
  rest, head = split_head(trainable)
  return {
    'backbone': backbone,
    'method': method,
    'set': dict(options or {}),
    'trainable_params': trees.count(rest),
    'frozen_params': trees.count(frozen),
    'head_params': trees.count(head),
    'backbone_params': trees.count(plain.param_shapes()['backbone']),
    'pool': model.spec.pool,
    'tokens': model.spec.tokens,
  }


def models(
  backbone: str,
  method: str,
  options: Mapping[str, Any] | None,
  backbone_options: Mapping[str, Any] | None,
  num_classes: int,
) -> tuple[Adapted, Adapted]:
  """The adapted model that `count` describes, and the plain backbone with the classifier.

  Raises:
    errors.UserError: for unknown names or values out of range.
  """
  if num_classes < 1:
    raise errors.UserError(f'num_classes must be at least 1, got {num_classes}.')
  spec = backbones.find(backbone, backbone_options).spec
  built = methods.build(method, spec, options)
  plain = methods.build('linear', spec)
  return (
    Adapted(spec, built, num_classes, scan=not built.unrolled),
    Adapted(spec, plain, num_classes, scan=True),
  )


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of a JSON file of counts.

  Args:
    path: a JSON object whose 'rows' are objects with 'backbone', 'method', 'set' (the options, as
      `methods.build` takes them), 'trainable_params' and, if wanted, 'backbone_options' (fields of
      the backbone to change) and a 'source'.

  Raises:
    errors.UserError: if there is no such file, or it is not of that form.
  """
  wanted = {'backbone': str, 'method': str, 'set': dict, 'trainable_params': int}
  also = {'backbone_options': dict, 'source': str}
  try:
    rows = json.loads(path.read_text())['rows']
    for i, row in enumerate(rows):
      for key in row:
        errors.one_of(f'key in row {i} of {path}', key, (*wanted, *also))
      given = {key: kind for key, kind in also.items() if key in row}
      if any(type(row[key]) is not kind for key, kind in (wanted | given).items()):
        raise TypeError(f'row {i}: {row}')
  except FileNotFoundError:
    raise errors.UserError(f'There is no file {path}.') from None
  except (ValueError, KeyError, TypeError, OSError) as e:
    raise errors.UserError(f'{path} is no file of parameter counts: {e!r}.') from None
  if not rows:
    raise errors.UserError(f'{path} has no rows.')
  return rows
