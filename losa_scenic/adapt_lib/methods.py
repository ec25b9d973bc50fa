"""The only place that knows all methods by name."""

from collections.abc import Callable, Mapping
from typing import Any

from losa_scenic.adapt_lib import losa, selective, union
from losa_scenic.adapt_lib.method import Method
from losa_scenic.common_lib import config as config_lib
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Config
from losa_scenic.model_lib.presets import BackboneSpec

METHODS: dict[str, Callable[..., Method]] = {
  'full': selective.full,
  'linear': selective.linear,
  'losa': losa.build,
}


def parts(name: str) -> tuple[str, ...]:
  """The names in 'lora+ssf'; one for a plain method.

  Raises:
    errors.UserError: for an unknown method, or one that is named twice.
  """
  names = tuple(name.split('+'))
  for part in names:
    errors.one_of('method', part, METHODS)
  if len(set(names)) != len(names):
    raise errors.UserError(f"Method '{name}' names a part twice.")
  return names


def build(name: str, spec: BackboneSpec, options: Mapping[str, Any] | None = None) -> Method:
  """The method of that name for a backbone.

  Args:
    name: a key of `METHODS`, or several joined by '+' (the innermost first).
    spec: the backbone.
    options: the method's options by name; None values count as not given. Of several methods:
      {method: its options}.

  Raises:
    errors.UserError: for an unknown method or option, a value out of range, or methods that cannot
      stand together.
  """
  names = parts(name)
  if len(names) == 1:
    return _build(name, spec, options)
  options = config_lib.to_dict(options)
  for key in options:
    errors.one_of(f"part of method '{name}'", key, names)
  return union.union({part: _build(part, spec, options.get(part)) for part in names})


def options(config: Config) -> dict[str, Any]:
  """The options that a run's config (fields: method, method_configs) gives to its method.

  Of several methods: {method: its options}. Options left at None are not among them.
  """
  names, blocks = parts(config.method), config.get('method_configs') or {}
  given = {name: config_lib.to_dict(blocks.get(name)) for name in names}
  return given if len(names) > 1 else next(iter(given.values()))


def _build(name: str, spec: BackboneSpec, options: Mapping[str, Any] | None) -> Method:
  return config_lib.build(METHODS[name], spec, block=options, what=f"method '{name}'")
