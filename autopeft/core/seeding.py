"""Draw with a seed, and leave the generators as they were."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed the CPU's generator, and that of a CUDA device, until the end of the block.

    `torch.manual_seed` seeds every kind of device; where CUDA is there and not used, it keeps each call, with
    where it came from, until CUDA is.

    Args:
        seed: The seed.
        device: The device that draws besides the CPU.
    """
    cuda = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for one in cuda:
            with torch.cuda.device(one):
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

    Every training has a seed of its own: what one order of the batches and one set of
    initial weights do to all candidates alike would otherwise be taken for what the candidates are worth.

    Args:
        seed: The search's.
        trial: The trial's number.
        training: Which of its trainings, from 0.
    """
    digest = hashlib.sha256(f"{seed}:{trial}:{training}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
