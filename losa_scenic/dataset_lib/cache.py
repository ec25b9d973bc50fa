"""Decoded images in memory."""

import threading

import numpy as np

_LARGEST = 16  # an entry of its own size takes at most this part of all room
# One for all: loaders are pickled, and locks cannot be.
_LOCK = threading.Lock()


class Cache:
  """Decoded images, kept the first time they are made; safe for threads.

  Images of one size are kept in one array, for whole batches at once, if all of them have room;
  others one by one, as long as there is room.
  """

  def __init__(self, count: int, image_size: int | None, max_bytes: int) -> None:
    """Keeps nothing yet.

    Args:
      count: number of images.
      image_size: side of all images in pixels; None if they differ.
      max_bytes: at most this much is kept.
    """
    self.labels = np.zeros(count, np.int32)
    self._size, self._room, self._largest = image_size, max_bytes, max_bytes // _LARGEST
    self._images: np.ndarray | dict[int, np.ndarray] = {}
    self._kept = np.zeros(count, bool)
    self._off = image_size is not None and count * image_size**2 * 3 > max_bytes

  def get(self, index: int) -> tuple[np.ndarray | None, int]:
    """What was kept (not to be written to), and the label; None if nothing was."""
    if not self._kept[index]:
      return None, 0
    return self._images[index], int(self.labels[index])

  def reserve(self, size: int) -> bool:
    """Sets so many bytes apart for one entry, before it is made; False if there is no room.

    Not for images of one size. What was set apart is either `put` or given back by `release`. No
    entry may take more than one part in `_LARGEST` of all room.
    """
    with _LOCK:
      if size > self._room or size > self._largest:
        return False
      self._room -= size
      return True

  def release(self, size: int) -> None:
    """Gives back what was set apart."""
    with _LOCK:
      self._room += size

  def put(self, index: int, image: np.ndarray, label: int, *, reserved: int = 0) -> None:
    """Keeps an image uint8 [h, w, 3], or frames [t, h, w, 3], and its label if there is room.

    Args:
      index: its position.
      image: not written to any more.
      label: its class id.
      reserved: bytes that were set apart for it.
    """
    if self._off:
      return
    with _LOCK:
      self._room += reserved
      if self._kept[index]:
        return
      if self._size is None:
        if image.nbytes > self._room:
          return
        self._room -= image.nbytes
      elif not isinstance(self._images, np.ndarray):
        self._images = np.empty((len(self._kept), self._size, self._size, 3), np.uint8)
      self._images[index], self.labels[index] = image, label
      self._kept[index] = True

  def gather(self, indices: np.ndarray) -> np.ndarray | None:
    """The images [b, s, s, 3] as a new array if all are there."""
    if not isinstance(self._images, np.ndarray) or not self._kept[indices].all():
      return None
    # `take` copies rows three times as fast as `images[indices]`.
    return self._images.take(indices, axis=0)
