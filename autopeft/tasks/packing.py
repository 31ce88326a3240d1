"""Pack short rows into sequences of one length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autopeft.tasks.batch import IGNORED, POSITIONS
from autopeft.tasks.language_rows import TokenRow
from autopeft.tasks.length_bucketing import TokenisedSplit


def pack(rows: Sequence[TokenRow], length: int) -> TokenisedSplit:
    """Return rows as packs: the longest first, each into the first pack that has room.

    Positions start again with each row, by which transformers keeps attention within it. The first token of a
    row is not predicted from the last of the row before.

    Args:
        rows: At most `length` tokens each.
        length: Tokens of a pack at most.
    """
    packs: list[list[TokenRow]] = []
    room: list[int] = []
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        place = next((index for index, left in enumerate(room) if left >= len(row.tokens)), len(packs))
        if place == len(packs):
            packs.append([])
            room.append(length)
        packs[place].append(row)
        room[place] -= len(row.tokens)
    in_order = [row for members in packs for row in members]
    return TokenisedSplit(
        tokens={
            "input_ids": np.concatenate([np.array(row.tokens) for row in in_order]),
            POSITIONS: np.concatenate([np.arange(len(row.tokens)) for row in in_order]),
        },
        offsets=np.cumsum([0, *(sum(len(row.tokens) for row in members) for members in packs)]),
        labels=np.concatenate([np.array([IGNORED, *row.labels[1:]]) for row in in_order]),
        token_labels=True,
    )
