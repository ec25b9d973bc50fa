"""Random access to labelled images or clips, the one interface that every data set stands behind.

A source says what is at a position, as it is stored: encoded bytes, a video file or pixels of any
size. Decoding, resizing, augmentation and batching are the pipeline's (`loader`, `dataset_utils`).
"""

import dataclasses
import errno
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from losa_scenic.common_lib import errors

if TYPE_CHECKING:
  from losa_scenic.dataset_lib.clip_files import Clip

# Errors that reading again does not mend; others (a stale NFS handle, EIO) may pass.
_LASTING = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR}
_LASTING |= {errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL}


class Record(NamedTuple):
  """One labelled image or clip.

  Attributes:
    image: of an image, an encoded file or pixels uint8 [h, w, 3], red first; of a clip, a `Clip` (a
      video file), its frames as encoded images, or pixels uint8 [t, h, w, 3].
    label: class id.
    id: its name in messages: a path, or a set and a position.
  """

  image: 'bytes | np.ndarray | Clip | Sequence[bytes]'
  label: int
  id: str


class BadImage(errors.UserError):
  """An image that cannot be read. In its place stands its neighbour (see `loader`).

  Attributes:
    id: the image's name.
    reason: what is wrong with it.
  """

  def __init__(self, id: str, reason: str) -> None:
    """Keeps both parts; the message is 'id: reason.'."""
    super().__init__(f'{id}: {reason}.')
    self.id, self.reason = id, reason

  def __reduce__(self):
    """Pickles with both parts: loader processes raise it too."""
    return type(self), (self.id, self.reason)


class Source(Protocol):
  """Labelled images by position. It must pickle: loader processes get a copy.

  Where the name of a record is known before it is read, `id(index)` gives it; see `name`.
  """

  def __len__(self) -> int:
    """Number of images."""
    ...

  def __getitem__(self, index: int) -> Record:
    """The image at a position in [0, len(self)); safe to call from several threads.

    Raises:
      BadImage: if this image cannot be had, while others may.
    """
    ...


@dataclasses.dataclass(frozen=True)
class Splits:
  """The three parts of a data set.

  Attributes:
    train: images to train on.
    valid: images to choose settings with; None if the set has none.
    test: images to report on.
    class_names: one name per class, in the order of the labels.
    about: what was found where, one short line each, for the start of a run.
    clips: whether the sources hold clips, not images.
    whole: whether the frames of a clip are just those of a window, none of which may be left out.
    sided: whether left and right tell classes apart, so that nothing may be mirrored.
  """

  train: Source
  valid: Source | None
  test: Source
  class_names: tuple[str, ...]
  about: tuple[str, ...] = ()
  clips: bool = False
  whole: bool = False
  sided: bool = False


class ArraySource:
  """Images held in memory as pixels.

  Attributes:
    images: uint8 [n, h, w, 3], or n arrays uint8 [h, w, 3] of different sizes; h, w >= 1.
    labels: int32 [n] in [0, num_classes).
    name: of the set; image i is 'name[i]'.
    numbers: the i of each image.
  """

  def __init__(
    self,
    images: np.ndarray | Sequence[np.ndarray],
    labels: Sequence[int] | np.ndarray,
    name: str,
    *,
    num_classes: int,
    numbers: Sequence[int] | np.ndarray | None = None,
  ) -> None:
    """Checks and keeps the arrays, without copying the images.

    Args:
      images: uint8 [n, h, w, 3], or n arrays uint8 [h, w, 3].
      labels: integers [n] in [0, num_classes).
      name: of the set, for messages.
      num_classes: number of classes.
      numbers: what to call the images instead of 0..n-1.

    Raises:
      errors.UserError: for a label out of range, naming the image.
      ValueError: for shapes or types that do not fit.
    """
    shapes = (
      [(images.dtype, images.shape[1:])]
      if isinstance(images, np.ndarray)
      else ((image.dtype, image.shape) for image in images)
    )
    for dtype, shape in shapes:
      if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise ValueError(f'Images must be uint8 [h, w, 3] with h, w >= 1, not {dtype} {shape}.')
    self.images, self.name = images, name
    self.numbers = np.arange(len(images)) if numbers is None else np.asarray(numbers)
    self.labels = checked_labels(
      labels, len(images), num_classes, lambda i: f'{name}[{self.numbers[i]}]'
    )

  def __len__(self) -> int:
    """Number of images."""
    return len(self.images)

  def id(self, index: int) -> str:
    """See `name`."""
    return f'{self.name}[{self.numbers[index]}]'

  def __getitem__(self, index: int) -> Record:
    """See `Source`."""
    return Record(self.images[index], int(self.labels[index]), self.id(index))


