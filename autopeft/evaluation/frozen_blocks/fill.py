"""One pass over a split that computes the hidden states at a cut, and on the way those at cuts below it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from autopeft.evaluation.frozen_blocks.block_skipping import FrozenBlocks, Structure
from autopeft.evaluation.frozen_blocks.row_index import RowIndex
from autopeft.evaluation.frozen_blocks.store import StateWriter, StoredStates

SECONDS_PER_TOKEN = "seconds_per_token"
"""Noted in every file: what computing a token's hidden states takes."""
SECONDS_SAVED = "prefix_seconds_saved"
"""A trial's value: what being served them saved it."""


class Start(NamedTuple):
    """Where a pass begins: at hidden states that there are, or at the embeddings.

    Attributes:
        cut: Number of blocks that are left out.
        stored: Hidden states at this cut; None where it is 0.
    """

    cut: int
    stored: StoredStates | None

    @property
    def seconds_per_token(self) -> float:
        """What computing a token's hidden states up to here took."""
        return 0.0 if self.stored is None else float(self.stored.notes[SECONDS_PER_TOKEN])


def fill(
    prefix: FrozenBlocks,
    structure: Structure,
    rows: RowIndex,
    writers: Mapping[int, StateWriter],
    start: Start,
    *,
    device: torch.device,
    clock: Callable[[], float],
) -> None:
    """Compute the hidden states of all rows and write them.

    Args:
        prefix: The highest cut, entered.
        structure: What the blocks return.
        rows: The split's.
        writers: By cut, the highest and any between it and the start.
        start: Where the pass begins.
        device: Where the model is.
        clock: What time is measured with.
    """
    keeper = _Keeper(writers, clock)
    with ExitStack() as stack:
        below = stack.enter_context(FrozenBlocks(prefix.model, prefix.blocks, start.cut))
        for cut in writers.keys() - {prefix.cut}:
            on_the_way = stack.enter_context(FrozenBlocks(prefix.model, prefix.blocks, cut))
            stack.enter_context(on_the_way.looking(partial(keeper.keep, cut)))
        for batch in rows.batches:
            keeper.begin(rows.inside(batch).to(device))
            inputs = rows.inputs(batch, device)
            serving: AbstractContextManager[None] = contextlib.nullcontext()
            if start.stored is not None:
                serving = below.serving(rows.gather(start.stored.states, batch, device), structure)
            with serving:
                keeper.keep(prefix.cut, prefix.states(inputs))
    keeper.finish(start.seconds_per_token, rows.tokens)


class _Keeper:
    """Writes what a pass gives at each cut, and measures how long it took to get there.

    Args:
        writers: By cut.
        clock: What time is measured with; it stands while hidden states are written.
    """

    def __init__(self, writers: Mapping[int, StateWriter], clock: Callable[[], float]) -> None:
        self._writers = writers
        self._clock = clock
        self._seconds = dict.fromkeys(writers, 0.0)

    def begin(self, inside: Tensor) -> None:
        """Begin a batch that has tokens where `inside`, of shape (rows, longest), is true."""
        self._inside = inside
        self._elapsed = 0.0
        self._started = self._clock()

    def keep(self, cut: int, hidden: Tensor) -> None:
        """Write the batch's hidden states at a cut, of shape (rows, longest, width), without padding."""
        found = hidden[self._inside].cpu()
        self._elapsed += self._clock() - self._started
        self._seconds[cut] += self._elapsed
        self._writers[cut].write(found)
        self._started = self._clock()

    def finish(self, seconds_before: float, tokens: int) -> None:
        """Write what padding is given, and note what a token took, with what it took up to the start."""
        for cut, writer in self._writers.items():
            writer.write_padding()
            writer.notes[SECONDS_PER_TOKEN] = repr(seconds_before + self._seconds[cut] / tokens)
