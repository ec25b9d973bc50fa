"""The elements of large JSON arrays one at a time: a gigabyte of annotations is never in memory."""

import json
import os
from collections.abc import Iterator
from typing import Any, TextIO

from losa_scenic.common_lib import errors

# Characters read at a time, and the most that one element may have.
_CHUNK = 1 << 20
_LARGEST = 1 << 26


def elements(file: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
  """Reads the arrays at the top of a JSON file.

  Args:
    file: UTF-8 text: an object, whose values that are no arrays are skipped, or one array.

  Yields:
    (key of the array, element) in the order of the file; of a file that is an array, key ''.

  Raises:
    errors.UserError: naming the file and the character that is wrong.
  """
  try:
    with open(file, encoding='utf-8-sig') as stream:
      reader = _Reader(file, stream)
      if reader.peek() == '[':
        for element in reader.array():
          yield '', element
      else:
        for key in reader.object():
          if reader.peek() != '[':
            reader.value()
            continue
          for element in reader.array():
            yield key, element
      if reader.peek():
        raise reader.error('there is more after the end')
  except (OSError, UnicodeDecodeError) as error:
    raise errors.UserError(f'{file}: cannot be read as UTF-8 text ({error}).') from error


class _Reader:
  """JSON values from a stream that is read in chunks."""

  def __init__(self, name: str | os.PathLike[str], stream: TextIO) -> None:
    self._name, self._stream = name, stream
    # The stream from character `_before` on, as far as it is read, and the position in it.
    self._text, self._at, self._before = '', 0, 0
    self._decode = json.JSONDecoder().raw_decode

  def error(self, reason: str) -> errors.UserError:
    at = self._before + self._at
    return errors.UserError(f'{self._name}: not valid JSON at character {at} ({reason}).')

  def peek(self) -> str:
    """The next character that is no space, or '' at the end."""
    while True:
      while self._at < len(self._text):
        if self._text[self._at] not in ' \t\r\n':
          return self._text[self._at]
        self._at += 1
      if not self._more():
        return ''

  def take(self, allowed: str) -> str:
    """Moves past the next character, which must be one of `allowed`."""
    char = self.peek()
    if not char or char not in allowed:
      raise self.error(f'one of {" ".join(allowed)} is missing')
    self._at += 1
    return char

  def value(self) -> Any:
    """Moves past the next value."""
    self.peek()
    while True:
      try:
        value, end = self._decode(self._text, self._at)
      except (ValueError, RecursionError) as error:  # Numbers of 4,301 digits are ValueErrors.
        if len(self._text) - self._at < _LARGEST and self._more():
          continue
        raise self.error(str(error)) from error
      # At the end of what is read, a number may go on.
      if end == len(self._text) and self._more():
        continue
      self._at = end
      return value

  def object(self) -> Iterator[str]:
    """The keys of an object; after each, the caller moves past its value."""
    self.take('{')
    if self.peek() == '}':
      self.take('}')
      return
    while True:
      key = self.value()
      if not isinstance(key, str):
        raise self.error('a key must be a string')
      self.take(':')
      yield key
      if self.take(',}') == '}':
        return

  def array(self) -> Iterator[Any]:
    """The elements of an array."""
    self.take('[')
    if self.peek() == ']':
      self.take(']')
      return
    while True:
      yield self.value()
      if self.take(',]') == ']':
        return

  def _more(self) -> bool:
    """Reads on, more where more is unread; False at the end."""
    unread = self._text[self._at :]
    chunk = self._stream.read(max(_CHUNK, len(unread)))
    self._text, self._before, self._at = unread + chunk, self._before + self._at, 0
    return bool(chunk)
