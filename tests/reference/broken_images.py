"""Files that are named as images and cannot be read."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def bomb() -> bytes:
  body = struct.pack('>IIBBBBB', 60_000, 60_000, 8, 2, 0, 0, 0)
  header = struct.pack('>I', 13) + b'IHDR' + body + struct.pack('>I', zlib.crc32(b'IHDR' + body))
  return b'\x89PNG\r\n\x1a\n' + header + b'\0\0\0\0IDAT' + b'\0' * 4


def kinds() -> dict[str, bytes | None]:
  """Eight kinds of broken files; None stands for one that is gone."""
  image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
  whole = {}
  for kind in ('JPEG', 'PNG', 'WEBP'):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    whole[kind] = buffer.getvalue()
  jpeg, png, webp = whole.values()
  return {
    'gone': None,
    'empty': b'',
    'truncated JPEG': jpeg[: len(jpeg) // 2],
    'truncated PNG': png[: len(png) // 2],
    'truncated WebP': webp[: len(webp) // 2],
    'a web page': b'<html>404 Not Found</html>',
    'zeros': bytes(5000),
    'a bomb': bomb(),
  }
