"""What sets of images and sets of clips differ in, for the code that reads both."""

import dataclasses
from collections.abc import Mapping

from losa_scenic.dataset_lib import clip_files, decode, list_rows, sources, video_file


@dataclasses.dataclass(frozen=True)
class Media:
  """A kind of files.

  Attributes:
    noun: what one is called in messages.
    extensions: of its files, in small letters.
    source: what reads them.
    columns: what the columns of its tables may be called, see `list_rows.COLUMNS`.
    lists: known names of the lists of training, validation and test files, without extension.
    table: known name of a table of all parts, without extension; '' for none.
  """

  noun: str
  extensions: tuple[str, ...]
  source: type[sources.FileSource]
  columns: Mapping[str, tuple[str, ...]]
  lists: tuple[tuple[str, str, str], ...] = (('train', 'val', 'test'),)
  table: str = ''

  @property
  def one(self) -> str:
    """The noun with its article."""
    return f'{"an" if self.noun[0] in "aeiou" else "a"} {self.noun}'

  @property
  def is_clip(self) -> bool:
    """Whether these are clips."""
    return issubclass(self.source, clip_files.ClipFiles)

  def is_named(self, name: str) -> bool:
    """Whether a file is one of them by its name."""
    return name.lower().endswith(self.extensions)


IMAGES = Media(
  'image',
  decode.EXTENSIONS,
  sources.FileSource,
  list_rows.COLUMNS,
  (('train800', 'val200', 'test'), ('train', 'val', 'test')),
)
CLIPS = Media(
  'clip', video_file.EXTENSIONS, clip_files.ClipFiles, list_rows.CLIP_COLUMNS, table='clips'
)
