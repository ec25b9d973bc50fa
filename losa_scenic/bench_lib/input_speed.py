"""How fast JPEG files become training batches, next to other loaders, at what quality.

All loaders read the same files, cut the same boxes (random resized crops of 8 to 100 % of the area)
and mirror the same images, in one process, a pass of each in turn. Per core is images per second of
CPU time, all threads together. Quality is the mean PSNR of the images of a pass against the exact
result: the box of the fully decoded image, filtered in float64 and not rounded. Filters differ in
taste, so there are two, `area` (the mean over each new pixel's square) and `lanczos` (3 lobes): a
loader that leaves detail out or lets it alias is far from both. This package's loader decodes large
files at 1/2, 1/4 or 1/8 of their size and rounds the box outward to whole pixels of that, a crop as
random as the one drawn; so of a large box the nearest of its roundings counts, for all loaders.
"""

import contextlib
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import NamedTuple

import numpy as np

from losa_scenic.bench_lib import input_loaders, input_photos
from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import decode, resize, sources

# width, height, number of files: of ImageNet, larger, and as of a phone.
PHOTOS = ((500, 375, 256), (800, 600, 128), (2000, 1500, 32))
# Of a user's folder, in the order of the names.
MAX_FILES = 1000
_QUALITY_IMAGES = 64


class Row(NamedTuple):
  """What was measured of one loader.

  Attributes:
    per_cpu_second: images per second of CPU time, of each round.
    per_second: images per second of wall time, of each round.
    area: mean PSNR in dB against exact area means.
    lanczos: the same against an exact Lanczos filter.
  """

  per_cpu_second: list[float]
  per_second: list[float]
  area: float
  lanczos: float


def report(
  root: str | None, rounds: int, batch_size: int, image_size: int, cores: int
) -> Iterator[str]:
  """Measures all loaders that can be imported, and says so in markdown.

  Args:
    root: folder with JPEG files at any depth; None for photos of three sizes.
    rounds: passes of each loader.
    batch_size: images of a batch.
    image_size: side of the result in pixels.
    cores: that this process may use from now on.

  Yields:
    Paragraphs, each as soon as it is known.

  Raises:
    errors.UserError: for numbers out of range and a folder without JPEG files.
  """
  for name, value in (('rounds', rounds), ('batch-size', batch_size), ('image-size', image_size)):
    if value < 1:
      raise errors.UserError(f'--{name} must be at least 1, not {value}.')
  use_cores(cores)
  makers, lacks = input_loaders.all_loaders()
  input_loaders.limit_threads(cores)
  yield '  \n'.join([_versions(), *(f'Left out: {lack}' for lack in lacks)])
  with tempfile.TemporaryDirectory() as folder:
    for title, source in _sources(root, pathlib.Path(folder)):
      work = input_loaders.work(source, batch_size, image_size, cores)
      size = sum(os.path.getsize(path) for path in work.paths) / len(work.paths)
      title = f'{title}, {len(work.paths)} files of {size / 1000:.0f} kB, to {image_size} px'
      rows = measure(work, makers, rounds)
      yield table(f'{title}; cores: {cores}, rounds: {rounds}', rows)


def _versions() -> str:
  packages = ('opencv-python-headless', 'pillow', 'torchvision', 'tensorflow', 'tensorflow-cpu')
  found = []
  for package in packages:
    with contextlib.suppress(metadata.PackageNotFoundError):
      found.append(f'{package} {metadata.version(package)}')
  return ', '.join(found)


def use_cores(cores: int) -> None:
  """Keeps this process on that many of its cores; threads that it starts later too.

  Raises:
    errors.UserError: if there are not so many, or the system cannot do it.
  """
  if not hasattr(os, 'sched_setaffinity'):
    raise errors.UserError('This system cannot keep a process on some cores: measure on Linux.')
  mine = sorted(os.sched_getaffinity(0))
  if not 1 <= cores <= len(mine):
    raise errors.UserError(f'--cores must be in 1..{len(mine)}, not {cores}.')
  os.sched_setaffinity(0, mine[:cores])


def measure(
  work: input_loaders.Work, makers: dict[str, input_loaders.Maker], rounds: int
) -> dict[str, Row]:
  """Runs every loader `rounds` times in turn, after a pass of each that is not timed.

  Args:
    work: what is to be loaded.
    makers: name -> loader.
    rounds: passes of each.
  """
  passes = {name: make(work) for name, make in makers.items()}
  quality = _Quality(work)
  scores = {name: quality.of(batches()) for name, batches in passes.items()}
  speeds = {name: ([], []) for name in passes}
  names = list(passes)
  for number in range(rounds):
    first = number % len(names)  # So that none always follows the same other one.
    for name in names[first:] + names[:first]:
      cpu, wall = _timed(passes[name])
      speeds[name][0].append(len(work.source) / cpu)
      speeds[name][1].append(len(work.source) / wall)
  return {name: Row(*speeds[name], *scores[name]) for name in names}


def _timed(batches: input_loaders.Pass) -> tuple[float, float]:
  """Seconds of CPU and of wall time of a pass."""
  cpu, wall = time.process_time(), time.perf_counter()
  for _ in batches():
    pass
  return time.process_time() - cpu, time.perf_counter() - wall


