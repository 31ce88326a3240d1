"""Length-bucketed batches: little padding, cheap to make, the same for the same seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

_BATCHES_A_POOL = 50


@dataclass(frozen=True)
class TokenisedSplit(Dataset[int]):
    """The rows of one split as token ids, concatenated.

    Attributes:
        tokens: Input name → all rows' values one after another (input_ids, token_type_ids …).
        offsets: Row i lies at offsets[i]:offsets[i + 1].
        labels: Label of each row.
    """

    tokens: dict[str, NDArray[np.int64]]
    offsets: NDArray[np.int64]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> int:
        return index

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of each row."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Collator:
    """Pad rows to the longest among them.

    Attributes:
        split: Where the rows are.
        pad: Input name → padding value.
        left: Whether padding goes in front.
    """

    split: TokenisedSplit
    pad: dict[str, int]
    left: bool = False

    def __call__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return a batch: every input, attention_mask and labels, of shape (rows, longest)."""
        lengths = self.split.lengths[rows]
        longest = int(lengths.max())
        batch: dict[str, Tensor] = {}
        positions = np.arange(longest)
        start = longest - lengths if self.left else np.zeros_like(lengths)
        inside = (positions >= start[:, None]) & (positions < (start + lengths)[:, None])
        for name, values in self.split.tokens.items():
            padded = np.full((len(lengths), longest), self.pad[name], dtype=np.int64)
            pieces = [values[self.split.offsets[row] : self.split.offsets[row + 1]] for row in rows]
            padded[inside] = np.concatenate(pieces)
            batch[name] = torch.from_numpy(padded)
        batch["attention_mask"] = torch.from_numpy(inside.astype(np.int64))
        batch["labels"] = torch.from_numpy(self.split.labels[rows])
        return batch


class BucketedBatches(Sampler[list[int]]):
    """Batches of rows of like length.

    Each epoch shuffles all rows, sorts them by length within pools of 50 batches, cuts batches, and
    shuffles the batches. Epochs count from 0 on with every new sampler.

    Args:
        lengths: Length of each row.
        batch_size: Rows a batch; the last may have fewer.
        seed: Seed of the shuffling.
    """

    def __init__(self, lengths: NDArray[np.int64], batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch is drawn next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng((self.seed, self.epoch))
        self.epoch += 1
        rows = generator.permutation(len(self.lengths))
        pool = self.batch_size * _BATCHES_A_POOL
        batches: list[NDArray[np.int64]] = []
        for start in range(0, len(rows), pool):
            some = rows[start : start + pool]
            some = some[np.argsort(self.lengths[some], kind="stable")]
            batches += [some[at : at + self.batch_size] for at in range(0, len(some), self.batch_size)]
        for index in generator.permutation(len(batches)):
            yield batches[index].tolist()


def sorted_batches(lengths: NDArray[np.int64], batch_size: int) -> list[list[int]]:
    """Return batches for evaluation: every row once, sorted by length, longest first."""
    rows = np.argsort(-lengths, kind="stable")
    return [rows[at : at + batch_size].tolist() for at in range(0, len(rows), batch_size)]


def loader(
    split: TokenisedSplit, collator: Collator, batches: Sampler[list[int]] | list[list[int]]
) -> DataLoader[dict[str, Tensor]]:
    """Return a loader in this process: batches are made faster than workers would hand them over."""
    made: DataLoader[dict[str, Tensor]] = DataLoader(
        split,  # type: ignore[arg-type]
        batch_sampler=batches,
        collate_fn=collator,
    )
    return made
