"""Whether a video file is shorter than it says: half of a download or of a copy.

FFmpeg decodes such a file up to where it ends, without a complaint. MP4, MOV, AVI, MKV, WebM and
GIF say in a few bytes how long they are; MPEG does not, so that a part of one is a shorter clip.
"""

import os
from typing import BinaryIO

# Writers of AVI disagree on whether the size counts the header and the last byte's padding.
_AVI_SLACK = 16
_EBML, _SEGMENT = b'\x1a\x45\xdf\xa3', b'\x18\x53\x80\x67'
_MOV_BOXES = (b'ftyp', b'moov', b'mdat', b'free', b'skip', b'wide', b'styp', b'moof')


def is_truncated(file: BinaryIO) -> bool:
  """Whether a file ends before its own headers say it does.

  Args:
    file: any file, at its start.

  Returns:
    False if it is complete or of a format that does not say its length.
  """
  size = os.fstat(file.fileno()).st_size
  head = file.read(16)
  if head[:4] == b'RIFF' and head[8:12] == b'AVI ':
    return 8 + int.from_bytes(head[4:8], 'little') > size + _AVI_SLACK
  file.seek(0)
  if head[:4] == _EBML:
    return _matroska_end(file) > size
  if head[4:8] in _MOV_BOXES:
    return _mov_end(file, size) > size
  if head[:4] == b'GIF8':
    return not _gif_ends(file)
  return False


def _mov_end(file: BinaryIO, size: int) -> int:
  """Where the pictures and sound end; what follows them may be anything."""
  position = end = 0
  while position + 8 <= size:
    file.seek(position)
    header = file.read(16)
    length = int.from_bytes(header[:4], 'big')
    if length == 1:  # Its length does not fit into 4 bytes.
      length = int.from_bytes(header[8:16], 'big')
    if length < 8:  # 0: to the end of the file.
      break
    position += length
    if header[4:8] in _MOV_BOXES:
      end = position
  return end


def _matroska_end(file: BinaryIO) -> int:
  """Where the segment ends; 0 if it does not say so, as of a recording sent while it is made."""
  file.read(4)
  length, _ = _ebml_number(file)
  file.seek(length, os.SEEK_CUR)
  if file.read(4) != _SEGMENT:
    return 0
  length, unknown = _ebml_number(file)
  return 0 if unknown else file.tell() + length


def _ebml_number(file: BinaryIO) -> tuple[int, bool]:
  """A length of 1 to 8 bytes, and whether all its bits are set: it is not known."""
  first = (file.read(1) or b'\0')[0]
  width = 9 - first.bit_length()  # As many zeros before the first one as bytes follow.
  if width > 8:
    return 0, True
  value = int.from_bytes(bytes([first & (0xFF >> width)]) + file.read(width - 1), 'big')
  return value, value == (1 << 7 * width) - 1


def _gif_ends(file: BinaryIO) -> bool:
  """Whether the last block is there."""
  header = file.read(13)
  if len(header) < 13:
    return False
  _skip_palette(file, header[10])
  while block := file.read(1):
    if block == b';':
      return True
    if block == b',':
      picture = file.read(9)
      if len(picture) < 9:
        return False
      _skip_palette(file, picture[8])
    file.read(1)  # How an extension is called, or the size of the picture's codes.
    while length := file.read(1):
      if length == b'\0':
        break
      file.seek(length[0], os.SEEK_CUR)
  return False


def _skip_palette(file: BinaryIO, flags: int) -> None:
  if flags & 0x80:
    file.seek(3 << (flags & 7) + 1, os.SEEK_CUR)
