"""Which hidden states belong to which row of a split, in batches and in a file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autopeft.tasks.batch import model_inputs
from autopeft.tasks.length_bucketing import Collator, sorted_batches

_PROBE_ROWS = 4


class RowIndex:
    """A split's rows, and the batches in whose order their hidden states are computed and stored.

    A file holds the hidden states of all rows' tokens without padding, then one position of zeros, which is
    what padding is given.

    Args:
        collator: Makes batches of the rows.
        batch_size: Rows a batch.
    """

    def __init__(self, collator: Collator, batch_size: int) -> None:
        self.collator = collator
        self.lengths = collator.split.lengths
        self.batches = sorted_batches(self.lengths, batch_size)
        self.tokens = int(self.lengths.sum())
        side = "left" if collator.left else "right"
        self.identity = f"{collator.split.fingerprint} {side} {batch_size}"
        order = np.concatenate(self.batches)
        self._starts = np.empty(len(order), dtype=np.int64)
        self._starts[order] = np.cumsum(self.lengths[order]) - self.lengths[order]

    def inputs(self, rows: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """Return what a model is called with for these rows."""
        return {name: one.to(device) for name, one in model_inputs(self.collator(rows)).items()}

    def inside(self, rows: Sequence[int]) -> Tensor:
        """Return where a batch of these rows has tokens, of shape (rows, longest)."""
        return torch.from_numpy(self.collator.positions(rows) >= 0)

    def gather(self, states: Tensor, rows: Sequence[int], device: torch.device) -> Tensor:
        """Return the hidden states of a batch, of shape (rows, longest, width).

        Args:
            states: A file's, of shape (tokens + 1, width).
            rows: The batch's rows.
            device: Where to put them.
        """
        return place(states, self.collator.positions(rows), self._starts[rows], device)

    def probe(self) -> list[int]:
        """Return a few rows, from the shortest to the longest."""
        order = np.argsort(self.lengths, kind="stable")
        ranks = np.linspace(0, len(order) - 1, min(_PROBE_ROWS, len(order))).astype(int)
        return [int(row) for row in order[ranks]]


def place(
    states: Tensor, positions: NDArray[np.int64], starts: NDArray[np.int64], device: torch.device
) -> Tensor:
    """Return padded hidden states of shape (rows, longest, width).

    Args:
        states: Of shape (tokens + 1, width); the last is for padding.
        positions: Which token of its row lies where, of shape (rows, longest); -1 at padding.
        starts: Where each row's states begin.
        device: Where to put them.
    """
    index = np.where(positions >= 0, starts[:, None] + positions, len(states) - 1)
    shape = (index.size, states.shape[1])
    on_gpu = device.type == "cuda"
    gathered = torch.empty(shape, dtype=states.dtype, pin_memory=on_gpu)
    torch.index_select(states, 0, torch.from_numpy(index.reshape(-1)), out=gathered)
    return gathered.to(device, non_blocking=on_gpu).view(*index.shape, -1)
