"""What leaving the frozen blocks out of a training saves, estimated before it starts.

From sizes and settings alone, never a clock: whether hidden states are served decides the last bits of a
result, and the same search must give the same results on a busy machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_MOST_TRAININGS = 4.0  # of one cut that are counted on, however long the search is


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a kind of device does, in round figures (`benchmarks/hidden_states.py`)."""

    step_seconds: float  # a step beside the blocks: the loop, the head, the optimizer
    flops: float  # a second, of a block's matrix products
    block_seconds: float  # a block at least, however few tokens it is given
    read_bytes: float  # a second, of hidden states put in place, from a file that lies in memory
    read_seconds: float  # putting a batch in place at least
    write_bytes: float  # a second, of hidden states written to a file


RATES = {
    "cpu": Rates(
        step_seconds=4e-3, flops=5e10, block_seconds=3e-4, read_bytes=2e9, read_seconds=2e-4, write_bytes=5e8
    ),
    "cuda": Rates(
        step_seconds=6e-3, flops=5e13, block_seconds=4e-4, read_bytes=3e9, read_seconds=3e-4, write_bytes=5e8
    ),
}


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Size of a split, and how often it is run in one training."""

    batches: int
    tokens: int
    times: float
    block_cost: int  # forward passes that a block above the cut costs: 2 in training, with the way back


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What serving hidden states at one cut would save."""

    share: float  # of the seconds of a training that is not served
    fill_share: float  # of the same: what computing the hidden states takes, once
    bytes: int

    def pays(self, trainings: float) -> bool:
        """Whether so many trainings save more than filling takes."""
        return trainings * self.share > self.fill_share


def expected_trainings(trials: int | None, blocks: int) -> float:
    """Return how many trainings one cut is expected to serve in so many trials, or in any number."""
    return _MOST_TRAININGS if trials is None else min(_MOST_TRAININGS, max(1.0, trials / blocks))


def estimate(
    splits: Iterable[Passes], *, cut: int, blocks: int, block_parameters: float, token_bytes: int, device: str
) -> Estimate:
    """Return what serving saves.

    In training a block above the cut costs a forward pass and about another one backward (the gradient of
    its input, not of its frozen weights), one below the forward pass alone: of L blocks with k below the
    cut, a step without serving takes 2L - k passes, with serving 2(L - k). A block has `block_parameters` on
    average, and one token's hidden states have `token_bytes`.
    """
    rates = RATES[device]
    saved = whole = filling = 0.0
    size = 0
    for split in splits:
        block = max(rates.block_seconds * split.batches, 2 * block_parameters * split.tokens / rates.flops)
        split_bytes = split.tokens * token_bytes
        read = rates.read_seconds * split.batches + split_bytes / rates.read_bytes
        above = block * split.block_cost * (blocks - cut)
        saved += split.times * (cut * block - read)
        whole += split.times * (cut * block + above + rates.step_seconds * split.batches)
        filling += cut * block + split_bytes / rates.write_bytes
        size += split_bytes
    return Estimate(share=saved / whole, fill_share=filling / whole, bytes=size)
