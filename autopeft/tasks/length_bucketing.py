"""Length-bucketed batches: little padding, the same for the same seed and epoch."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase
from transformers.trainer_pt_utils import get_length_grouped_indices

from autopeft.tasks.base import Batch, RowCollator
from autopeft.tasks.batch import IGNORED, LABELS, POSITIONS, rows_key

_BATCHES_A_POOL = 50


@dataclass(frozen=True)
class TokenisedSplit:
    """The rows of one split as token ids, concatenated.

    Attributes:
        tokens: Input name → all rows' values one after another (input_ids, token_type_ids …).
        offsets: Row i lies at offsets[i]:offsets[i + 1].
        labels: Label of each row, several labels a row (rows, labels), or one of each token.
        token_labels: Whether there is a label a token.
    """

    tokens: dict[str, NDArray[np.int64]]
    offsets: NDArray[np.int64]
    labels: NDArray[Any]
    token_labels: bool = False

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def features(self, row: int) -> dict[str, list[int]]:
        """Return what the tokenizer gave for a row."""
        here = slice(self.offsets[row], self.offsets[row + 1])
        found = {name: values[here].tolist() for name, values in self.tokens.items() if name != POSITIONS}
        return found | {"attention_mask": [1] * len(found["input_ids"])}

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of each row."""
        return np.diff(self.offsets)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over all that the model is given of it; labels are left out."""
        digest = hashlib.sha256(self.offsets.tobytes())
        for name in sorted(self.tokens):
            digest.update(f"{name} {self.tokens[name].dtype}".encode() + self.tokens[name].tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Collator:
    """Pad rows to the longest among them.

    Attributes:
        split: Where the rows are.
        tokenizer: Says with what padding is filled, and on which side it goes.
        name: Name of the split, for batches that say which rows they hold; None for those that do not.
    """

    split: TokenisedSplit
    tokenizer: PreTrainedTokenizerBase
    name: str | None = None

    def __len__(self) -> int:
        return len(self.split)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of each row."""
        return self.split.lengths

    @property
    def fingerprint(self) -> str:
        """That of the split."""
        return self.split.fingerprint

    @property
    def left(self) -> bool:
        """Whether padding goes in front."""
        return bool(self.tokenizer.padding_side == "left")

    def positions(self, rows: Sequence[int]) -> NDArray[np.int64]:
        """Return which token of its row lies where in a batch, of shape (rows, longest); -1 at padding."""
        lengths = self.split.lengths[rows]
        longest = int(lengths.max())
        start = longest - lengths if self.left else np.zeros_like(lengths)
        positions = np.arange(longest) - start[:, None]
        return np.where((positions >= 0) & (positions < lengths[:, None]), positions, -1)

    def __call__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return a batch: every input and attention_mask, of shape (rows, longest), and labels.

        Rows with positions are packed: they have no attention_mask.
        """
        pad = DataCollatorWithPadding(self.tokenizer)
        batch: dict[str, Tensor] = dict(pad([self.split.features(row) for row in rows]))
        if POSITIONS in self.split.tokens:
            # Models tell packed rows from each other by their positions alone, without a mask.
            del batch["attention_mask"]
            batch[POSITIONS] = self._padded(self.split.tokens[POSITIONS], rows, fill=0)
        if self.split.token_labels:
            batch[LABELS] = self._padded(self.split.labels, rows, fill=IGNORED)
        else:
            batch[LABELS] = labels_of(rows, self.split.labels)
        if self.name is not None:
            batch[rows_key(self.name)] = torch.tensor(rows)
        return batch

    def _padded(self, values: NDArray[np.int64], rows: Sequence[int], fill: int) -> Tensor:
        """Return what the tokens of rows have, of shape (rows, longest)."""
        positions = self.positions(rows)
        found = values[np.maximum(self.split.offsets[rows][:, None] + positions, 0)]
        return torch.from_numpy(np.where(positions >= 0, found, fill))


class ShuffledBatches(Sampler[list[int]]):
    """Batches of rows in random order.

    Any epoch can be drawn again, for a training that goes on where it paused. Epochs count from 0 with every
    new sampler.

    Args:
        rows: Number of rows.
        batch_size: Rows a batch; one of them may have fewer.
        seed: Seed of the shuffling.
    """

    def __init__(self, rows: int, batch_size: int, seed: int) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch is drawn next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.rows // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        (seed,) = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(seed >> np.uint64(1)))
        self.epoch += 1
        rows = self.order(generator)
        for index in torch.randperm(len(self), generator=generator).tolist():
            yield rows[index * self.batch_size : (index + 1) * self.batch_size]

    def joined(self, batches: int) -> Self:
        """Return a sampler of the same rows whose batches are so many times as large."""
        larger = copy.copy(self)
        larger.batch_size = batches * self.batch_size
        return larger

    def order(self, generator: torch.Generator) -> list[int]:
        """Return the rows in the order in which they are cut into batches."""
        shuffled: list[int] = torch.randperm(self.rows, generator=generator).tolist()
        return shuffled


class LengthGroupedBatches(ShuffledBatches):
    """Batches of rows of like length, grouped as by transformers, in random order.

    Unlike those of its `LengthGroupedSampler`, pools of 50 batches do not begin with the longest.

    Args:
        lengths: Length of each row.
        batch_size: Rows a batch; one of them may have fewer.
        seed: Seed of the shuffling.
    """

    def __init__(self, lengths: NDArray[np.int64], batch_size: int, seed: int) -> None:
        super().__init__(len(lengths), batch_size, seed)
        self.lengths = lengths

    def order(self, generator: torch.Generator) -> list[int]:
        """Return rows of like length beside each other."""
        grouped: list[int] = get_length_grouped_indices(
            self.lengths.tolist(), self.batch_size, mega_batch_mult=_BATCHES_A_POOL, generator=generator
        )
        return grouped


def sorted_batches(lengths: NDArray[np.int64], batch_size: int) -> list[list[int]]:
    """Return batches for evaluation: every row once, sorted by length, longest first."""
    rows = np.argsort(-lengths, kind="stable")
    return [rows[at : at + batch_size].tolist() for at in range(0, len(rows), batch_size)]


def labels_of(rows: Sequence[int], labels: NDArray[Any]) -> Tensor:
    """Return the labels of some rows; of several a row, as of targets, those that one of the rows has."""
    found = labels[rows]
    return torch.from_numpy(found[:, (found != IGNORED).any(axis=0)] if found.ndim == 2 else found)


def longest_labels(labels: NDArray[Any], rows: int) -> Tensor:
    """Return the labels of so many rows, of those with most."""
    counts = (labels != IGNORED).reshape(len(labels), -1).sum(axis=1)
    return labels_of(np.argsort(-counts, kind="stable")[:rows].tolist(), labels)


@dataclass(frozen=True)
class _RowNumbers(Dataset[Any]):
    """The numbers of a split's rows, of which batches are made."""

    collator: RowCollator

    def __len__(self) -> int:
        return len(self.collator)

    def __getitem__(self, index: int) -> int:
        return index


def loader(
    collator: RowCollator, batches: Sampler[list[int]] | list[list[int]], workers: int = 0
) -> DataLoader[Batch]:
    """Return a loader whose batches are made in so many processes; by default in this one.

    Batches of tokens are made faster than workers would hand them over.
    """
    return DataLoader(_RowNumbers(collator), batch_sampler=batches, collate_fn=collator, num_workers=workers)
