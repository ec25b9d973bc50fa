"""Configuration: calling functions with config blocks, and finding keys that nobody knows."""

import contextlib
import importlib.util
import inspect
import pathlib
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, get_args

import ml_collections
from ml_collections import config_dict

from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Config

T = TypeVar('T')


def to_dict(block: Mapping[str, Any] | Config | None) -> dict[str, Any]:
  """A config block as a plain dict without the options left at None (= 'not given')."""
  if block is None:
    return {}
  items = block.to_dict() if isinstance(block, ml_collections.ConfigDict) else dict(block)
  return {key: value for key, value in items.items() if value is not None}


def options(fn: Callable[..., Any]) -> set[str]:
  """Names of the keyword-only arguments of `fn`: the options a user may set."""
  parameters = inspect.signature(fn).parameters.values()
  return {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def load_file(beside: str, path: str) -> types.ModuleType:
  """The module of a Python file: how one config file uses another.

  Config files are loaded by path, not as a package.

  Args:
    beside: `__file__` of the file that asks.
    path: relative to the folder of that file.

  Raises:
    errors.UserError: if there is no such file.
  """
  file = (pathlib.Path(beside).parent / path).resolve()
  name = f'config_file_{file.stem}'
  spec = importlib.util.spec_from_file_location(name, file)
  if not file.is_file() or spec is None or spec.loader is None:
    raise errors.UserError(f'There is no Python file {file}, which {beside} uses.')
  module = importlib.util.module_from_spec(spec)
  # As `import` does: data classes look their module up.
  sys.modules[name] = module
  spec.loader.exec_module(module)
  return module


def from_text(fn: Callable[..., Any], name: str, text: str) -> Any:
  """A value of an option of `fn` from a command line; of an unknown option the text itself.

  Raises:
    errors.UserError: for a text that is no value of the option's type.
  """
  if name not in options(fn):
    return text
  allowed = _types(fn, name)
  if bool in allowed and text.lower() in ('true', 'false'):
    return text.lower() == 'true'
  for kind in (int, float):
    if kind in allowed:
      with contextlib.suppress(ValueError):
        return kind(text)
  if types.NoneType in allowed and text == 'None':
    return None
  if str in allowed:
    return text
  kinds = ' or '.join(kind.__name__ for kind in allowed if kind is not types.NoneType)
  raise errors.UserError(f'{name} must be of type {kinds}, not {text!r}.')


def pairs(flag: str, texts: Sequence[str]) -> dict[str, str]:
  """['rank=64', 'pool=gap'] -> {'rank': '64', 'pool': 'gap'}, of an option given several times.

  Args:
    flag: the option of the command line, for messages.
    texts: what it was given.

  Raises:
    errors.UserError: for a text without '=', or a key given twice.
  """
  found: dict[str, str] = {}
  for text in texts:
    key, equals, value = text.partition('=')
    if not key or not equals:
      raise errors.UserError(f"{flag} takes KEY=VALUE, not '{text}'.")
    if key in found:
      raise errors.UserError(f'{flag} {key} is given twice.')
    found[key] = value
  return found


def _types(fn: Callable[..., Any], name: str) -> tuple[Any, ...]:
  annotation = inspect.signature(fn).parameters[name].annotation
  return get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def placeholders(fn: Callable[..., Any]) -> Config:
  """A config block with the options of `fn`, none of them given, typed as `fn` annotates them.

  An option that may be a number or a name ('int | str') is a string in a config.
  """
  block = ml_collections.ConfigDict()
  for name in sorted(options(fn)):
    kind = next((kind for kind in (str, float, int, bool) if kind in _types(fn, name)), None)
    if kind is None:
      raise TypeError(f'{fn}: option {name} is neither a number, a string nor a bool.')
    block[name] = config_dict.placeholder(kind)
  return block


def build(
  fn: Callable[..., T], *args: Any, block: Mapping[str, Any] | None, what: str, **fixed: Any
) -> T:
  """Calls `fn(*args, **block, **fixed)`; a key of `block` that `fn` does not take is an error.

  Args:
    fn: a function whose keyword-only arguments are its options.
    *args: positional arguments.
    block: a config block; options at None count as not given.
    what: how to name `fn` in the error, e.g. "dataset 'digits'".
    **fixed: keyword arguments from the program, not the user.

  Returns:
    What `fn` returns.

  Raises:
    errors.UserError: for an unknown option, naming the nearest one, or a value of a wrong type.
  """
  given = to_dict(block)
  allowed = options(fn) - set(fixed)
  for key in given:
    if key not in allowed:
      raise errors.unknown(f'option of {what}', key, allowed)
    _check_option(f'{key} of {what}', given[key], inspect.signature(fn).parameters[key].annotation)
  return fn(*args, **given, **fixed)


def _check_option(name: str, value: Any, annotation: Any) -> None:
  # Only plain types are checked; a whole number may stand for a float.
  allowed = get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
  kinds = [kind for kind in (int, float, str, bool) if kind in allowed]
  exact = type(value) in kinds or (type(value) is int and float in kinds)
  if kinds and not exact:
    raise errors.UserError(
      f'{name} must be of type {" or ".join(kind.__name__ for kind in kinds)}, not {value!r}.'
    )


def check_keys(given: Any, known: Any, prefix: str = '') -> None:
  """Raises `UserError` for the first key of `given`, at any depth, that `known` does not have.

  A block that is empty in `known` accepts any keys: its consumer checks them through `build`.
  """
  for key, value in given.items():
    if key not in known:
      raise errors.unknown('config key', prefix + key, (prefix + name for name in known))
    is_block = isinstance(value, (Mapping, ml_collections.ConfigDict))
    if is_block and len(known[key] or ()):
      check_keys(value, known[key], prefix=f'{prefix}{key}.')


def check_types(given: Config, schema: Config, prefix: str = '') -> None:
  """Raises `UserError` for a field of `schema` that `given` lacks or holds a wrong type for.

  A whole number may stand for a float, a list for a tuple, None where the default is None. Inside a
  block, an option whose default is None may be missing.
  """
  for key in schema:
    name, default, kind = prefix + key, schema[key], schema.get_type(key)
    is_block = isinstance(default, ml_collections.ConfigDict)
    if key not in given:
      if prefix and (default is None or is_block):
        continue
      raise errors.UserError(
        f"The config has no field '{name}': begin with `config = run_config.default_config()`."
      )
    value = given[key]
    if is_block and isinstance(value, ml_collections.ConfigDict):
      check_types(value, default, f'{name}.')
      continue
    kinds = {float: (float, int), tuple: (tuple, list)}.get(kind, (kind,))
    right = isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))
    if is_block or not (right or (value is None and default is None)):
      what = 'a block of options' if is_block else f'of type {kind.__name__}'
      raise errors.UserError(f'{name} must be {what}, not {value!r}.')