class _Quality:
  """PSNR of a pass against the exact results, which are made once."""

  def __init__(self, work: input_loaders.Work) -> None:
    self._count = min(len(work.source), _QUALITY_IMAGES)
    # Of each image, for each box that may be shown: by area and by Lanczos.
    self._exact: list[list[tuple[np.ndarray, np.ndarray]]] = []
    for i in range(self._count):
      record = work.source[i]
      assert isinstance(record.image, bytes)
      image = decode.decode(record.image, record.id)
      self._exact.append([])
      for box in roundings(work.boxes[i], image.shape, work.image_size):
        part = image[box.top : box.top + box.height, box.left : box.left + box.width]
        part = part[:, ::-1] if work.flips[i] else part
        exact = [exact_resize(part, work.image_size, weights) for weights in (area, lanczos)]
        self._exact[i].append((exact[0], exact[1]))

  def of(self, batches: Iterator[input_loaders.Batch]) -> tuple[float, float]:
    """Mean PSNR in dB against area and Lanczos."""
    found = []
    for positions, images in batches:
      for position, image in zip(positions, images, strict=True):
        if position < self._count:
          scores = [tuple(psnr(image, e) for e in exact) for exact in self._exact[position]]
          found.append(max(scores))
    by_area, by_lanczos = np.mean(found, axis=0)
    return float(by_area), float(by_lanczos)


def roundings(box: resize.Box, shape: tuple[int, ...], image_size: int) -> list[resize.Box]:
  """A box as it is, and rounded outward to whole pixels of a reduced image.

  Args:
    box: a part of the image.
    shape: of the image, (height, width, ..).
    image_size: reductions that leave fewer pixels of the box than this are not made.
  """
  boxes = []
  for r in (1, *sorted(decode.REDUCTIONS)):
    if r == 1 or r * image_size <= min(box.height, box.width):
      top, left = box.top // r * r, box.left // r * r
      bottom = min(shape[0], -(-(box.top + box.height) // r) * r)
      right = min(shape[1], -(-(box.left + box.width) // r) * r)
      boxes.append(resize.Box(top, left, bottom - top, right - left))
  return boxes


def psnr(image: np.ndarray, exact: np.ndarray) -> float:
  """Peak signal-to-noise ratio in dB of uint8 [h, w, 3] against float64 [h, w, 3] in 0..255."""
  error = np.mean((image.astype(np.float64) - np.clip(exact, 0, 255)) ** 2)
  return float(10 * np.log10(255**2 / max(error, 1e-10)))


def exact_resize(
  image: np.ndarray, size: int, weights: Callable[[int, int], np.ndarray]
) -> np.ndarray:
  """float64 [size, size, 3] of uint8 [h, w, 3]: rows and columns filtered one after another."""
  height, width = image.shape[:2]
  rows, columns = weights(height, size), weights(width, size)
  return np.einsum('ih,hwc,jw->ijc', rows, image.astype(np.float64), columns, optimize=True)


def area(given: int, wanted: int) -> np.ndarray:
  """The share [wanted, given] of each old pixel in each new one, by overlap; grown, `lanczos`."""
  if given < wanted:
    return lanczos(given, wanted)
  edges = np.arange(wanted + 1) * given / wanted
  old = np.arange(given)
  overlap = np.minimum(old + 1, edges[1:, None]) - np.maximum(old, edges[:-1, None])
  return np.maximum(overlap, 0) * wanted / given


def lanczos(given: int, wanted: int) -> np.ndarray:
  """The same [wanted, given] by a Lanczos filter of 3 lobes, widened where the image shrinks."""
  scale = given / wanted
  centres = (np.arange(wanted) + 0.5) * scale
  x = (np.arange(given) + 0.5 - centres[:, None]) / max(scale, 1.0)
  weights = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
  return weights / weights.sum(axis=1, keepdims=True)


def table(title: str, rows: dict[str, Row]) -> str:
  """Markdown: medians, in brackets the least and the most."""
  lines = [
    f'**{title}**',
    '',
    '| loader | images / CPU second | images / s | dB to area | dB to Lanczos |',
    '| --- | ---: | ---: | ---: | ---: |',
  ]
  for name, row in rows.items():
    cells = [_spread(row.per_cpu_second), _spread(row.per_second)]
    lines.append(f'| {name} | {" | ".join(cells)} | {row.area:.1f} | {row.lanczos:.1f} |')
  return '\n'.join(lines)


def _spread(values: Sequence[float]) -> str:
  return f'{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})'


def _sources(root: str | None, folder: pathlib.Path) -> Iterator[tuple[str, sources.FileSource]]:
  """Titles and files, each set written when it is asked for."""
  if root is not None:
    yield root, files_in(pathlib.Path(root).expanduser())
    return
  for width, height, count in PHOTOS:
    part = folder / f'{width}x{height}'
    part.mkdir()
    files = input_photos.write(part, width, height, count)
    yield f'{width} x {height}', sources.FileSource(part, files, [0] * count, num_classes=1)


def files_in(folder: pathlib.Path) -> sources.FileSource:
  """The JPEG files that every loader reads alike: three colours or grey, stored upright."""
  found = [p for p in sorted(folder.rglob('*')) if p.suffix.lower() in ('.jpg', '.jpeg')]
  files = []
  for path in found[:MAX_FILES]:
    header = decode.read_header(path.read_bytes(), str(path))
    if header.format == 'JPEG' and header.reducible and header.orientation == 1:
      files.append(path.relative_to(folder).as_posix())
  if not files:
    raise errors.UserError(f'{folder}: there are no upright RGB JPEG files in it (--root).')
  return sources.FileSource(folder, files, np.zeros(len(files), int), num_classes=1)
