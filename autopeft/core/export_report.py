"""What an export wrote, and what it kept and lost."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from autopeft.core.configuration import Site


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What making one LoRA of a configuration kept and lost."""

    energy_kept: Mapping[Site, float]  # share of each update that was no LoRA
    trained: Mapping[str, float]  # metrics on the validation split of what was trained; none where not scored
    as_lora: Mapping[str, float]  # the same of the LoRA

    def __str__(self) -> str:
        scores = (
            f"{name} {value:.4f} as trained, {self.as_lora[name]:.4f} as LoRA"
            for name, value in self.trained.items()
        )
        lost = "; ".join(scores) or "it was not scored again"
        least = min(self.energy_kept.values())
        return (
            f"Made LoRA: {len(self.energy_kept)} sites, each keeping at least {least:.2%} of its update. "
            f"On the validation split: {lost}."
        )


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What an export wrote, and how it was checked.

    Attributes:
        folder: The folder.
        kind: What kind of folder it is, as a phrase.
        files: Paths of its files, relative to the folder.
        bytes: Their size together.
        max_logit_difference: Largest absolute difference between the logits of the trained model and of
            the one that was loaded from the folder; None where that was not checked.
        checked: How it was checked.
        servers: Which servers can take it, and how they are started.
        how_to_load: A Python snippet that loads it.
        conversion: What was kept and lost where other methods were made LoRA; None where nothing was.
    """

    folder: Path
    kind: str
    files: tuple[str, ...]
    bytes: int
    max_logit_difference: float | None
    checked: str
    servers: str
    how_to_load: str
    conversion: Conversion | None = None

    def __str__(self) -> str:
        converted = "" if self.conversion is None else f"{self.conversion}\n"
        snippet = "\n".join(f"    {line}".rstrip() for line in self.how_to_load.splitlines())
        return (
            f"Exported to {self.folder}: {self.kind} "
            f"({len(self.files)} files, {self.bytes / 2**20:.1f} MiB).\n"
            f"{converted}{self.checked}\n"
            f"Servers: {self.servers}\n"
            f"Load it with:\n\n{snippet}"
        )

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"
