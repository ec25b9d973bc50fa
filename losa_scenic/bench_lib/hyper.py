"""Scenic's sweep vocabulary as plain functions: a sweep is a list of runs, a run a dict of flags.

A config file that can be swept defines `get_hyper(hyper)` next to `get_config()`; it receives the
five functions below and returns a sweep:

    def get_hyper(hyper):
      return hyper.product([
          hyper.sweep('config.method', ['linear', 'losa']),
          hyper.sweep('config.seed', range(3)),
      ])

The names and meanings are those of the `hyper` object that Scenic's configs are written for
(https://github.com/google-research/scenic, `get_hyper` in the config files).
"""

import hashlib
import importlib.util
import inspect
import itertools
import json
import pathlib
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from losa_scenic.common_lib import errors

Overrides = dict[str, Any]
Sweep = list[Overrides]

_KEY = re.compile(r'config(\.\w+(\[\d+\])?)+')
_NAME_LENGTH = 100
_VALUE_LENGTH = 40


def sweep(key: str, values: Iterable[Any]) -> Sweep:
  """One run for each value of one key.

  Args:
    key: the flag to set, e.g. 'config.optimizer.learning_rate'.
    values: bool, int, float, str, or tuples and lists of these; any iterable but a string.

  Returns:
    `[{key: value}, ...]` in the order of `values`.

  Raises:
    errors.UserError: for a key that does not start with 'config.', no values, or a value that a
      command-line flag cannot carry.
  """
  if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
    raise errors.UserError(f"sweep('{key}', ...): give a list of values, not {values!r}.")
  runs = [{_checked_key(key): _checked_value(key, value)} for value in values]
  if not runs:
    raise errors.UserError(f"sweep('{key}', ...): the list of values is empty.")
  return runs


def fixed(key: str, value: Any, length: int = 1) -> Sweep:
  """The same value in `length` runs; what a `zipit` or `product` combines with other sweeps.

  Args:
    key: the flag to set, e.g. 'config.batch_size'.
    value: see `sweep`.
    length: how many runs, at least 1.

  Returns:
    `length` dicts `{key: value}`.

  Raises:
    errors.UserError: as `sweep`, and for a length below 1.
  """
  if length < 1:
    raise errors.UserError(f"fixed('{key}', ...): length must be at least 1, got {length}.")
  return sweep(key, [value] * length)


def product(sweeps: Sequence[Sweep]) -> Sweep:
  """Every combination of one run from each sweep; the last sweep varies fastest.

  Args:
    sweeps: sweeps over different keys. `product([])` is one run without overrides.

  Returns:
    The combined runs: as many as the product of the lengths.

  Raises:
    errors.UserError: if two sweeps set the same key, or one is not a sweep.
  """
  return [_merge(runs, 'product') for runs in itertools.product(*_checked(sweeps, 'product'))]


def zipit(sweeps: Sequence[Sweep]) -> Sweep:
  """Runs side by side: the first runs of all sweeps together, then the second ones, and so on.

  Args:
    sweeps: sweeps over different keys and of one length; a sweep of length 1 is repeated to the
      length of the others. `zipit([])` is one run without overrides.

  Returns:
    The combined runs: as many as the longest sweep has.

  Raises:
    errors.UserError: for unequal lengths, a key set twice, or something that is not a sweep.
  """
  checked = _checked(sweeps, 'zipit')
  lengths = [len(runs) for runs in checked]
  length = max(lengths, default=1)
  if any(n not in (1, length) for n in lengths):
    raise errors.UserError(
      f'zipit: the sweeps have unequal lengths {lengths}; allowed are equal lengths, or 1.'
    )
  columns = [runs * length if len(runs) == 1 else runs for runs in checked]
  return [_merge(runs, 'zipit') for runs in zip(*columns, strict=True)] if columns else [{}]


def chainit(sweeps: Sequence[Sweep]) -> Sweep:
  """The runs of the first sweep, then those of the second, and so on.

  Args:
    sweeps: one or more sweeps, over the same or different keys.

  Returns:
    The concatenated runs.

  Raises:
    errors.UserError: if there is no sweep at all, or something is not a sweep.
  """
  runs = [dict(run) for checked in _checked(sweeps, 'chainit') for run in checked]
  if not runs:
    raise errors.UserError('chainit: the list of sweeps is empty.')
  return runs


