"""Small videos, written with PyAV, whose every frame carries its number."""

import pathlib
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

BITS = 10
_QUICK = {'deadline': 'realtime', 'cpu-used': '8', 'b': '500k'}
# File name -> codec, pixel format, encoder options, largest run of reordered frames.
KINDS = {
  'h264.mp4': ('libx264', 'yuv420p', {}, 2),
  'open_gop.mp4': ('libx264', 'yuv420p', {'x264-params': 'open-gop=1:scenecut=0'}, 3),
  'h265.mp4': ('libx265', 'yuv420p', {'x265-params': 'log-level=none:pools=1'}, 2),
  'h264.mov': ('libx264', 'yuv420p', {}, 2),
  'h264.mkv': ('libx264', 'yuv420p', {}, 2),
  'vp8.webm': ('libvpx', 'yuv420p', _QUICK, None),
  'vp9.webm': (
    'libvpx-vp9',
    'yuv420p',
    _QUICK,
    None,
  ),
  'mpeg4.avi': ('mpeg4', 'yuv420p', {'qscale': '3'}, 0),
  'mpeg4_reordered.avi': ('mpeg4', 'yuv420p', {}, 2),
  'h264_reordered.avi': ('libx264', 'yuv420p', {}, 2),
  'mjpeg.avi': ('mjpeg', 'yuvj420p', {}, None),
  'mpeg2.mpg': ('mpeg2video', 'yuv420p', {'b': '2M'}, 2),
  'palette.gif': ('gif', 'rgb8', {}, None),
}


def picture(number: int, height: int = 48, width: int = 64) -> np.ndarray:
  """uint8 [height, width, 3]: a column a bit, and a grey that moves with the number."""
  columns = np.arange(width) * BITS // width
  row = np.where(number >> columns & 1, 255, 0).astype(np.uint8)
  image = np.repeat(np.broadcast_to(row, (height, width))[:, :, None], 3, axis=2).copy()
  image[number % height] = 128
  return image


def number(image: np.ndarray) -> int:
  """Which frame this is."""
  columns = np.arange(image.shape[1]) * BITS // image.shape[1]
  return sum(int(image[:, columns == bit].mean() > 127) << bit for bit in range(BITS))


def numbers(images: np.ndarray) -> list[int]:
  """Which frames these are."""
  return [number(image) for image in images]


def write(
  path: pathlib.Path,
  count: int = 60,
  *,
  kind: str = 'h264.mp4',
  size: tuple[int, int] = (48, 64),
  gop: int = 12,
  rate: Fraction | int = 25,
  ticks: Sequence[int] | None = None,
  tick: Fraction = Fraction(1, 1000),
  rotation: int | None = None,
  options: dict[str, str] | None = None,
  container_options: dict[str, str] | None = None,
) -> str:
  """Writes a video of `count` frames; returns its path.

  Args:
    path: of the file.
    count: number of frames.
    kind: one of `KINDS`.
    size: height and width.
    gop: distance of key frames.
    rate: frames per second.
    ticks: times of presentation in `tick` seconds, for a varying rate.
    tick: see `ticks`.
    rotation: of FFmpeg's display matrix, in degrees.
    options: more of the encoder's options.
    container_options: of the container's.
  """
  import av

  codec, pixels, more, reordered = KINDS[kind]
  with av.open(str(path), 'w', options=container_options or {}) as container:
    stream = container.add_stream(codec, rate=rate, options={**more, **(options or {})})
    stream.height, stream.width = size
    stream.pix_fmt = pixels
    stream.codec_context.gop_size = gop
    stream.codec_context.thread_count = 1
    if reordered is not None:
      stream.codec_context.max_b_frames = reordered
    if ticks is not None:
      stream.codec_context.time_base = tick
    if rotation is not None:
      stream.set_display_rotation(rotation)
    for i in range(count):
      frame = av.VideoFrame.from_ndarray(picture(i, *size)).reformat(format=pixels, threads=1)
      frame.pts, frame.time_base = (i, 1 / Fraction(rate)) if ticks is None else (ticks[i], tick)
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return str(path)


def write_sound(path: pathlib.Path) -> str:
  """Writes half a second of silence; returns its path."""
  import av

  with av.open(str(path), 'w') as container:
    stream = container.add_stream('aac', rate=16000, layout='mono')
    for i in range(8):
      frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), 'fltp', 'mono')
      frame.sample_rate, frame.pts = 16000, 1024 * i
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return str(path)


def decode_all(path: str) -> list[np.ndarray]:
  """All frames in their order, as stored: uint8 [height, width, 3] each."""
  import av

  with av.open(path) as container:
    return [frame.to_ndarray(format='rgb24') for frame in container.decode(video=0)]
