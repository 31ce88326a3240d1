"""The tokenised splits of a task with a row an example, as a LightningDataModule."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from autopeft.tasks.base import SplitName
from autopeft.tasks.grouped_data import GroupedData
from autopeft.tasks.length_bucketing import Collator, TokenisedSplit


class RowData(GroupedData):
    """Batches of token rows of like length.

    Args:
        read: Gives a split; called once a split, when it is first needed.
        tokenizer: The backbone's.
        batch_size: Rows a training batch.
        seed: Seed of shuffling.

    Attributes:
        tokenizer: The same.

    Raises:
        ValueError: The tokenizer has no padding token.
    """

    def __init__(
        self,
        read: Callable[[SplitName], TokenisedSplit],
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        seed: int,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed)
        if tokenizer.pad_token_id is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no padding token: set tokenizer.pad_token, for example "
                "to tokenizer.eos_token."
            )
        self.tokenizer = tokenizer
        self._read = read
        self._splits: dict[SplitName, TokenisedSplit] = {}

    def split(self, name: SplitName) -> TokenisedSplit:
        """Return a split's rows; the first call reads them."""
        if name not in self._splits:
            self._splits[name] = self._read(name)
        return self._splits[name]

    def lengths(self, name: SplitName) -> NDArray[np.int64]:
        """Return the number of tokens of each row of a split."""
        return self.split(name).lengths

    def _collator(self, name: SplitName, mark: SplitName | None) -> Collator:
        return Collator(self.split(name), self.tokenizer, mark)
