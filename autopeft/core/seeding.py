"""Draw with a seed, and leave the generators as they were."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed the CPU's generator, and that of a CUDA device, until the end of the block.

    Not `torch.manual_seed`: where CUDA is there and not used, it keeps each call until CUDA is.
    """
    cuda = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for gpu in cuda:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield


def generator_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of the generators that a training on a device draws from, by device type."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def training_seed(seed: int, trial: int, training: int = 0) -> int:
    """Return the seed of one training of a search, in [0, 2³¹).

    Each has its own, so that the luck of one order of batches is not taken for what candidates are worth:
    it follows from the search's seed, the trial's number, and which of its trainings it is.
    """
    digest = hashlib.sha256(f"{seed}:{trial}:{training}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
