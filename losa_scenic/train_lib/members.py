"""Who is in a population: `config.population` in words, as lists of overrides, and as names.

A population is a sweep in one run, and its words are those of sweeps. A text

  method_configs.losa.rank=4|8|16 rng_seed=0|1; method=linear

is the product of the values of each key (here six members), and then what follows the ';'. Keys are
those of the config; a leading 'config.' may stand. A list of texts is their chain, and a dict of a
list is one member as `get_hyper` gives it, {'config.method_configs.losa.rank': 4}.
"""

import ast
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from losa_scenic.bench_lib import hyper
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Config

# Fields and blocks in which members may differ: what comes after the backbone. Everything else
# concerns the pass that they share, or the loop around it.
MAY_DIFFER = (
  'label_smoothing',
  'lr_configs',
  'max_grad_norm',
  'method',
  'method_configs',
  'method_learning_rates',
  'optimizer',
  'optimizer_configs',
  'rng_seed',
)
_PREFIX = 'config.'


def parse(population: Any, schema: Config) -> list[dict[str, Any]] | None:
  """The overrides of each member, by keys without 'config.'.

  What it returns may be given again, and stays the same.

  Args:
    population: a text, or a list or tuple of texts and dicts; None or '' for no population.
    schema: `run_config.default_config()`: the types of fields.

  Returns:
    At least one dict, all different; None for no population.

  Raises:
    errors.UserError: for anything else, for an unknown field, one that members must share, a value
      that no command line could give, or a member that is given twice.
  """
  if population is None or population == '':
    return None
  parts = [population] if isinstance(population, (str, Mapping)) else population
  if not isinstance(parts, (list, tuple)) or not parts:
    raise errors.UserError(
      "population takes a text like 'method_configs.losa.rank=4|8 rng_seed=0|1; method=linear', or "
      f'a list of texts and of dicts, a member each; not {population!r}.'
    )
  members = [_typed(member, schema) for part in parts for member in _members(part)]
  seen: dict[str, int] = {}
  for number, member in enumerate(members, start=1):
    other = seen.setdefault(hyper.canonical(member), number)
    if other != number:
      raise errors.UserError(f'population: members {other} and {number} are the same: {member}.')
  return members


def names(members: Sequence[Mapping[str, Any]]) -> list[str]:
  """A name for each member: 'rank=8', 'method=dtl,rng_seed=1'.

  It is made of those overrides that not all have in common. Names are different, begin with a
  key and '=', and can be names of folders.
  """
  given = [{f'{_PREFIX}{key}': value for key, value in member.items()} for member in members]
  keys = list(dict.fromkeys(key for member in given for key in member))
  same = {k for k in keys if len({hyper.canonical({k: m[k]} if k in m else {}) for m in given}) < 2}
  if len(given) == 1:
    same = set()
  found: list[str] = []
  for member in given:
    own = {key: value for key, value in member.items() if key not in same} or member
    name = hyper.readable(own, set(keys) - same or keys) or 'overrides=none'
    if name in found:
      name += f'-{hyper.digest(member)}'
    found.append(name)
  return found


def apply(config: Mapping[str, Any], member: Mapping[str, Any]) -> dict[str, Any]:
  """A config's fields, as nested dicts, with the overrides of a member; no population is left."""
  changed: dict[str, Any] = _copied(config)
  changed['population'] = None
  for key, value in member.items():
    *blocks, field = key.split('.')
    place: Any = changed
    for block in blocks:
      place = place.setdefault(block, {})
    place[field] = value
  return changed


def flags(member: Mapping[str, Any]) -> dict[str, Any]:
  """The overrides as a sweep writes them into its results: {'config.rng_seed': 1}."""
  return {f'{_PREFIX}{key}': value for key, value in member.items()}


def may_differ(key: str) -> bool:
  """Whether the members of a population may have different values of 'config.KEY' or 'KEY'."""
  return key.removeprefix(_PREFIX).partition('.')[0] in MAY_DIFFER


