"""The tokenised splits of a classification task as a LightningDataModule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from autopeft.tasks.base import Batch, SplitName, TaskData
from autopeft.tasks.length_bucketing import (
    Collator,
    LengthGroupedBatches,
    TokenisedSplit,
    loader,
    sorted_batches,
)
from autopeft.tasks.tokenization import tokenise


@dataclass(frozen=True)
class LabelledTexts:
    """One split: columns of texts, and a label a row."""

    columns: tuple[tuple[str, ...], ...]
    labels: tuple[int, ...]


class ClassificationData(TaskData):
    """Batches of texts and labels.

    Args:
        read: Gives a split's texts; called once a split, when it is first needed.
        tokenizer: The backbone's.
        max_length: Tokens a row at most.
        batch_size: Rows a training batch.
        seed: Seed of shuffling.
        cache: Folder for tokenised texts; None to keep them in memory alone.

    Raises:
        ValueError: The tokenizer has no padding token.
    """

    def __init__(
        self,
        read: Callable[[SplitName], LabelledTexts],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        batch_size: int,
        seed: int,
        cache: Path | None,
    ) -> None:
        super().__init__()
        if tokenizer.pad_token_id is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no padding token: set tokenizer.pad_token, for example "
                "to tokenizer.eos_token."
            )
        self._read = read
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._batch_size = batch_size
        self._seed = seed
        self._cache = cache
        self._splits: dict[SplitName, TokenisedSplit] = {}

    def _split(self, name: SplitName) -> TokenisedSplit:
        if name not in self._splits:
            texts = self._read(name)
            tokens, offsets = tokenise(self._tokenizer, texts.columns, self._max_length, self._cache)
            self._splits[name] = TokenisedSplit(tokens, offsets, np.array(texts.labels, dtype=np.int64))
        return self._splits[name]

    def collator(self, name: SplitName) -> Collator:
        """Return what makes batches of a split's rows; test batches do not say which rows they hold."""
        return Collator(self._split(name), self._tokenizer, None if name == "test" else name)

    def train_dataloader(self, seed: int | None = None) -> DataLoader[Batch]:
        """Return training batches, shuffled anew each epoch, by the seed or else by the data's own."""
        split = self._split("train")
        seed = self._seed if seed is None else seed
        batches = LengthGroupedBatches(split.lengths, self._batch_size, seed)
        return loader(self.collator("train"), batches)

    def _evaluation_loader(self, name: SplitName) -> DataLoader[Batch]:
        # No larger than training batches: a trial that was allowed its training memory needs no more here.
        batches = sorted_batches(self._split(name).lengths, self._batch_size)
        return loader(self.collator(name), batches)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return validation batches."""
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return test batches; the first call reads the test split."""
        return self._evaluation_loader("test")

    @property
    def steps_per_epoch(self) -> int:
        """Number of training batches an epoch."""
        return -(-len(self._split("train")) // self._batch_size)

    @cached_property
    def _largest(self) -> Batch:
        split = self._split("train")
        (longest, *_) = sorted_batches(split.lengths, self._batch_size)
        return Collator(split, self._tokenizer)(longest)

    def largest_batch(self) -> Batch:
        """Return the longest training rows as one batch: no drawn batch has a larger shape."""
        return dict(self._largest)
