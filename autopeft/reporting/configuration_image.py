"""The picture of a configuration: blocks down, roles across, a coloured cell an adapter."""

from __future__ import annotations

from functools import partial

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from autopeft.core.configuration import Configuration, grid_axes
from autopeft.core.method_specs import METHOD_SPECS
from autopeft.reporting.formats import methods_label

# Okabe and Ito's palette, which people with any colour vision can tell apart, lightened for black text.
_METHOD_COLOURS = ("#8FC7E8", "#F5C26B", "#7FD1B9", "#F4E98C", "#E9A37A", "#9BB7D9", "#E0A8C8")
_EMPTY_COLOUR = "#F4F4F4"
_LETTER_INCHES, _ROW_INCHES, _LEFT_INCHES = 0.08, 0.3, 0.8


def configuration_figure(configuration: Configuration) -> Figure:
    """Draw a configuration."""
    cells = configuration.cells()
    places, roles = grid_axes(cells)
    names = [f"{stack} block {block}".strip() for stack, block in places]
    left_inches = max([_LEFT_INCHES, *(_LETTER_INCHES * (2 + len(name)) for name in names)])
    blocks = len(places)
    title = f"{methods_label(configuration)} · learning rate {configuration.learning_rate:g}"
    column_inches = _LETTER_INCHES * (2 + max(map(len, (*roles, *cells.values())), default=0))
    width = max(left_inches + column_inches * len(roles), _LETTER_INCHES * (2 + len(title)))
    figure = Figure(figsize=(width, _ROW_INCHES * (blocks + 3)))
    # A unit is a cell; the names of the blocks stand left of 0, roles and title above the last block.
    left, right = -left_inches / column_inches, (width - left_inches) / column_inches
    axes = figure.add_axes((0, 0, 1, 1), xlim=(left, right), ylim=(-0.5, blocks + 2.5))
    axes.set_axis_off()
    write = partial(axes.text, ha="center", va="center", fontsize=10)
    write(0.9 * left, blocks + 1.7, title, ha="left")
    for column, role in enumerate(roles):
        write(column + 0.5, blocks + 0.3, role, color="#444444")
    for row, name in enumerate(names):
        write(0.1 * left, row + 0.5, name, color="#444444", ha="right")
    for (place, role), label in cells.items():
        write(roles.index(role) + 0.5, places.index(place) + 0.5, label)
    if cells:
        colours = [[_colour(cells.get((place, role))) for role in roles] for place in places]
        axes.pcolormesh(colours, edgecolors="white", linewidth=2)
    return figure


def _colour(label: str | None) -> tuple[float, float, float]:
    """Return the colour of a cell's (first) method."""
    if label is None:
        return to_rgb(_EMPTY_COLOUR)
    symbols = [specification.symbol for specification in METHOD_SPECS.values()]
    number = symbols.index(label.split("+")[0].rstrip("0123456789"))
    return to_rgb(_METHOD_COLOURS[number % len(_METHOD_COLOURS)])
