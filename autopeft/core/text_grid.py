"""The compact picture of a configuration as text: blocks down, roles across."""

from __future__ import annotations

from collections.abc import Mapping

from autopeft.core.method_specs import METHOD_SPECS, ROLES

EMPTY_CELL = "·"


def text_grid(cells: Mapping[tuple[int, str], str]) -> str:
    """Draw occupied cells, labels by (block, role), as a table of text, with a legend of the letters in use.

    There is a line a block, from the highest occupied one down to block 0: the output is on top.
    """
    if not cells:
        return "(no adapters: the head alone is trained)"
    roles = [role for role in ROLES if any(role == used for _, used in cells)]
    blocks = range(max(block for block, _ in cells), -1, -1)
    widths = [
        max(len(role), *(len(cells.get((block, role), EMPTY_CELL)) for block in blocks)) for role in roles
    ]
    left = max(len("block"), len(str(blocks[0])))
    rows = ["  ".join(["block".rjust(left), *(r.center(w) for r, w in zip(roles, widths, strict=True))])]
    for block in blocks:
        labels = (
            cells.get((block, role), EMPTY_CELL).center(width)
            for role, width in zip(roles, widths, strict=True)
        )
        rows.append("  ".join([str(block).rjust(left), *labels]))
    letters = {part.rstrip("0123456789") for label in cells.values() for part in label.split("+")}
    legend = ", ".join(
        f"{method.symbol} {method.name}" + (f" ({method.size_name})" if method.size_name else "")
        for method in METHOD_SPECS.values()
        if method.symbol in letters
    )
    return "\n".join(line.rstrip() for line in [*rows, legend])
