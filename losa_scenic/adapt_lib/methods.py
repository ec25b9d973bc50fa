"""The only place that knows all methods by name."""

from collections.abc import Callable, Mapping
from typing import Any

from losa_scenic.adapt_lib import losa, selective
from losa_scenic.adapt_lib.method import Method
from losa_scenic.common_lib import config, errors
from losa_scenic.model_lib.presets import BackboneSpec

METHODS: dict[str, Callable[..., Method]] = {
  'full': selective.full,
  'linear': selective.linear,
  'losa': losa.build,
}


def build(name: str, spec: BackboneSpec, options: Mapping[str, Any] | None = None) -> Method:
  """The method of that name for a backbone.

  Args:
    name: a key of `METHODS`.
    spec: the backbone.
    options: the method's options by name; None values count as not given.

  Raises:
    errors.UserError: for an unknown method or option, or a value out of range.
  """
  errors.one_of('method', name, METHODS)
  return config.build(METHODS[name], spec, block=options, what=f"method '{name}'")
