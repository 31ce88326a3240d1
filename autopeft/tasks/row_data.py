"""The tokenised splits of a task with a row an example, as a LightningDataModule."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from autopeft.tasks.base import Batch, SplitData, SplitName
from autopeft.tasks.length_bucketing import (
    Collator,
    LengthGroupedBatches,
    TokenisedSplit,
    loader,
    sorted_batches,
)


class RowData(SplitData):
    """Batches of rows of like length.

    Args:
        read: Gives a split; called once a split, when it is first needed.
        tokenizer: The backbone's.
        batch_size: Rows a training batch.
        seed: Seed of shuffling.

    Attributes:
        tokenizer: The same.
        batch_size: The same.

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
        super().__init__()
        if tokenizer.pad_token_id is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no padding token: set tokenizer.pad_token, for example "
                "to tokenizer.eos_token."
            )
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self._read = read
        self._seed = seed
        self._splits: dict[SplitName, TokenisedSplit] = {}

    def split(self, name: SplitName) -> TokenisedSplit:
        """Return a split's rows; the first call reads them."""
        if name not in self._splits:
            self._splits[name] = self._read(name)
        return self._splits[name]

    def collator(self, name: SplitName) -> Collator | None:
        """Return what makes batches of a split's rows."""
        return self._collator(name)

    def _collator(self, name: SplitName) -> Collator:
        # Test batches do not say which rows they hold.
        return Collator(self.split(name), self.tokenizer, None if name == "test" else name)

    def train_dataloader(self, seed: int | None = None) -> DataLoader[Batch]:
        """Return training batches, shuffled anew each epoch, by the seed or else by the data's own."""
        split = self.split("train")
        seed = self._seed if seed is None else seed
        return loader(self._collator("train"), LengthGroupedBatches(split.lengths, self.batch_size, seed))

    def _evaluation_loader(self, name: SplitName) -> DataLoader[Batch]:
        # No larger than training batches: a trial that was allowed its training memory needs no more here.
        return loader(self._collator(name), sorted_batches(self.split(name).lengths, self.batch_size))

    @cached_property
    def _largest(self) -> Batch:
        """The longest training rows as one batch: no drawn batch has a larger shape."""
        split = self.split("train")
        (longest, *_) = sorted_batches(split.lengths, self.batch_size)
        return Collator(split, self.tokenizer)(longest)