def _members(part: Any) -> hyper.Sweep:
  """One part of a chain."""
  if isinstance(part, str):
    groups = [_product(group.split()) for group in part.split(';') if group.strip()]
    if not groups:
      raise errors.UserError(f'population: there is no member in {part!r}.')
    return hyper.chainit(groups)
  if isinstance(part, Mapping):
    return hyper.product([hyper.fixed(_flag(key), value) for key, value in part.items()])
  raise errors.UserError(f'population: a member is a text or a dict of overrides, not {part!r}.')


def _product(words: Sequence[str]) -> hyper.Sweep:
  sweeps = []
  for word in words:
    key, equals, values = word.partition('=')
    if not key or not equals or not all(values.split('|')):
      raise errors.UserError(
        f"population: '{word}' must have the form KEY=VALUE or KEY=VALUE|VALUE, without spaces."
      )
    sweeps.append(hyper.sweep(_flag(key), values.split('|')))
  return hyper.product(sweeps)


def _flag(key: Any) -> Any:
  return f'{_PREFIX}{key.removeprefix(_PREFIX)}' if isinstance(key, str) else key


def _typed(member: Mapping[str, Any], schema: Config) -> dict[str, Any]:
  """Overrides by keys without 'config.', with values of the fields' types as far as they have it.

  Raises:
    errors.UserError: for a field that is unknown or not a member's own.
  """
  typed = {}
  for flag, value in member.items():
    key = flag.removeprefix(_PREFIX)
    if not may_differ(key):
      raise _common(key, schema)
    typed[key] = _value(value, _type(key, schema))
  return typed


def _common(key: str, schema: Config) -> errors.UserError:
  first = key.partition('.')[0]
  if first not in schema:
    near = [name for name in _paths(schema) if may_differ(name) and name.endswith(f'.{key}')]
    if near:
      return errors.UserError(
        f"population: unknown field '{key}'. Say it in full: {', '.join(sorted(near))}."
      )
    return errors.unknown('field of a population', key, MAY_DIFFER)
  why = ' It is the order of the batches, which all see.' if first == 'shuffle_seed' else ''
  return errors.UserError(
    f"population: '{key}' must be the same for all members, who see the same batches through one "
    f'pass of one backbone: give it for the run.{why} Members may differ in '
    f'{", ".join(MAY_DIFFER)}.'
  )


def _type(key: str, schema: Config) -> type:
  block, done = schema, ''
  *blocks, field = key.split('.')
  for name in blocks:
    if name not in block:
      raise errors.unknown('field of a population', done + name, (done + known for known in block))
    block, done = block[name], f'{done}{name}.'
    if not isinstance(block, ml_collections.ConfigDict):
      raise errors.UserError(f"population: '{done[:-1]}' is a value, not a block of fields.")
  if field not in block:
    raise errors.unknown('field of a population', key, (done + known for known in block))
  if isinstance(block[field], ml_collections.ConfigDict):
    raise errors.UserError(f"population: '{key}' is a block: name a field of it.")
  return block.get_type(field)


def _value(value: Any, kind: type) -> Any:
  """A value that a text may have given, in a field's type if it can be one."""
  if kind is str and type(value) in (int, float):
    return str(value)
  if kind is str or not isinstance(value, str):
    return value
  try:
    found = ast.literal_eval(value.capitalize() if value in ('true', 'false') else value)
  except (SyntaxError, ValueError):
    return value
  return list(found) if isinstance(found, tuple) else found


def _paths(block: Config, prefix: str = '') -> list[str]:
  paths = []
  for key in block:
    inner = isinstance(block[key], ml_collections.ConfigDict)
    paths += _paths(block[key], f'{prefix}{key}.') if inner else [prefix + key]
  return paths


def _copied(block: Mapping[str, Any]) -> dict[str, Any]:
  return {
    key: _copied(value) if isinstance(value, Mapping) else value for key, value in block.items()
  }