def expand(config: str) -> tuple[Sweep, int]:
  """The runs that the `get_hyper` of a config file describes.

  Args:
    config: path of the config file, as given to `--config`; a part after ':' is the argument of
      `get_config`, and of `get_hyper` if that takes a second argument.

  Returns:
    The runs without repetitions, and how many repetitions were left out (chained sweeps may
    overlap).

  Raises:
    errors.UserError: if the file or its `get_hyper` is missing, or returns no valid sweep.
  """
  path, _, argument = config.partition(':')
  get_hyper = _get_hyper(path)
  arguments = inspect.signature(get_hyper).parameters.values()
  positional = [p for p in arguments if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
  takes_argument = len(positional) > 1 and bool(argument)
  runs = get_hyper(_vocabulary(), *([argument] if takes_argument else []))
  runs = _checked([runs], f'get_hyper of {path}')[0]
  unique = {canonical(run): run for run in runs}
  return list(unique.values()), len(runs) - len(unique)


def canonical(overrides: Mapping[str, Any]) -> str:
  """One JSON text for equal overrides, whatever their order: `1` and `True` stay different."""
  return json.dumps(overrides, sort_keys=True)


def flag(key: str, value: Any) -> str:
  """The override as one command-line argument that ml_collections reads back, '--key=value'."""
  is_list = isinstance(value, (list, tuple))
  return f'--{key}={_tuples(value)!r}' if is_list else f'--{key}={value}'


def run_name(overrides: Mapping[str, Any], common: Mapping[str, Any]) -> str:
  """A readable, unique and stable directory name, e.g. 'method=losa,seed=1-9f86d081'.

  It depends on this run alone, not on the other runs of the sweep nor the order of keys.

  Args:
    overrides: the run's own overrides; they make the readable part.
    common: overrides that all runs share; they only enter the hash.

  Returns:
    The last parts of the keys with values (a path is cut to its stem), at most 100 characters,
    and the first 8 digits of the SHA-256 of all overrides.
  """
  return f'{readable(overrides, overrides) or "run"}-{digest({**common, **overrides})}'


def readable(overrides: Mapping[str, Any], keys: Iterable[str]) -> str:
  """Overrides in words: the last parts of keys with values, 'method=losa,seed=1'.

  Args:
    overrides: to be named.
    keys: all keys that a reader must tell apart.

  Returns:
    At most 100 characters that a folder's name can have; '' of no overrides.
  """
  keys = list(keys)
  parts = [f'{_label(key, keys)}={_short(overrides[key])}' for key in sorted(overrides)]
  return ','.join(parts)[:_NAME_LENGTH]


def digest(overrides: Mapping[str, Any]) -> str:
  """The first 8 digits of the SHA-256 of overrides, whatever their order."""
  return hashlib.sha256(canonical(overrides).encode()).hexdigest()[:8]


def _get_hyper(path: str) -> Callable[..., Any]:
  if not pathlib.Path(path).is_file():
    raise errors.UserError(f"No config file '{path}'.")
  spec = importlib.util.spec_from_file_location('_losa_scenic_sweep_config', path)
  if spec is None or spec.loader is None:
    raise errors.UserError(f"The config file '{path}' is not a Python file (*.py).")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not callable(getattr(module, 'get_hyper', None)):
    functions = sorted(name for name, value in vars(module).items() if inspect.isfunction(value))
    raise errors.UserError(
      f"The config file '{path}' defines no get_hyper(hyper), so there is nothing to sweep over."
      f' Functions it defines: {", ".join(functions) or "(none)"}.'
    )
  return module.get_hyper


def _vocabulary() -> types.SimpleNamespace:
  names = (sweep, fixed, product, zipit, chainit)
  return types.SimpleNamespace(**{function.__name__: function for function in names})


def _checked_key(key: str) -> str:
  if not isinstance(key, str) or not _KEY.fullmatch(key):
    hint = f" Did you mean 'config.{key}'?" if _KEY.fullmatch(f'config.{key}') else ''
    raise errors.UserError(f"A sweep key has the form 'config.NAME[.NAME...]', got {key!r}.{hint}")
  return key


def _checked_value(key: str, value: Any) -> Any:
  item = getattr(value, 'tolist', None)  # NumPy and JAX scalars and arrays.
  value = item() if callable(item) else value
  if isinstance(value, (list, tuple)):
    return [_checked_value(key, element) for element in value]
  if not isinstance(value, (bool, int, float, str)):
    raise errors.UserError(
      f"'{key}': a flag cannot carry {value!r} ({type(value).__name__}); allowed are bool, int,"
      ' float, str, and tuples of these. For a default of None, leave the key out.'
    )
  return value


def _checked(sweeps: Any, function: str) -> list[Sweep]:
  if not isinstance(sweeps, (list, tuple)):
    raise errors.UserError(f'{function}: expected a list of sweeps, got {type(sweeps).__name__}.')
  for runs in sweeps:
    is_sweep = isinstance(runs, (list, tuple)) and all(isinstance(run, dict) for run in runs)
    if not is_sweep or not runs:
      raise errors.UserError(
        f'{function}: {runs!r} is not a sweep, that is a non-empty list of dicts as sweep(),'
        ' fixed(), product(), zipit() and chainit() return.'
      )
  return [
    [{_checked_key(k): _checked_value(k, v) for k, v in run.items()} for run in runs]
    for runs in sweeps
  ]


def _merge(runs: Iterable[Overrides], function: str) -> Overrides:
  merged: Overrides = {}
  for run in runs:
    for key, value in run.items():
      if key in merged:
        raise errors.UserError(f"{function}: two sweeps set '{key}' in the same run.")
      merged[key] = value
  return merged


def _tuples(value: Any) -> Any:
  return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


def _label(key: str, keys: Iterable[str]) -> str:
  """The shortest end of `key`, in whole parts, that no other key shares."""
  parts = key.split('.')
  others = [other.split('.') for other in keys if other != key]
  for depth in range(1, len(parts)):
    if all(other[-depth:] != parts[-depth:] for other in others):
      return '.'.join(parts[-depth:])
  return key


def _short(value: Any) -> str:
  text = value if isinstance(value, str) else str(value)
  if '/' in text:
    text = pathlib.PurePosixPath(text).stem
  return re.sub(r'[^A-Za-z0-9.+-]+', '_', text).strip('_')[:_VALUE_LENGTH]
