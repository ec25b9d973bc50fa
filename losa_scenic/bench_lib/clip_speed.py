"""How fast windows of frames are read from video files, next to decoding every frame and to OpenCV.

All loaders read the same windows of the same files in one process, a pass of each in turn, each in
one thread. A pass is timed in CPU time of all threads of the process, so the figure is the one per
core. What a loader decoded is a share of the frames of the files; OpenCV does not tell when it goes
to a frame. Whether it shows the frames asked for is the PSNR of the worst window against decoding
every frame: pixels may differ a little (another conversion of colours), another frame is below
30 dB wherever anything moves.
"""

import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from typing import NamedTuple

import cv2
import numpy as np

from losa_scenic.bench_lib import clip_loaders, clip_videos
from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import frame_sampling, video_file

# Distances of key frames of the sample videos: as of data prepared for training, as encoders do.
GOPS = (12, 250)
SAMPLES = 6
# Of a user's folder, in the order of the names.
MAX_FILES = 100
WINDOWS = 3  # of each file
_SEED = 0


class Work(NamedTuple):
  """What is to be read.

  Attributes:
    title: of the files, for people.
    described: what they are, on one line.
    frames: number of frames of each file.
    windows: of which file, and the indices to be read of it, int64 [t]; as many of each file.
  """

  title: str
  described: str
  frames: list[int]
  windows: list[tuple[str, np.ndarray]]


class Row(NamedTuple):
  """What was measured of one loader.

  Attributes:
    per_cpu_second: windows per second of CPU time, of each round.
    decoded: share of the files' frames that was decoded, mean over the windows; None: not known.
    psnr: in dB, of the window that is the farthest from what every frame decoded gives.
  """

  per_cpu_second: list[float]
  decoded: float | None
  psnr: float


def report(root: str | None, frames: int, stride: int, rounds: int) -> Iterator[str]:
  """Measures all loaders and says so in markdown.

  Args:
    root: folder with video files at any depth; None for sample videos with few and many key frames.
    frames: of a window.
    stride: from one frame of a window to the next, in frames of the file.
    rounds: passes of each loader.

  Yields:
    Paragraphs, each as soon as it is known.

  Raises:
    errors.UserError: for numbers out of range, a folder without videos, or without PyAV.
  """
  for name, value in (('frames', frames), ('stride', stride), ('rounds', rounds)):
    errors.check_at_least(f'--{name}', value, 1)
  with tempfile.TemporaryDirectory() as folder:
    given = [
      work(title, paths, frames, stride) for title, paths in _sources(root, pathlib.Path(folder))
    ]
    yield '  \n'.join([_versions(), *(item.described for item in given)])
    measured = [measure(item, rounds) for item in given]
  title = f'{frames} frames, stride {stride}; {WINDOWS} windows a file; rounds: {rounds}'
  yield table(title, [item.title for item in given], measured)


def work(title: str, paths: list[str], frames: int, stride: int) -> Work:
  """Draws windows as training does, the same ones each time; looks at each file once.

  Args:
    title: of the files.
    paths: of the files.
    frames: of a window.
    stride: as of `frame_sampling.random_window`; clips that are too short begin again.

  Raises:
    errors.UserError: for a file that is no video (`BadImage`), or without PyAV.
  """
  rng, counts, windows, sizes, seconds = np.random.default_rng(_SEED), [], [], set(), 0.0
  for path in paths:
    info = video_file.probe(path)
    counts.append(info.frames)
    sizes.add((info.width, info.height))
    seconds += info.duration_seconds
    for _ in range(WINDOWS):
      windows.append((path, frame_sampling.random_window(info, frames, rng, stride)))
  shown = f'{len(paths)} files of {seconds / len(paths):.1f} s and '
  shown += f'{sum(os.path.getsize(path) for path in paths) / len(paths) / 1000:.0f} kB, '
  shown += ', '.join(f'{width} x {height}' for width, height in sorted(sizes)[:3])
  shown += ' ...' if len(sizes) > 3 else ''
  return Work(title, f'{title}: {shown}', counts, windows)


