"""Splits whose batches are made of rows of like length."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from autopeft.tasks.base import Batch, RowCollator, SplitData, SplitName
from autopeft.tasks.length_bucketing import (
    Collator,
    LengthGroupedBatches,
    ShuffledBatches,
    TokenisedSplit,
    loader,
    sorted_batches,
)


class GroupedData(SplitData):
    """Batches of rows of like length.

    Args:
        batch_size: Rows a training batch.
        seed: Seed of shuffling.
        workers: Processes that make batches; 0 makes them in this one.

    Attributes:
        batch_size: The same.
    """

    def __init__(self, *, batch_size: int, seed: int, workers: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self._seed = seed
        self._workers = workers

    @abstractmethod
    def lengths(self, name: SplitName) -> NDArray[np.int64]:
        """Return the length of each row of a split."""

    @abstractmethod
    def _collator(self, name: SplitName, mark: SplitName | None) -> RowCollator:
        """Return what makes batches of a split's rows, which are marked with a split's name or not."""

    def collator(self, name: SplitName) -> RowCollator | None:
        """Return what makes batches of a split's rows; those of test do not say which rows they hold."""
        return self._collator(name, None if name == "test" else name)

    def train_dataloader(self, seed: int | None = None) -> DataLoader[Batch]:
        """Return training batches, shuffled anew each epoch, by the seed or else by the data's own."""
        seed = self._seed if seed is None else seed
        return loader(self._training_collator(seed), self._shuffled(seed), self._workers)

    def _training_collator(self, seed: int) -> RowCollator:
        return self._collator("train", "train")

    def _shuffled(self, seed: int) -> ShuffledBatches:
        return LengthGroupedBatches(self.lengths("train"), self.batch_size, seed)

    def _evaluation_loader(self, name: SplitName) -> DataLoader[Batch]:
        collate = self._collator(name, None if name == "test" else name)
        # No larger than training batches: a trial that was allowed its training memory needs no more here.
        return loader(collate, sorted_batches(self.lengths(name), self.batch_size), self._workers)

    @cached_property
    def _largest(self) -> Batch:
        """The longest training rows as one batch: no drawn batch has a larger shape."""
        (longest, *_) = sorted_batches(self.lengths("train"), self.batch_size)
        return self._collator("train", None)(longest)


class RowData(GroupedData):
    """Batches of token rows of like length.

    Args:
        read: Gives a split; called once a split, when it is first needed.
        tokenizer: The backbone's.
        batch_size: Rows a training batch.
        seed: Seed of shuffling.

    Attributes:
        split: Returns a split's rows.
        tokenizer: The backbone's.

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
        self.split = cache(read)

    def lengths(self, name: SplitName) -> NDArray[np.int64]:
        """Return the number of tokens of each row of a split."""
        return self.split(name).lengths

    def _collator(self, name: SplitName, mark: SplitName | None) -> Collator:
        return Collator(self.split(name), self.tokenizer, mark)
