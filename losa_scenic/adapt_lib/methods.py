"""The only place that knows all methods by name."""

from collections.abc import Callable, Mapping
from typing import Any

from losa_scenic.adapt_lib import (
  adapter,
  adapter_plus,
  adaptformer,
  convpass,
  dora,
  dtl,
  express,
  fact,
  head2toe,
  hst,
  last,
  lora,
  losa,
  lst,
  noah,
  prefix,
  repadapter,
  res_tuning,
  res_tuning_bypass,
  selective,
  ssf,
  st_adapter,
  temporal,
  toast,
  union,
  vera,
  vpt,
)
from losa_scenic.adapt_lib.method import Method
from losa_scenic.common_lib import config as config_lib
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Config
from losa_scenic.model_lib.spec import BackboneSpec

METHODS: dict[str, Callable[..., Method]] = {
  'adapter': adapter.build,
  'adapter_plus': adapter_plus.build,
  'adaptformer': adaptformer.build,
  'attention_only': selective.attention_only,
  'bitfit': selective.bitfit,
  'convpass': convpass.build,
  'convpass_attn': convpass.build_attn,
  'dora': dora.build,
  'dtl': dtl.build,
  'express': express.build,
  'fact_tk': fact.tk,
  'fact_tt': fact.tt,
  'full': selective.full,
  'head2toe': head2toe.build,
  'hst': hst.build,
  'last': last.build,
  'last_k': selective.last_k,
  'linear': selective.linear,
  'lora': lora.build,
  'losa': losa.build,
  'lst': lst.build,
  'mlp_only': selective.mlp_only,
  'noah': noah.build,
  'prefix': prefix.build,
  'prompt_accumulate': vpt.accumulate,
  'repadapter': repadapter.build,
  'res_tuning': res_tuning.build,
  'res_tuning_bypass': res_tuning_bypass.build,
  'ssf': ssf.build,
  'st_adapter': st_adapter.build,
  'temporal': temporal.build,
  'toast': toast.toast,
  'toast_lite': toast.toast_lite,
  'vera': vera.build,
  'vpt_deep': vpt.deep,
  'vpt_shallow': vpt.shallow,
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
  for key, block in options.items():
    errors.one_of(f"part of method '{name}'", key, names)
    if not isinstance(block, Mapping):
      raise errors.UserError(f"The options of '{key}' must be a mapping, not {block!r}.")
  return union.union({part: _build(part, spec, options.get(part)) for part in names})


def options(config: Config) -> dict[str, Any]:
  """The options that a run's config (fields: method, method_configs) gives to its method.

  Of several methods: {method: its options}. Options left at None are not among them.
  """
  names, blocks = parts(config.method), config.get('method_configs') or {}
  given = {name: config_lib.to_dict(blocks.get(name)) for name in names}
  return given if '+' in config.method else next(iter(given.values()))


def from_text(name: str, given: Mapping[str, str]) -> dict[str, Any]:
  """Options as a command line gives them -> as `build` takes them.

  Args:
    name: a method, or several joined by '+'.
    given: {option: value as text}; of several methods {'lora.rank': '4'}, which becomes {'lora':
      {'rank': 4}}.

  Raises:
    errors.UserError: for an option of several methods that does not say whose it is, or a text that
      is no value of the option's type.
  """
  names = parts(name)
  blocks: dict[str, Any] = {}
  for key, text in given.items():
    part, dot, option = key.partition('.') if len(names) > 1 else (name, '.', key)
    first = next(iter(names))
    if not dot:
      raise errors.UserError(f"'{key}': say whose option it is, e.g. '{first}.{key}'.")
    errors.one_of(f"part of method '{name}'", part, names)
    value = config_lib.from_text(METHODS[part], option, text)
    blocks.setdefault(part, {})[option] = value
  return blocks if len(names) > 1 else blocks.get(name, {})


def _build(name: str, spec: BackboneSpec, options: Mapping[str, Any] | None) -> Method:
  return config_lib.build(METHODS[name], spec, block=options, what=f"method '{name}'")
