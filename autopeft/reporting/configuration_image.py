"""The picture of a configuration: blocks down, roles across, a coloured cell an adapter."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from autopeft.core.configuration import Configuration
from autopeft.core.method_specs import METHOD_SPECS, ROLES

_CELL_HEIGHT = 30
_MARGIN = 14
# Okabe and Ito's palette, which people with any colour vision can tell apart, lightened for black text.
_METHOD_COLOURS = ("#8FC7E8", "#F5C26B", "#7FD1B9", "#F4E98C", "#E9A37A", "#9BB7D9", "#E0A8C8")

_COLOURS = (*_METHOD_COLOURS, "#F4F4F4", "#FFFFFF")
_EMPTY, _WHITE = len(_METHOD_COLOURS), len(_METHOD_COLOURS) + 1
_SHADES = 16
_BLACK_INK, _GREY_INK = 255, 187


def configuration_image(configuration: Configuration) -> bytes:
    """Return the picture as PNG, drawn in a few milliseconds, as a search makes one a trial."""
    cells = configuration.cells()
    roles = [role for role in ROLES if any(role == used for _, used in cells)]
    blocks = range(max((block for block, _ in cells), default=-1), -1, -1)
    labels = [*roles, *cells.values()]
    cell_width = max((_lettering(label, _BLACK_INK, "mm").width for label in labels), default=0) + 18
    left = _MARGIN + 60
    title = (
        f"{'+'.join(configuration.methods) or 'head alone'} · learning rate {configuration.learning_rate:g}"
    )
    heading = _lettering(title, _BLACK_INK, "la")
    width = max(left + cell_width * len(roles), heading.width + _MARGIN) + _MARGIN
    top = 2 * _MARGIN + _CELL_HEIGHT
    size = (width, top + _CELL_HEIGHT * (len(blocks) + 1) + _MARGIN)
    # Colours and the ink of text apart, to be put together as a palette: a third of the bytes to compress.
    colours, inks = Image.new("L", size, _WHITE), Image.new("L", size)
    ground = ImageDraw.Draw(colours)
    heading.write(inks, _MARGIN, _MARGIN)
    for column, role in enumerate(roles):
        centre = left + cell_width * column + cell_width // 2
        _lettering(role, _GREY_INK, "mm").write(inks, centre, top + _CELL_HEIGHT // 2)
    for row, block in enumerate(blocks):
        y = top + _CELL_HEIGHT * (row + 1)
        middle = y + _CELL_HEIGHT // 2
        _lettering(f"block {block}", _GREY_INK, "lm").write(inks, _MARGIN, middle)
        for column, role in enumerate(roles):
            x = left + cell_width * column
            label = cells.get((block, role))
            box = (x + 1, y + 1, x + cell_width - 1, y + _CELL_HEIGHT - 1)
            ground.rectangle(box, fill=_EMPTY if label is None else _colour(label))
            if label is not None:
                _lettering(label, _BLACK_INK, "mm").write(inks, x + cell_width // 2, middle)
    return _png(colours, inks)


@dataclass(frozen=True)
class _Lettering:
    """A text, drawn once: a search's pictures have the same few.

    Attributes:
        width: Its length in whole pixels.
        ink: The drawn text.
        offset: Of the drawing from where the text is written.
    """

    width: int
    ink: Image.Image
    offset: tuple[int, int]

    def write(self, image: Image.Image, x: int, y: int) -> None:
        """Put the text into an image, over nothing."""
        image.paste(self.ink, (x + self.offset[0], y + self.offset[1]))


@lru_cache(maxsize=1000)
def _lettering(text: str, ink: int, baseline: str) -> _Lettering:
    font = ImageFont.load_default(size=14)
    left, top, right, bottom = map(int, font.getbbox(text, anchor=baseline))
    image = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(image).text((-left, -top), text, fill=ink, font=font, baseline=baseline)
    return _Lettering(int(font.getlength(text)), image, (left, top))


def _colour(label: str) -> int:
    """Return the number of the colour of a cell's (first) method."""
    symbols = [specification.symbol for specification in METHOD_SPECS.values()]
    return symbols.index(label.split("+")[0].rstrip("0123456789")) % len(_METHOD_COLOURS)


def _png(colours: Image.Image, inks: Image.Image) -> bytes:
    """Return as PNG what has a colour of `_COLOURS` and, over it, an ink from 0 to 255 at each pixel."""
    pixels = np.asarray(colours) * np.uint8(_SHADES) + np.asarray(inks) // np.uint8(256 // _SHADES)
    image = Image.fromarray(pixels)
    image.putpalette(_palette())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


@cache
def _palette() -> bytes:
    """Return every colour in every shade, from itself to black."""
    shares = 1 - np.arange(_SHADES) / (_SHADES - 1)
    colours = np.array([ImageColor.getrgb(colour) for colour in _COLOURS])
    return np.rint(colours[:, None, :] * shares[:, None]).astype(np.uint8).tobytes()
