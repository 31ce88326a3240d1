"""Length-bucketed batches: little padding, cheap to make, the same for the same seed and epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from autopeft.tasks.batch import LABELS, rows_key

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
        pad: Input name → padding value.
        left: Whether padding goes in front.
        name: Name of the split, for batches that say which rows they hold; None for those that do not.
    """

    split: TokenisedSplit
    pad: dict[str, int]
    left: bool = False
    name: str | None = None

    def positions(self, rows: Sequence[int]) -> NDArray[np.int64]:
        """Return which token of its row lies where in a batch, of shape (rows, longest); -1 at padding."""
        lengths = self.split.lengths[rows]
        longest = int(lengths.max())
        start = longest - lengths if self.left else np.zeros_like(lengths)
        positions = np.arange(longest) - start[:, None]
        return np.where((positions >= 0) & (positions < lengths[:, None]), positions, -1)

    def __call__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return a batch: every input and attention_mask, of shape (rows, longest), and labels."""
        batch: dict[str, Tensor] = {}
        inside = self.positions(rows) >= 0
        for name, values in self.split.tokens.items():
            padded = np.full(inside.shape, self.pad[name], dtype=np.int64)
            pieces = [values[self.split.offsets[row] : self.split.offsets[row + 1]] for row in rows]
            padded[inside] = np.concatenate(pieces)
            batch[name] = torch.from_numpy(padded)
        batch["attention_mask"] = torch.from_numpy(inside.astype(np.int64))
        batch[LABELS] = torch.from_numpy(self.split.labels[rows])
        if self.name is not None:
            batch[rows_key(self.name)] = torch.tensor(rows)
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
