"""Splits whose rows are files, images or recordings, which are read when they are asked for."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset


@dataclass(frozen=True)
class FileSplit(ABC):
    """One split.

    Attributes:
        files: One column of files, not decoded.
        labels: The label of each row.
        source: Name of the split of the source it was taken from, for errors.
        rows: The rows' numbers there.
    """

    files: Dataset
    labels: tuple[Any, ...]
    source: str
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.labels)

    def place(self, row: int) -> str:
        """Return where a row stands, for errors."""
        return f"Row {self.rows[row]} of the {self.source} split"

    def decoded(self, row: int) -> Any:
        """Return what a row's file holds.

        Raises:
            ValueError: It cannot be read.
        """
        try:
            return self._decoded(self._file(row))
        except (OSError, SyntaxError, ValueError, TypeError) as error:
            kind = type(self).__name__.removesuffix("s").lower()
            raise ValueError(f"{self.place(row)} has no {kind} that can be read: {error}.") from error

    def _file(self, row: int) -> Mapping[str, Any]:
        (found,) = self.files[row].values()
        return {"path": found} if isinstance(found, str) else found or {}

    @staticmethod
    def _bytes(file: Mapping[str, Any]) -> bytes:
        return file.get("bytes") or Path(file["path"]).read_bytes()

    @abstractmethod
    def _decoded(self, file: Mapping[str, Any]) -> Any:
        """Return what a file holds, given as `datasets` does: with its bytes or its path."""

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """SHA-256 (hex) of each row's file."""
        return tuple(hashlib.sha256(self._bytes(self._file(row))).hexdigest() for row in range(len(self)))
