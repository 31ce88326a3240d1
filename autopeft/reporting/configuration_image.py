"""The picture of a configuration: blocks down, roles across, a coloured cell an adapter."""

from __future__ import annotations

from functools import partial

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from autopeft.core.configuration import Configuration
from autopeft.core.method_specs import METHOD_SPECS, ROLES
from autopeft.reporting.formats import methods_label

# Okabe and Ito's palette, which people with any colour vision can tell apart, lightened for black text.
_METHOD_COLOURS = ("#8FC7E8", "#F5C26B", "#7FD1B9", "#F4E98C", "#E9A37A", "#9BB7D9", "#E0A8C8")
_EMPTY_COLOUR = "#F4F4F4"
_LETTER_INCHES, _ROW_INCHES, _LEFT_INCHES = 0.08, 0.3, 0.8


def configuration_figure(configuration: Configuration) -> Figure:
    """Draw a configuration."""
    cells = configuration.cells()
    roles = [role for role in ROLES if any(role == used for _, used in cells)]
    blocks = 1 + max((block for block, _ in cells), default=-1)
    title = f"{methods_label(configuration)} · learning rate {configuration.learning_rate:g}"
    column_inches = _LETTER_INCHES * (2 + max(map(len, (*roles, *cells.values())), default=0))
    width = max(_LEFT_INCHES + column_inches * len(roles), _LETTER_INCHES * (2 + len(title)))
    figure = Figure(figsize=(width, _ROW_INCHES * (blocks + 3)))
    # A unit is a cell; the names of the blocks stand left of 0, roles and title above the last block.
    left, right = -_LEFT_INCHES / column_inches, (width - _LEFT_INCHES) / column_inches
    axes = figure.add_axes((0, 0, 1, 1), xlim=(left, right), ylim=(-0.5, blocks + 2.5))
    axes.set_axis_off()
    write = partial(axes.text, ha="center", va="center", fontsize=10)
    write(0.9 * left, blocks + 1.7, title, ha="left")
    for column, role in enumerate(roles):
        write(column + 0.5, blocks + 0.3, role, color="#444444")
    for block in range(blocks):
        write(0.1 * left, block + 0.5, f"block {block}", color="#444444", ha="right")
    for (block, role), label in cells.items():
        write(roles.index(role) + 0.5, block + 0.5, label)
    if cells:
        colours = [[_colour(cells.get((block, role))) for role in roles] for block in range(blocks)]
        axes.pcolormesh(colours, edgecolors="white", linewidth=2)
    return figure


def _colour(label: str | None) -> tuple[float, float, float]:
    """Return the colour of a cell's (first) method."""
    if label is None:
        return to_rgb(_EMPTY_COLOUR)
    symbols = [specification.symbol for specification in METHOD_SPECS.values()]
    number = symbols.index(label.split("+")[0].rstrip("0123456789"))
    return to_rgb(_METHOD_COLOURS[number % len(_METHOD_COLOURS)])
