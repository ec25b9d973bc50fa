"""Many images with captions in one picture."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
GREY: Colour = (60, 60, 60)

_LINE = 13  # pixels from one line of a caption to the next
_FONT_SIZE, _TITLE_SIZE = 11, 13
_HEADER = 20


@dataclasses.dataclass(frozen=True)
class Cell:
  """One image of a sheet.

  Attributes:
    pixels: uint8, or float in [-1, 1], [h, w, 3]; None leaves the place empty.
    caption: up to two lines below it, each cut where it does not fit.
    colours: of these lines.
    frame: its colour; None for no frame.
  """

  pixels: np.ndarray | None
  caption: Sequence[str] = ()
  colours: Sequence[Colour] = (GREY, GREY)
  frame: Colour | None = None


def draw(
  cells: Sequence[Cell],
  *,
  columns: int,
  cell: int = 128,
  margin: int = 2,
  title: str = '',
  headers: Sequence[str] = (),
) -> np.ndarray:
  """Draws the cells in rows from left to right.

  Args:
    cells: at least one.
    columns: images in a row.
    cell: side of an image with its margin, in pixels; images of another size are resized.
    margin: white pixels around each image.
    title: one line above all.
    headers: a word above each column.

  Returns:
    uint8 [height, width, 3]: the rows, with room for what stands above and below.
  """
  width, height = _size(len(cells), columns=columns, cell=cell, title=title, headers=headers)
  canvas = Image.new('RGB', (width, height), 'white')
  pen = ImageDraw.Draw(canvas)
  top, side = 0, cell - 2 * margin
  if title:
    pen.font = ImageFont.load_default(_TITLE_SIZE)
    pen.text((4, 3), _fitting(pen, title, width - 8), fill=GREY)
    top += _HEADER
  pen.font = ImageFont.load_default(_FONT_SIZE)
  for column, word in enumerate(headers):
    pen.text((column * cell + 4, top + 4), _fitting(pen, word, cell - 8), fill=GREY)
  top += _HEADER if headers else 0
  for i, one in enumerate(cells):
    x, y = i % columns * cell, top + i // columns * (cell + caption_height())
    if one.pixels is not None:
      canvas.paste(_sized(one.pixels, side), (x + margin, y + margin))
    if one.frame is not None:
      pen.rectangle((x, y, x + cell - 1, y + cell - 1), outline=one.frame, width=margin)
    for number, (line, colour) in enumerate(zip(one.caption, one.colours, strict=False)):
      pen.text((x + 4, y + cell + number * _LINE), _fitting(pen, line, cell - 8), fill=colour)
  return np.asarray(canvas)


def _size(
  count: int, *, columns: int, cell: int, title: str = '', headers: Sequence[str] = ()
) -> tuple[int, int]:
  """(width, height) of what `draw` draws, in pixels."""
  above = _HEADER * (bool(title) + bool(headers))
  return columns * cell, above + -(-count // columns) * (cell + caption_height())


def caption_height() -> int:
  """Pixels below an image that are kept for two lines."""
  return 2 * _LINE + 4


def shown_side(image_size: int) -> int:
  """At which side an image of this side is shown: as it is where that can be seen well.

  Small images grow to at least 112 pixels by whole factors, so that each pixel stays a square;
  large ones shrink to 320.
  """
  return min(image_size * -(-112 // image_size), 320)


def mixed_caption(
  class_names: Sequence[str], label: int, partner: int | None = None, share: float = 1.0
) -> tuple[str, ...]:
  """What an image shows: ('cat',), or ('cat 70 %', '+ dog 30 %') where two are mixed.

  Args:
    class_names: one per class.
    label: class of the image.
    partner: class of the other one.
    share: of the image itself, in [0, 1].
  """
  percent = round(100 * share)
  if partner is None or partner == label or percent == 100:
    return (class_names[label],)
  if percent == 0:
    return (class_names[partner],)
  return (f'{class_names[label]} {percent} %', f'+ {class_names[partner]} {100 - percent} %')


def _fitting(pen: ImageDraw.ImageDraw, text: str, width: int) -> str:
  """The text, cut so that it is at most `width` pixels wide."""
  if pen.textlength(text) <= width:
    return text
  while text and pen.textlength(f'{text}...') > width:
    text = text[:-1]
  return f'{text}...'


def _sized(pixels: np.ndarray, side: int) -> Image.Image:
  if pixels.dtype != np.uint8:
    pixels = np.clip((pixels + 1) * 127.5, 0, 255).astype(np.uint8)
  image = Image.fromarray(pixels)
  if image.size == (side, side):
    return image
  whole = not side % image.width and not side % image.height
  return image.resize((side, side), Image.Resampling.NEAREST if whole else Image.Resampling.BICUBIC)
