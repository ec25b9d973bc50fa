"""Whether a source holds the images or clips that it held before, without reading all of them."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from losa_scenic.dataset_lib import clip_files, frame_sampling, playback, sources

# Names that are joined at a time.
_CHUNK = 1 << 16
# What is read of both ends of a video file, in bytes: reading all of it would take long.
_END = 1 << 16


def fingerprint(source: sources.Source) -> str:
  """A text that is the same for the same images and labels in the same order.

  Told are: the number of images; names (files relative to their folder, which may move) and labels
  where the source has them at hand, and the segments of clips; the positions of a subset and the
  parts of a concatenation; and of the first, middle and last image the label and the content, of a
  video file its size and its ends. Another image elsewhere with the same name and label is not
  noticed.

  Args:
    source: any source; at most three of its images are read, and of each source that it is made of.

  Returns:
    32 hexadecimal digits.
  """
  return _digest(source, {}).hex()


def _digest(source: sources.Source, known: dict[int, bytes]) -> bytes:
  """16 bytes; `known` holds those of sources by id, since parts often share one."""
  if id(source) not in known:
    hashed = hashlib.blake2b(digest_size=16)
    for content in _contents(source, known):
      # With their lengths, so that no two lists of contents run together to the same bytes.
      hashed.update(len(content).to_bytes(8, 'little'))
      hashed.update(content)
    known[id(source)] = hashed.digest()
  return known[id(source)]


def _contents(source: sources.Source, known: dict[int, bytes]) -> Iterator[bytes]:
  count = len(source)
  yield str(count).encode()
  if isinstance(source, sources.Subset):
    yield b'subset'
    yield _digest(source.source, known)
    yield _integers(source.indices)
  elif isinstance(source, sources.Concat):
    yield b'concat'
    for part in source.parts:
      yield _digest(part, known)
  else:
    if isinstance(source, playback.Playback):
      yield b'playback'
      yield _digest(source.source, known)
    if isinstance(source, sources.FileSource):
      yield b'files'
      for start in range(0, count, _CHUNK):
        # No name has a zero in it, and any text that JSON can hold may be one.
        yield '\0'.join(source.files[start : start + _CHUNK]).encode('utf-8', 'surrogatepass')
    labels = getattr(source, 'labels', None)
    if labels is not None:
      yield b'labels'
      yield _integers(labels)
    segments = getattr(source, 'segments', None)
    if segments is not None:
      yield b'segments'
      yield _seconds(segments)
  for index in (0, count // 2, count - 1) if count else ():
    yield from _record(source, index)


def _record(source: sources.Source, index: int) -> Iterator[bytes]:
  try:
    image, label, _ = source[index]
  except sources.BadImage as error:
    yield b'bad'
    yield error.reason.encode('utf-8', 'surrogatepass')
    return
  yield str(label).encode()
  if isinstance(image, np.ndarray):
    yield str((image.shape, image.dtype.str)).encode()
    yield image.tobytes()
  elif isinstance(image, clip_files.Clip):
    yield b'clip'
    yield _seconds([image.segment])
    yield from _ends(image.path)
  elif isinstance(image, bytes):
    yield image
  else:
    yield b'frames'
    yield str(len(image)).encode()
    yield from image


def _ends(path: str) -> Iterator[bytes]:
  """Size, beginning and end of a file, which may move."""
  try:
    with open(path, 'rb') as file:
      size = os.fstat(file.fileno()).st_size
      yield str(size).encode()
      yield file.read(_END)
      file.seek(max(0, size - _END))
      yield file.read(_END)
  except OSError as error:
    yield b'bad'
    yield (error.strerror or '').encode()


def _seconds(segments: Sequence[frame_sampling.Segment]) -> bytes:
  ends = [(start, np.inf if end is None else end) for start, end in segments]
  return np.asarray(ends, '<f8').tobytes()


def _integers(values: Any) -> bytes:
  return np.asarray(values, '<i8').tobytes()
