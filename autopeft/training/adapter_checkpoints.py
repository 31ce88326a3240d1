"""Trained tensors of the trials on the front, kept on disk so that export needs no training.

Where members of the front are trained again, others may come onto it: their tensors are kept as well.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from autopeft.core.profiling import section

_SEED = "seed"


class AdapterCheckpoints:
    """One safetensors file a trial in a folder.

    Args:
        folder: Made when the first trial is saved.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, number: int) -> Path:
        return self.folder / f"trial-{number:05d}.safetensors"

    @section("record")
    def save(self, number: int, state: Mapping[str, Tensor], seed: int) -> None:
        """Write a trial's tensors, and of which training they are; the file is there whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self._path(number).with_suffix(".part")
        tensors = {name: one.contiguous() for name, one in state.items()}
        save_file(tensors, unfinished, metadata={_SEED: str(seed)})
        os.replace(unfinished, self._path(number))

    def seed(self, number: int) -> int | None:
        """Return the seed of the training whose tensors a trial has; None where none are kept."""
        if not self._path(number).is_file():
            return None
        with safe_open(self._path(number), framework="pt") as file:
            seed = (file.metadata() or {}).get(_SEED)
        return None if seed is None else int(seed)

    def load(self, number: int) -> dict[str, Tensor] | None:
        """Return a trial's tensors, or None where they were not kept."""
        path = self._path(number)
        return load_file(path) if path.is_file() else None

    @section("record")
    def keep_only(self, numbers: Collection[int]) -> None:
        """Delete the tensors of every other trial, and what a killed process left unfinished."""
        if not self.folder.is_dir():
            return
        wanted = {self._path(number).name for number in numbers}
        for name in os.listdir(self.folder):
            if name.startswith("trial-") and name not in wanted:
                (self.folder / name).unlink(missing_ok=True)
