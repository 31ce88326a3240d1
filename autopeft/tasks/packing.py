"""Pack short rows into sequences of one length."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from autopeft.tasks.base import Batch
from autopeft.tasks.batch import IGNORED, POSITIONS
from autopeft.tasks.language_rows import TokenRow
from autopeft.tasks.length_bucketing import Collator, TokenisedSplit

_ROUNDING = 1e-2
"""Change of a row's logits that is taken for rounding, as a share of that in the row whose tokens changed."""


def pack(rows: Sequence[TokenRow], length: int) -> TokenisedSplit:
    """Return rows as packs: the longest first, each into the pack that it fills best (best fit decreasing).

    Positions start again with each row, by which transformers keeps attention within it. The first token of a
    row is not predicted from the last of the row before.

    Args:
        rows: At most `length` tokens each.
        length: Tokens of a pack at most.
    """
    packs: list[list[TokenRow]] = []
    rooms: list[tuple[int, int]] = []  # tokens that a pack has room for, and which pack it is, in order
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        place = bisect_left(rooms, (len(row.tokens), 0))
        if place == len(rooms):
            rooms.append((length, len(packs)))
            packs.append([])
        left, index = rooms.pop(place)
        packs[index].append(row)
        insort(rooms, (left - len(row.tokens), index))
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


def do_rows_mix(
    logits: Callable[[Batch], Tensor],
    rows: Sequence[TokenRow],
    tokenizer: PreTrainedTokenizerBase,
    packs: int,
) -> bool:
    """Return whether the shortest row's logits change with the tokens of the row before it in a pack.

    Args:
        logits: Gives a model's logits of a batch, of shape (packs, tokens, vocabulary).
        rows: Of these the shortest two are packed.
        tokenizer: The model's.
        packs: Packs of the batch, all alike.
    """
    pair = sorted(rows, key=lambda row: len(row.tokens))[:2]
    split = pack(pair, sum(len(row.tokens) for row in pair))
    batch = Collator(split, tokenizer)([0] * packs)
    before, changed = slice(len(pair[-1].tokens)), batch["input_ids"].clone()
    changed[:, before] = changed.max() - changed[:, before]
    change = (logits(batch | {"input_ids": changed}) - logits(batch)).abs()
    return len(pair) > 1 and bool(change[:, before.stop :].max() > _ROUNDING * change[:, before].max())
