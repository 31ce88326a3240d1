"""What a batch holds: the model's inputs, the labels, and which rows of which split it was made of."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

LABELS = "labels"
IGNORED = -100
"""Label of a token that does not count in the loss."""
POSITIONS = "position_ids"
_ROWS = "rows of "


def rows_key(split: str) -> str:
    """Return the key under which a batch keeps the row numbers of a split, a tensor of shape (rows,)."""
    return f"{_ROWS}{split}"


def rows_of(batch: Mapping[str, Tensor]) -> tuple[str, Tensor] | None:
    """Return a split's name and the row numbers in it; None for a batch that does not say."""
    for name, rows in batch.items():
        if name.startswith(_ROWS):
            return name.removeprefix(_ROWS), rows
    return None


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what the model is called with: all but the labels and the row numbers."""
    return {name: values for name, values in batch.items() if name != LABELS and not name.startswith(_ROWS)}
