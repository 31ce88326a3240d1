"""Draw with a seed, and leave the generators as they were."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Seed the CPU's generator, and those of CUDA devices, until the end of the block.

    Not `torch.manual_seed`: where CUDA is there and not used, it keeps each call until CUDA is.
    """
    cuda = _cuda(devices)
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for gpu in cuda:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield


def generator_states(devices: Iterable[torch.device]) -> dict[str, torch.Tensor]:
    """Return the states of the generators on devices and the CPU: "cpu", "cuda", of a second GPU "cuda1"."""
    states = {"cpu": torch.get_rng_state()}
    return states | {name: torch.cuda.get_rng_state(device) for name, device in _named(devices).items()}


def restore_generators(states: Mapping[str, torch.Tensor], devices: Iterable[torch.device]) -> None:
    """Put the generators back to what `generator_states` has returned."""
    torch.set_rng_state(states["cpu"])
    for name, device in _named(devices).items():
        if name in states:
            torch.cuda.set_rng_state(states[name], device)


def _cuda(devices: Iterable[torch.device]) -> list[torch.device]:
    return [device for device in devices if device.type == "cuda"]


def _named(devices: Iterable[torch.device]) -> dict[str, torch.device]:
    return {f"cuda{place or ''}": device for place, device in enumerate(_cuda(devices))}


def training_seed(seed: int, trial: int, training: int = 0) -> int:
    """Return the seed of one training of a search, in [0, 2³¹).

    Each has its own, so that the luck of one order of batches is not taken for what candidates are worth:
    it follows from the search's seed, the trial's number, and which of its trainings it is.
    """
    digest = hashlib.sha256(f"{seed}:{trial}:{training}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
