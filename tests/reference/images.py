"""Small image files, encoded by Pillow or, where it cannot write a kind, by hand."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

# EXIF: how the stored pixels must be turned to stand upright.
ORIENTATION = 0x0112


def encode(image: Image.Image | np.ndarray, kind: str = 'PNG', **options) -> bytes:
  """A file's bytes; arrays are uint8 or uint16."""
  buffer = io.BytesIO()
  if isinstance(image, np.ndarray):
    image = Image.fromarray(image)
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
  """EXIF data that says this and nothing else."""
  data = Image.Exif()
  data[ORIENTATION] = orientation
  return data


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
  """uint8 [height, width, 3]: soft random colours, like a photo out of focus."""
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
  return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
  """uint8 [height, width, 3], uniform."""
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(width: int, height: int, bits: int, colour: int, rows: bytes, extra: bytes = b'') -> bytes:
  """A PNG file.

  Args:
    width: in pixels.
    height: in pixels.
    bits: per sample.
    colour: PNG's number of the colour type.
    rows: each with its filter byte.
    extra: chunks between header and pixels, see `chunk`.
  """
  header = struct.pack('>IIBBBBB', width, height, bits, colour, 0, 0, 0)
  pixels = chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')
  return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + extra + pixels


def chunk(kind: bytes, body: bytes) -> bytes:
  """A chunk of a PNG file."""
  return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))


def tiff(
  width: int, height: int, bits: int, samples: int, pixels: bytes, order: str = '<'
) -> bytes:
  """A TIFF file without compression: grey (one sample a pixel) or RGB (three).

  Args:
    width: in pixels.
    height: in pixels.
    bits: per sample.
    samples: 1 or 3.
    pixels: all rows, in the byte order of the file.
    order: '<' or '>'.
  """
  short, long = 3, 4
  # The header is followed by a directory of eight entries of 12 bytes; behind it lie the three
  # numbers that fit into no entry, and the pixels.
  behind = 8 + 2 + 8 * 12 + 4
  entries = (
    (256, long, 1, width),
    (257, long, 1, height),
    (258, short, samples, bits if samples == 1 else behind),
    (259, short, 1, 1),  # no compression
    (262, short, 1, 1 if samples == 1 else 2),  # black is zero, or RGB
    (273, long, 1, behind + 8),  # where the pixels are
    (277, short, 1, samples),
    (279, long, 1, len(pixels)),
  )
  body = (b'II' if order == '<' else b'MM') + struct.pack(order + 'HIH', 42, 8, len(entries))
  for tag, kind, count, value in entries:
    inline = 'Hxx' if kind == short and count == 1 else 'I'
    body += struct.pack(order + 'HHI' + inline, tag, kind, count, value)
  return body + bytes(4) + struct.pack(order + '4H', bits, bits, bits, 0) + pixels