class FileSource:
  """Images in files, read each time they are asked for.

  Attributes:
    root: the folder that the files' names are relative to.
    files: the names.
    labels: int32 [n] in [0, num_classes).
  """

  def __init__(
    self,
    root: str | os.PathLike[str],
    files: Sequence[str],
    labels: Sequence[int] | np.ndarray,
    *,
    num_classes: int,
  ) -> None:
    """Keeps the names; opens nothing.

    Args:
      root: a folder.
      files: n names relative to it, with '/'.
      labels: integers [n] in [0, num_classes).
      num_classes: number of classes.

    Raises:
      errors.UserError: for a label out of range or a file outside `root`, naming the file.
    """
    self.root, self.files = pathlib.Path(root), list(files)
    for file in self.files:
      check_inside(file, self.root)
    self.labels = checked_labels(labels, len(self.files), num_classes, lambda i: self.files[i])

  def __len__(self) -> int:
    """Number of files."""
    return len(self.files)

  def id(self, index: int) -> str:
    """See `name`."""
    return os.path.join(self.root, self.files[index])

  def __getitem__(self, index: int) -> Record:
    """See `Source`."""
    path = self.id(index)
    try:
      return Record(read_file(path), int(self.labels[index]), path)
    except OSError as error:
      raise BadImage(path, f'cannot be read ({error.strerror})') from error


class Subset:
  """Some images of a source, in a given order."""

  def __init__(self, source: Source, indices: Sequence[int] | np.ndarray) -> None:
    """Keeps the source and the positions.

    Args:
      source: any source.
      indices: integers [n] in [0, len(source)).

    Raises:
      IndexError: for positions out of range.
    """
    self.source, self.indices = source, np.asarray(indices, np.int64)
    if len(self.indices) and not 0 <= self.indices.min() <= self.indices.max() < len(source):
      raise IndexError(f'Positions must lie in [0, {len(source)}).')

  def __len__(self) -> int:
    """Number of images."""
    return len(self.indices)

  def id(self, index: int) -> str | None:
    """See `name`."""
    return name(self.source, int(self.indices[index]))

  def __getitem__(self, index: int) -> Record:
    """See `Source`."""
    return self.source[int(self.indices[index])]


class Concat:
  """Several sources, one after another, e.g. training and validation images."""

  def __init__(self, parts: Sequence[Source]) -> None:
    """Keeps the parts; nothing is copied.

    Args:
      parts: at least one source.

    Raises:
      ValueError: without parts.
    """
    if not parts:
      raise ValueError('Concat needs at least one source.')
    self.parts = tuple(parts)
    self._starts = np.cumsum([0] + [len(part) for part in self.parts])

  def __len__(self) -> int:
    """Number of images."""
    return int(self._starts[-1])

  def id(self, index: int) -> str | None:
    """See `name`."""
    part, within = self._place(index)
    return name(part, within)

  def __getitem__(self, index: int) -> Record:
    """See `Source`."""
    part, within = self._place(index)
    return part[within]

  def _place(self, index: int) -> tuple[Source, int]:
    """The part that a position lies in, and where in it."""
    if not 0 <= index < len(self):
      raise IndexError(f'Positions must lie in [0, {len(self)}).')
    part = int(np.searchsorted(self._starts, index, side='right')) - 1
    return self.parts[part], index - int(self._starts[part])


def name(source: Source, index: int) -> str | None:
  """The id of the record at a position, without reading it.

  Args:
    source: any source.
    index: in [0, len(source)).

  Returns:
    `source[index].id` where the source has a method `id` that knows it; None elsewhere.
  """
  known = getattr(source, 'id', None)
  return None if known is None else known(index)


def read_file(path: str | os.PathLike[str]) -> bytes:
  """The bytes of a file; tried once more after an error that may pass, as of a network disk.

  Raises:
    OSError: if it cannot be read.
  """
  try:
    return _read_once(path)
  except OSError as error:
    if error.errno in _LASTING:
      raise
  return _read_once(path)


def _read_once(path: str | os.PathLike[str]) -> bytes:
  with open(path, 'rb') as file:
    return file.read()


def check_inside(file: str, root: str | os.PathLike[str]) -> None:
  """Raises `UserError` if a file's name leads out of the folder it is relative to."""
  if os.path.isabs(file) or '..' in file.replace('\\', '/').split('/') or '\0' in file:
    raise errors.UserError(f'{file!r}: a path outside of {root} is refused.')


def checked_labels(
  labels: Sequence[int] | np.ndarray,
  count: int,
  num_classes: int,
  name_of: Callable[[int], str],
) -> np.ndarray:
  """Labels as int32 [count].

  Args:
    labels: integers [count].
    count: number of images.
    num_classes: the labels must lie in [0, num_classes).
    name_of: position -> name of the image, for messages.

  Raises:
    errors.UserError: for a label out of range, naming the image.
    ValueError: if they are not `count` integers.
  """
  labels = np.asarray(labels, dtype=None if len(labels) else np.int32)
  if labels.shape != (count,) or labels.dtype.kind not in 'iu':
    raise ValueError(f'{count} images need as many integers, not {labels.dtype} {labels.shape}.')
  wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
  if len(wrong):
    raise errors.UserError(
      f'{name_of(wrong[0])}: label {labels[wrong[0]]} is outside 0..{num_classes - 1} '
      f'({num_classes} classes).'
    )
  return labels.astype(np.int32)
