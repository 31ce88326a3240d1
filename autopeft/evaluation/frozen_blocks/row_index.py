"""Which hidden states belong to which row of a split, in batches and in a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from autopeft.tasks.batch import model_inputs
from autopeft.tasks.length_bucketing import Collator, sorted_batches

_PROBE_ROWS = 4


class RowIndex:
    """A split's rows, in the batches in whose order hidden states are computed and, unpadded, stored."""

    def __init__(self, collator: Collator, batch_size: int) -> None:
        self._collator = collator
        self._lengths = collator.split.lengths
        self._side: Literal["left", "right"] = "left" if collator.left else "right"
        self.batches = sorted_batches(self._lengths, batch_size)
        self.tokens = int(self._lengths.sum())
        self.identity = f"{collator.split.fingerprint} {self._side} {batch_size}"
        order = np.concatenate(self.batches)
        self._starts = np.empty(len(order), dtype=np.int64)
        self._starts[order] = np.cumsum(self._lengths[order]) - self._lengths[order]

    def inputs(self, rows: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """Return what a model is called with for these rows."""
        return {name: tensor.to(device) for name, tensor in model_inputs(self._collator(rows)).items()}

    def inside(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """Return where a batch of these rows has tokens, of shape (rows, longest)."""
        return torch.from_numpy(self._collator.positions(rows) >= 0).to(device)

    def gather(self, states: Tensor, rows: Sequence[int]) -> Tensor:
        """Return the hidden states of a batch, of shape (rows, longest, width), out of a file's."""
        return self.padded([states[self._starts[row] :][: self._lengths[row]] for row in rows])

    def padded(self, states: list[Tensor]) -> Tensor:
        """Return the hidden states of rows, each of shape (tokens, width), as one batch, zeros at padding."""
        return pad_sequence(states, batch_first=True, padding_side=self._side)

    def probe(self) -> list[int]:
        """Return a few rows, from the shortest to the longest."""
        order = np.argsort(self._lengths, kind="stable")
        ranks = np.linspace(0, len(order) - 1, min(_PROBE_ROWS, len(order))).astype(int)
        return [int(row) for row in order[ranks]]
