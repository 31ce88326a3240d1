"""What leaving the frozen blocks out of a training saves, estimated before it starts.

The estimate depends on sizes and settings alone, never on a clock: whether hidden states are served decides
the last bits of a result, and the same search must give the same results on a busy machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

_MOST_TRAININGS = 4.0


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a kind of device does a second, in round figures (`benchmarks/hidden_states.py`).

    Attributes:
        step_seconds: What a step takes beside the blocks: the loop, the head, the optimizer.
        flops: Floating-point operations of a block's matrix products.
        block_seconds: What a block takes at least, however few tokens it is given.
        read_bytes: Bytes of hidden states put in place, from a file that lies in memory.
        read_seconds: What putting a batch in place takes at least.
        write_bytes: Bytes of hidden states written to a file.
    """

    step_seconds: float
    flops: float
    block_seconds: float
    read_bytes: float
    read_seconds: float
    write_bytes: float


RATES: Mapping[str, Rates] = MappingProxyType(
    {
        "cpu": Rates(
            step_seconds=4e-3,
            flops=5e10,
            block_seconds=3e-4,
            read_bytes=2e9,
            read_seconds=2e-4,
            write_bytes=5e8,
        ),
        "cuda": Rates(
            step_seconds=6e-3,
            flops=5e13,
            block_seconds=4e-4,
            read_bytes=3e9,
            read_seconds=3e-4,
            write_bytes=5e8,
        ),
    }
)


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

    Trials are spread over as many cuts as there are blocks; a search of unknown length, and a long one, is
    taken to use each cut a few times.

    Args:
        trials: Trials of the budget; None where it does not say.
        blocks: Number of blocks.
    """
    if trials is None:
        return _MOST_TRAININGS
    return min(_MOST_TRAININGS, max(1.0, trials / blocks))


def estimate(
    splits: Mapping[str, Passes],
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
    saved = whole = passing = writing = 0.0
    for split in splits.values():
        block = max(rates.block_seconds * split.batches, 2 * block_parameters * split.tokens / rates.flops)
        read = rates.read_seconds * split.batches + split.tokens * token_bytes / rates.read_bytes
        saved += split.times * (cut * block - read)
        above = block * split.block_cost * (blocks - cut)
        whole += split.times * (cut * block + above + rates.step_seconds * split.batches)
        passing += block
        writing += split.tokens * token_bytes / rates.write_bytes
    size = sum(split.tokens + 1 for split in splits.values()) * token_bytes
    return Estimate(
        share=saved / whole,
        fill_share=(cut * passing + writing) / whole,
        bytes=size,
    )
