"""Draw with a seed, and leave the generators as they were."""

from __future__ import annotations

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
