"""What leaving the frozen blocks out of a training saves, estimated before it starts.

The estimate depends on sizes and settings alone, never on a clock: whether hidden states are served decides
the last bits of a result, and the same search must give the same results on a busy machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_MOST_TRAININGS = 4.0


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
    """How often a split's batches are run in one training.

    Attributes:
        batches: Batches of the split.
        tokens: Tokens of the split.
        times: Batches run in the whole training, as a multiple of the split's.
        block_cost: Cost of a batch in a block above the cut, in forward passes: 2 where gradients flow back
            through frozen weights, 1 where none do.
    """

    batches: int
    tokens: int
    times: float
    block_cost: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What serving hidden states at one cut would save.

    Attributes:
        share: Seconds saved, as a share of a training that is not served; filling is left out.
        fill_share: Seconds that filling takes once, as a share of the same.
        bytes: Size of the hidden states.
    """

    share: float
    fill_share: float
    bytes: int

    def pays(self, trainings: float) -> bool:
        """Whether so many trainings save more than filling takes."""
        return trainings * self.share > self.fill_share


def expected_trainings(trials: int | None, blocks: int) -> float:
    """Return how many trainings hidden states at one cut are expected to serve.

    Trials are spread over as many cuts as there are blocks; a search of unknown length (None), and a long
    one, is taken to use each cut a few times.
    """
    return _MOST_TRAININGS if trials is None else min(_MOST_TRAININGS, max(1.0, trials / blocks))


def estimate(
    splits: Iterable[Passes],
    *,
    cut: int,
    blocks: int,
    block_parameters: float,
    token_bytes: int,
    device: str,
) -> Estimate:
    """Return what serving saves.

    A block above the cut costs a forward pass and, in training, about another one backward (the gradient of
    its input, not of its frozen weights); one below costs the forward pass: with L blocks and the cut k, a
    training step without serving takes 2L - k passes of a block, with serving 2(L - k).

    Args:
        splits: Training and validation split.
        cut: Number of blocks below the cut.
        blocks: Number of blocks.
        block_parameters: Parameters of a block, on average.
        token_bytes: Bytes of one token's hidden states.
        device: Type of the device: "cpu" or "cuda".
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
