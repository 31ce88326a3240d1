"""Trained tensors of the trials on the front, kept on disk so that export needs no training."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from autopeft.profiling import section


class Checkpoints:
    """One safetensors file a trial in a folder.

    Args:
        folder: Made when the first trial is saved.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, number: int) -> Path:
        return self.folder / f"trial-{number:05d}.safetensors"

    @section("record")
    def save(self, number: int, state: Mapping[str, Tensor]) -> None:
        """Write a trial's tensors; the file is there whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self._path(number).with_suffix(".part")
        save_file({name: one.contiguous() for name, one in state.items()}, unfinished)
        os.replace(unfinished, self._path(number))

    def load(self, number: int) -> dict[str, Tensor] | None:
        """Return a trial's tensors, or None where they were not kept."""
        path = self._path(number)
        return load_file(path) if path.is_file() else None

    @section("record")
    def keep_only(self, numbers: Collection[int]) -> None:
        """Delete the tensors of every other trial, and what a killed process left unfinished."""
        wanted = {self._path(number) for number in numbers}
        for path in self.folder.glob("trial-*"):
            if path not in wanted:
                path.unlink(missing_ok=True)
