"""Splits whose batches are made of rows of like length."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from autopeft.tasks.base import Batch, RowCollator, SplitData, SplitName
from autopeft.tasks.length_bucketing import LengthGroupedBatches, ShuffledBatches, loader, sorted_batches


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
