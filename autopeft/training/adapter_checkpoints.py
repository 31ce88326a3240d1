"""Trained tensors of the trials on the front, or that may come onto it: export needs no training."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from autopeft.core.durable_files import load_tensors, save_tensors
from autopeft.core.evaluation import TrialRecord
from autopeft.core.profiling import section

_SEED, _CONFIGURATION = "seed", "configuration"


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

    @section("record")
    def keep_only(self, numbers: Collection[int]) -> None:
        """Delete the files of every other trial, and what a killed process left unfinished.

        Not while trials are trained in other processes, which write before their records are known.
        """
        if not self.folder.is_dir():
            return
        wanted = {self.path(number).name for number in numbers}
        for name in os.listdir(self.folder):
            if name.startswith("trial-") and name not in wanted:
                (self.folder / name).unlink(missing_ok=True)


class AdapterCheckpoints(TrialFiles):
    """The trained tensors of a search, one file a trial or point.

    What is of another configuration counts as missing: a worker that has outlived its search may write what
    it trained, while the resumed search tries something else under the same number.
    """

    @section("record")
    def save(self, record: TrialRecord, state: Mapping[str, Tensor], seed: int) -> None:
        """Write a trial's tensors and the seed of the training that they are of."""
        key = record.evaluation.configuration.key
        save_tensors(self.path(record.number), state, {_SEED: str(seed), _CONFIGURATION: key})

    def seed(self, record: TrialRecord) -> int | None:
        """Return the seed of the training whose tensors a trial has; None where none are kept."""
        kept = self._read(record)
        return None if kept is None else int(kept[1][_SEED])

    def load(self, record: TrialRecord) -> dict[str, Tensor] | None:
        """Return a trial's tensors, or None where they were not kept."""
        kept = self._read(record)
        return None if kept is None else kept[0]

    def _read(self, record: TrialRecord) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        kept = load_tensors(self.path(record.number))
        is_its_own = kept is not None and kept[1].get(_CONFIGURATION) == record.evaluation.configuration.key
        return kept if is_its_own else None

    @section("record")
    def drop(self, numbers: Iterable[int]) -> None:
        """Delete the tensors of some trials, where there are any."""
        for number in numbers:
            self.path(number).unlink(missing_ok=True)