def measure(given: Work, rounds: int) -> dict[str, Row]:
  """Runs every loader `rounds` times in turn, after a pass of each that is not timed.

  Args:
    given: what is to be read.
    rounds: passes of each.
  """
  names = list(clip_loaders.LOADERS)
  decoded, worst = _looked_at(given)
  speeds: dict[str, list[float]] = {name: [] for name in names}
  for number in range(rounds):
    first = number % len(names)  # So that none always follows the same other one.
    for name in names[first:] + names[:first]:
      read, start = clip_loaders.LOADERS[name], time.process_time()
      for path, indices in given.windows:
        read(path, indices)
      speeds[name].append(len(given.windows) / (time.process_time() - start))
  return {name: Row(speeds[name], decoded[name], worst[name]) for name in names}


def _looked_at(given: Work) -> tuple[dict[str, float | None], dict[str, float]]:
  """Of every loader: the share of frames that is decoded, and the PSNR of its worst window."""
  worst = dict.fromkeys(clip_loaders.LOADERS, np.inf)
  own = every = 0.0
  for i, (path, indices) in enumerate(given.windows):
    exact = clip_loaders.every_frame(path, indices)
    for name, read in clip_loaders.LOADERS.items():
      with clip_loaders.counted() as number:
        pixels = read(path, indices)
      worst[name] = min(worst[name], psnr(pixels, exact))
      own += number[0] / given.frames[i // WINDOWS]
    every += (int(indices.max()) + 1) / given.frames[i // WINDOWS]
  decoded: dict[str, float | None] = dict.fromkeys(clip_loaders.LOADERS)
  decoded[clip_loaders.OWN] = own / len(given.windows)
  for name in clip_loaders.LOADERS:
    if name.endswith('every frame'):
      decoded[name] = every / len(given.windows)
  return decoded, worst


def psnr(pixels: np.ndarray, exact: np.ndarray) -> float:
  """Peak signal-to-noise ratio in dB of two arrays uint8 of one shape; infinite if they agree."""
  return cv2.PSNR(pixels.reshape(-1), exact.reshape(-1)) if (pixels != exact).any() else np.inf


def table(title: str, columns: list[str], measured: list[dict[str, Row]]) -> str:
  """Markdown, a group of columns for each kind of files.

  Args:
    title: above the table.
    columns: names of the kinds of files.
    measured: by kind, the rows of the loaders.
  """
  head = [f'{name}: clips / CPU second | decoded | dB' for name in columns]
  lines = [
    f'**{title}**',
    '',
    f'| loader | {" | ".join(head)} |',
    f'| --- |{" ---: |" * 3 * len(columns)}',
  ]
  for name in clip_loaders.LOADERS:
    lines.append(f'| {name} | {" | ".join(_cells(rows[name]) for rows in measured)} |')
  return '\n'.join(lines)


def _cells(row: Row) -> str:
  speeds = row.per_cpu_second
  spread = f'{statistics.median(speeds):.1f} ({min(speeds):.1f} to {max(speeds):.1f})'
  decoded = '' if row.decoded is None else f'{100 * row.decoded:.0f} %'
  return f'{spread} | {decoded} | {"same" if np.isinf(row.psnr) else f"{row.psnr:.0f}"}'


def _versions() -> str:
  packages = ('av', 'opencv-python-headless')
  return ', '.join(f'{package} {metadata.version(package)}' for package in packages)


def _sources(root: str | None, folder: pathlib.Path) -> Iterator[tuple[str, list[str]]]:
  """Titles and files; sample videos are written."""
  if root is not None:
    paths = files_in(pathlib.Path(root).expanduser())
    yield root, paths
    return
  for gop in GOPS:
    part = folder / str(gop)
    part.mkdir()
    files = clip_videos.write(part, gop, SAMPLES)
    yield f'key frame every {gop}', [str(part / file) for file in files]


def files_in(folder: pathlib.Path) -> list[str]:
  """The video files in a folder, at any depth: the first 100 by name.

  Raises:
    errors.UserError: if there are none.
  """
  found = sorted(p for p in folder.rglob('*') if p.suffix.lower() in video_file.EXTENSIONS)
  if not found:
    kinds = ', '.join(video_file.EXTENSIONS)
    raise errors.UserError(f'{folder}: there are no video files in it (--root): {kinds}.')
  return [str(path) for path in found[:MAX_FILES]]
