"""The splits of a language model's data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from autopeft.tasks.base import SplitName
from autopeft.tasks.batch import IGNORED
from autopeft.tasks.grouped_data import RowData
from autopeft.tasks.language_rows import TokenRow
from autopeft.tasks.length_bucketing import TokenisedSplit
from autopeft.tasks.packing import pack


class LanguageData(RowData):
    """Batches of token rows, and the rows that texts are generated for.

    Args:
        rows: Gives the token rows of a split; called once a split, when it is first needed.
        tokenizer: The backbone's.
        batch_size: Rows a training batch; with packing, packs.
        seed: Seed of shuffling.
        length: Tokens of a pack; None to leave each row alone.

    Attributes:
        rows: Returns the token rows of a split.
    """

    def __init__(
        self,
        rows: Callable[[SplitName], tuple[TokenRow, ...]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        seed: int,
        length: int | None,
    ) -> None:
        # Padding goes behind: not every model counts positions from the first token that is none of it.
        tokenizer = copy.copy(tokenizer)
        tokenizer.padding_side = "right"
        super().__init__(self._tokenised, tokenizer, batch_size=batch_size, seed=seed)
        self.rows = cache(rows)
        self._length = length

    def _tokenised(self, name: SplitName) -> TokenisedSplit:
        rows = self.rows(name)
        if self._length is not None:
            return pack(rows, self._length)
        return TokenisedSplit(
            tokens={"input_ids": np.concatenate([np.array(row.tokens) for row in rows])},
            offsets=np.cumsum([0, *(len(row.tokens) for row in rows)]),
            labels=np.concatenate([np.array(row.labels) for row in rows]),
            token_labels=True,
        )

    def learnt(self, name: SplitName) -> NDArray[np.int64]:
        """Return the learnt tokens of a split; the first token of a row is never predicted."""
        labels: NDArray[np.int64] = np.concatenate([np.array(row.labels[1:]) for row in self.rows(name)])
        found: NDArray[np.int64] = labels[labels != IGNORED]
        return found
