"""Many images or clips with captions in one picture."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
GREY: Colour = (60, 60, 60)

_LINE = 13  # pixels from one line of a caption to the next
_FONT_SIZE, _TITLE_SIZE = 11, 13
_HEADER = 20
_WIDTHS_A_GAP = 75


@dataclasses.dataclass(frozen=True)
class Cell:
  """One image of a sheet.

  Attributes:
    pixels: uint8, or float in [-1, 1], [h, w, 3]: an image, or the `strip` of a clip; None leaves
      the place empty.
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
    cells: at least one, all pictures of the same shape.
    columns: images in a row.
    cell: height of an image with its margin, in pixels; images of another size are resized. The
      width is that of a square, or in proportion if they are wider than high.
    margin: white pixels around each image.
    title: one line above all.
    headers: a word above each column.

  Returns:
    uint8 [height, width, 3]: the rows, with room for what stands above and below.
  """
  side = cell - 2 * margin
  wide = max([side] + [_width(one.pixels, side) for one in cells if one.pixels is not None])
  across = wide + 2 * margin
  width, height = columns * across, _height(len(cells), columns, cell, title, headers)
  canvas = Image.new('RGB', (width, height), 'white')
  pen = ImageDraw.Draw(canvas)
  top = 0
  if title:
    pen.font = ImageFont.load_default(_TITLE_SIZE)
    pen.text((4, 3), _fitting(pen, title, width - 8), fill=GREY)
    top += _HEADER
  pen.font = ImageFont.load_default(_FONT_SIZE)
  for column, word in enumerate(headers):
    pen.text((column * across + 4, top + 4), _fitting(pen, word, across - 8), fill=GREY)
  top += _HEADER if headers else 0
  for i, one in enumerate(cells):
    x, y = i % columns * across, top + i // columns * (cell + caption_height())
    if one.pixels is not None:
      canvas.paste(_sized(one.pixels, (wide, side)), (x + margin, y + margin))
    if one.frame is not None:
      pen.rectangle((x, y, x + across - 1, y + cell - 1), outline=one.frame, width=margin)
    for number, (line, colour) in enumerate(zip(one.caption, one.colours, strict=False)):
      pen.text((x + 4, y + cell + number * _LINE), _fitting(pen, line, across - 8), fill=colour)
  return np.asarray(canvas)


def _width(pixels: np.ndarray, height: int) -> int:
  """How wide an image is shown at this height; at least square."""
  return max(height, round(height * pixels.shape[1] / pixels.shape[0]))


def _height(count: int, columns: int, cell: int, title: str, headers: Sequence[str]) -> int:
  """Of what `draw` draws, in pixels."""
  above = _HEADER * (bool(title) + bool(headers))
  return above + -(-count // columns) * (cell + caption_height())


def strip(frames: np.ndarray, count: int = 4) -> np.ndarray:
  """A few frames of a clip side by side, from its first to its last, as the picture of a `Cell`.

  Args:
    frames: uint8, or float in [-1, 1], [t, h, w, 3].
    count: at most so many, at equal distances; at least 1.

  Returns:
    [h, n w + (n - 1) g, 3] of the same dtype, in the order of time, with white gaps of g pixels; n
    is the smaller of t and `count`.
  """
  count = min(count, len(frames))
  chosen = [round(i * (len(frames) - 1) / max(1, count - 1)) for i in range(count)]
  height, width = frames.shape[1:3]
  white = 255 if frames.dtype == np.uint8 else 1
  gap = np.full((height, max(1, width // _WIDTHS_A_GAP), 3), white, frames.dtype)
  parts = [part for i in chosen for part in (gap, frames[i])]
  return np.concatenate(parts[1:], axis=1)


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


def _sized(pixels: np.ndarray, size: tuple[int, int]) -> Image.Image:
  if pixels.dtype != np.uint8:
    pixels = np.clip((pixels + 1) * 127.5, 0, 255).astype(np.uint8)
  image = Image.fromarray(pixels)
  if image.size == size:
    return image
  whole = not size[0] % image.width and not size[1] % image.height
  return image.resize(size, Image.Resampling.NEAREST if whole else Image.Resampling.BICUBIC)
