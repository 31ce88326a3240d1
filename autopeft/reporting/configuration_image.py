"""Pictures by site, blocks down and roles across; of a configuration a coloured cell is an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from autopeft.core.adapter import Place
from autopeft.core.configuration import Configuration, grid_axes
from autopeft.core.method_specs import METHOD_SPECS
from autopeft.reporting.formats import methods_label

# Okabe and Ito's palette, which people with any colour vision can tell apart, lightened for black text.
_METHOD_COLOURS = ("#8FC7E8", "#F5C26B", "#7FD1B9", "#F4E98C", "#E9A37A", "#9BB7D9", "#E0A8C8")
_EMPTY_COLOUR = "#F4F4F4"
_LETTER, _ROW, _LEAST_LEFT = 8, 30, 80  # pixels


def configuration_svg(configuration: Configuration) -> str:
    """Draw a configuration as an SVG picture."""
    title = f"{methods_label(configuration)} · learning rate {configuration.learning_rate:g}"
    return site_svg(title, {cell: (label, _colour(label)) for cell, label in configuration.cells().items()})


def site_svg(title: str, cells: Mapping[tuple[Place, str], tuple[str, str]]) -> str:
    """Draw cells, labels and colours by block and role, as an SVG: the output on top, as signals rise."""
    places, roles = grid_axes(cells)
    names = [f"{stack} block {block}".strip() for stack, block in places]
    left = max([_LEAST_LEFT, *(_LETTER * (2 + len(name)) for name in names)])
    column = _LETTER * (2 + max(map(len, (*roles, *(label for label, _ in cells.values()))), default=0))
    width = max(left + column * len(roles), _LETTER * (2 + len(title)))
    height = _ROW * (len(places) + 3)
    parts = [_text(_LETTER, _ROW, title, anchor="start")]
    for across, role in enumerate(roles):
        parts.append(_text(left + column * (across + 0.5), 2.2 * _ROW, role, colour="#444444"))
    for down, (place, name) in enumerate(zip(reversed(places), reversed(names), strict=True)):
        top = _ROW * (2.5 + down)
        parts.append(_text(left - _LETTER, top + _ROW / 2, name, anchor="end", colour="#444444"))
        for across, role in enumerate(roles):
            label, colour = cells.get((place, role), ("", _EMPTY_COLOUR))
            start = left + column * across
            parts.append(
                f'<rect x="{start:g}" y="{top:g}" width="{column - 2}" height="{_ROW - 2}" fill="{colour}"/>'
            )
            if label:
                parts.append(_text(start + column / 2, top + _ROW / 2, label))
    lines = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="13">\n<rect width="100%" height="100%" fill="white"/>\n'
        f"{lines}\n</svg>\n"
    )


def _text(x: float, y: float, text: str, *, anchor: str = "middle", colour: str = "black") -> str:
    place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}" dominant-baseline="central"'
    return f'<text {place} fill="{colour}">{escape(text)}</text>'


def _colour(label: str) -> str:
    """Return the colour of a cell's (first) method."""
    symbols = [specification.symbol for specification in METHOD_SPECS.values()]
    number = symbols.index(label.split("+")[0].rstrip("0123456789"))
    return _METHOD_COLOURS[number % len(_METHOD_COLOURS)]
