"""The one exception for mistakes a user can mend, and its most frequent wording."""

import difflib
import numbers
from collections.abc import Iterable


class UserError(ValueError):
  """Bad input that the user can correct: entry points print it as one message, no traceback.

  Attributes:
    exit_code: of the command that it ends.
  """

  exit_code = 1


def unknown(kind: str, given: str, allowed: Iterable[str]) -> UserError:
  """An error that names what was given, the nearest match and everything that is allowed.

  Args:
    kind: what is being named, e.g. 'dataset' or 'config key'.
    given: the name that is not known.
    allowed: the known names.

  Returns:
    The error, for the caller to raise.
  """
  names = sorted(str(name) for name in allowed)
  near = difflib.get_close_matches(str(given), names, n=1, cutoff=0.5)
  hint = f" Did you mean '{near[0]}'?" if near else ''
  return UserError(f"Unknown {kind} '{given}'.{hint} Known: {', '.join(names) or '(none)'}.")


def check_at_least(option: str, value: int, least: int) -> None:
  """Raises `UserError` unless `value` is an integer of at least `least`, naming the option."""
  if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
    raise UserError(f'{option} must be an integer of at least {least}, not {value!r}.')


def one_of(kind: str, given: str, allowed: Iterable[str]) -> str:
  """Returns `given` if it is one of `allowed`, else raises the error of `unknown`."""
  allowed = tuple(allowed)
  if given not in allowed:
    raise unknown(kind, given, allowed)
  return given
