"""Trained tensors of the trials on the front, or that may come onto it: export needs no training."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from autopeft.core.durable_files import load_tensors, save_tensors
from autopeft.core.profiling import section

_SEED = "seed"


@dataclass(frozen=True)
class TrialFiles:
    """One safetensors file a trial in a folder; a damaged one counts as missing.

    Attributes:
        folder: Made when the first trial is saved.
    """

    folder: Path

    def path(self, number: int) -> Path:
        """Return the place of a trial's file."""
        return self.folder / f"trial-{number:05d}.safetensors"


class AdapterCheckpoints(TrialFiles):
    """The trained tensors of a search, one file a trial."""

    @section("record")
    def save(self, number: int, state: Mapping[str, Tensor], seed: int) -> None:
        """Write a trial's tensors and the seed of the training that they are of."""
        save_tensors(self.path(number), state, {_SEED: str(seed)})

    def seed(self, number: int) -> int | None:
        """Return the seed of the training whose tensors a trial has; None where none are kept."""
        kept = load_tensors(self.path(number))
        return None if kept is None or _SEED not in kept[1] else int(kept[1][_SEED])

    def load(self, number: int) -> dict[str, Tensor] | None:
        """Return a trial's tensors, or None where they were not kept."""
        kept = load_tensors(self.path(number))
        return None if kept is None else kept[0]

    @section("record")
    def drop(self, numbers: Iterable[int]) -> None:
        """Delete the tensors of some trials, where there are any."""
        for number in numbers:
            self.path(number).unlink(missing_ok=True)

    @section("record")
    def keep_only(self, numbers: Collection[int]) -> None:
        """Delete the tensors of every other trial, and what a killed process left unfinished.

        Not while trials are trained in other processes, which write before their records are known.
        """
        if not self.folder.is_dir():
            return
        wanted = {self.path(number).name for number in numbers}
        for name in os.listdir(self.folder):
            if name.startswith("trial-") and name not in wanted:
                (self.folder / name).unlink(missing_ok=True)
