"""The compact picture of a configuration as text: blocks down, roles across."""

from __future__ import annotations

from collections.abc import Mapping

from autopeft.core.method_specs import METHOD_SPECS, ROLES


def text_grid(cells: Mapping[tuple[int, str], str]) -> str:
    """Draw occupied cells, labels by (block, role), as a table of text, with a legend of the letters in use.

    There is a line a block, from the highest occupied one down to block 0: the output is on top.
    """
    if not cells:
        return "(no adapters)"
    roles = [role for role in ROLES if any(role == used for _, used in cells)]
    table = [("block", *roles)]
    for block in range(max(block for block, _ in cells), -1, -1):
        table.append((str(block), *(cells.get((block, role), "·") for role in roles)))
    left, *widths = (max(map(len, column)) for column in zip(*table, strict=True))
    rows = ["  ".join([block.rjust(left), *map(str.center, labels, widths)]) for block, *labels in table]
    letters = {part.rstrip("0123456789") for label in cells.values() for part in label.split("+")}
    legend = ", ".join(
        f"{method.symbol} {method.name}" + (f" ({method.size_name})" if method.size_name else "")
        for method in METHOD_SPECS.values()
        if method.symbol in letters
    )
    return "\n".join(line.rstrip() for line in [*rows, legend])
